"""Results as tables, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.figures import ADDED, FIGURES
from bench.summary import DIRECT, Summary
from bench.targets import KIB, MIB, OURS, checked

LIMIT = "nginx"
_BYTES_EACH = ("bytes_each", "ahead_bytes_each")


def shown(number: float) -> str:
    """Return a number as a reader needs it: three digits, or all that are before the point."""
    if math.isnan(number):
        return "-"
    if abs(number) >= 100 or number == int(number):
        return f"{number:,.0f}"
    return f"{number:.{2 if abs(number) < 10 else 1}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are for numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(results: dict[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """Return the page of a run's results; `pictures` are files beside it, with their titles."""
    summary = Summary(results)
    parts = [_head(results), *[f"![{title}]({name})\n" for name, title in pictures]]
    if OURS in summary.candidates:
        parts += ["## What is asked for\n", _targets(summary)]
    parts += ["## Start and memory\n", _memory(summary)]
    for name, scenario in results["scenarios"].items():
        parts += [f"## {scenario['title']}\n", f"`{name}`: {_conditions(scenario)}.\n"]
        parts += [_scenario(summary, name, dialect) for dialect in summary.dialects]
    parts += ["## Candidates\n", *_candidates(results)]
    return "\n".join(parts)


def _head(results: dict[str, Any]) -> str:
    lines = [
        "# Results\n",
        "Made by `python -m bench render`; [what is measured, and how to read it](README.md).\n",
    ]
    if results["quick"]:
        lines.append("**A quick run: it shows that the harness works, and its numbers are worth nothing.**\n")
    lines.append(f"`{results['command']}`, begun {results['began']}, {results['rounds']} rounds.\n")
    lines.append(table(["machine", ""], results["machine"].items()))
    missing = ", ".join(f"{name} ({package})" for name, package in results["missing"].items())
    lines.append(f"Missing: {missing or 'none'}.\n")
    lines += [f"Fault in round {f['round'] + 1}, {f['candidate']}: {f['what']}\n" for f in results["faults"]]
    return "\n".join(lines)


def _title(summary: Summary, candidate: str) -> str:
    return str(summary.results["candidates"][candidate]["title"])


def _targets(summary: Summary) -> str:
    rows = []
    for target, dialect, value in checked(summary):
        reached = {True: "yes", False: "**no**", None: "not measured"}[target.reached(value)]
        bound = f"{'≥' if target.at_least else '≤'} {shown(target.bound)}{target.unit}"
        rows.append((target.what, dialect, bound, shown(value) + target.unit, reached))
    return table(["crabtwist, everything on", "endpoint", "bound", "measured", "reached"], rows)


def _memory(summary: Summary) -> str:
    rows = [
        (
            _title(summary, name),
            shown(summary.start_seconds(name)),
            shown(summary.start_resident_bytes(name) / MIB),
            shown(summary.most_resident_bytes(name) / MIB),
        )
        for name in summary.candidates
        if name != DIRECT
    ]
    return table(["", "start to serving, s", "resident then, MiB", "resident under load, at most, MiB"], rows)


def _conditions(scenario: dict[str, Any]) -> str:
    load, behavior = scenario["load"], scenario["behavior"]
    loop = "a closed loop"
    if load["period_us"]:
        loop = f"an open loop, {load['connections'] * 1e6 / load['period_us']:,.0f} beginnings a second"
    parts = [
        f"{load['connections']} connections",
        loop,
        f"request bodies of {scenario['prompt_bytes']:,} bytes",
    ]
    if behavior["stream"]:
        pace = (
            f"one each {behavior['interval_us'] / 1000:g} ms" if behavior["interval_us"] else "back to back"
        )
        parts.append(f"{behavior['events']:,} events, {pace}")
    return ", ".join(parts)


def _columns(scenario: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield each figure to be shown, its heading, and whether the direct baseline is taken away."""
    for figure in scenario["shows"]:
        is_added = bool(scenario["load"]["period_us"]) and figure.startswith(ADDED)
        heading = FIGURES[figure][0]
        if figure in _BYTES_EACH:
            heading = heading.replace("bytes", "KiB")
        yield figure, f"added {heading}" if is_added else heading, is_added


def _scenario(summary: Summary, name: str, dialect: str) -> str:
    columns = list(_columns(summary.results["scenarios"][name]))
    costs = [figure for figure, _, _ in columns if figure.startswith("cpu_us")]
    head = [dialect, *(heading for _, heading, _ in columns), *["CPU x nginx" for _ in costs]]
    rows = []
    for candidate in summary.candidates:
        cells = [
            _cell(summary, (name, dialect, candidate, figure), is_added) for figure, _, is_added in columns
        ]
        cells += [shown(summary.ratio(name, dialect, candidate, figure, LIMIT)) for figure in costs]
        rows.append([_title(summary, candidate), *cells])
    return table(head, rows)


def _cell(summary: Summary, where: tuple[str, str, str, str], is_added: bool) -> str:  # noqa: FBT001 - a column's
    _, _, candidate, figure = where
    if is_added and candidate != DIRECT:
        added = summary.added(*where)
        return shown(added) if math.isnan(added) else f"+{shown(added)}".replace("+-", "-")
    value = summary.value(*where)
    return shown(value / KIB if figure in _BYTES_EACH else value)


def _candidates(results: dict[str, Any]) -> Iterator[str]:
    for about in results["candidates"].values():
        yield f"### {about['title']} {about['version']}\n"
        yield f"{about['package']}. {about['note']}\n"
        if about.get("command"):
            words = [*(f"{name}={value}" for name, value in about["environ"].items()), *about["command"]]
            yield f"```\n{' '.join(words)}\n```\n"
        for name, text in about.get("files", {}).items():
            yield f"`{name}`\n\n```\n{text.strip()}\n```\n"
        headers = about.get("headers", {})
        for dialect, fields in headers.items():
            lines = "\n".join(f"{name}: {value}" for name, value in fields.items())
            yield f"Header fields for {dialect}:\n\n```\n{lines}\n```\n"
