"""
The command line: `python -m bench --help`.

A run takes both cores of a machine with two, so that nothing else should run on it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measurement import Pace
from bench.roster import CANDIDATES, QUICK
from bench.rounds import CHECKOUT, Plan, Run
from bench.scenarios import DIALECTS, SCENARIOS

RESULTS = CHECKOUT / "docs" / "benchmarks"
PLACE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crabtwist-bench"

_FULL = Pace(warm_up_seconds=1.0, seconds=4.0)
_QUICK = Pace(warm_up_seconds=0.2, seconds=0.5)


def options() -> argparse.ArgumentParser:
    """Return what the command line takes."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure, and write the results as JSON")
    run.add_argument("--quick", action="store_true", help="two minutes at most: does everything work?")
    run.add_argument("--only", type=_names, metavar="NAME,...", help="these candidates, `direct` with them")
    run.add_argument("--scenarios", type=_names, metavar="NAME,...", help="these scenarios")
    run.add_argument("--dialects", type=_names, default=DIALECTS, metavar="NAME,...", help="one endpoint's")
    run.add_argument("--rounds", type=int, help="how often all is measured (3; quick: 1)")
    run.add_argument(
        "--seconds", type=float, help=f"each time, at least ({_FULL.seconds:g}; quick: {_QUICK.seconds:g})"
    )
    run.add_argument("--output", type=Path, default=Path("bench-results.json"), help="where the results go")
    run.set_defaults(act=_run)
    render = commands.add_parser("render", help="make tables and pictures of results")
    render.add_argument("results", type=Path, help="what `run` wrote")
    render.add_argument("--output", type=Path, default=RESULTS, help="the folder (docs/benchmarks)")
    render.set_defaults(act=_render)
    install = commands.add_parser("install", help="install a candidate, with its own package manager")
    install.add_argument("name", choices=[candidate.name for candidate in CANDIDATES])
    install.set_defaults(act=_install)
    listed = commands.add_parser("list", help="say which candidates are there, and which scenarios")
    listed.set_defaults(act=_list)
    for command in (run, install, listed):
        command.add_argument(
            "--place", type=Path, default=PLACE, help=f"where candidates are installed ({PLACE})"
        )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask for; exits where a name is unknown."""
    wanted = arguments.only or (QUICK if arguments.quick else [candidate.name for candidate in CANDIDATES])
    _complain({*wanted} - {candidate.name for candidate in CANDIDATES}, "candidate")
    scenarios = [s for s in SCENARIOS if (s.name in arguments.scenarios if arguments.scenarios else True)]
    _complain({*(arguments.scenarios or ())} - {scenario.name for scenario in SCENARIOS}, "scenario")
    _complain({*arguments.dialects} - {*DIALECTS}, "dialect")
    pace = _QUICK if arguments.quick else _FULL
    if arguments.seconds:
        pace = Pace(warm_up_seconds=pace.warm_up_seconds, seconds=arguments.seconds)
    if arguments.quick:
        scenarios = [s.shortened() for s in scenarios if s.quick or arguments.scenarios]
    return Plan(
        candidates=[c for c in CANDIDATES if c.name in {"direct", *wanted}],
        scenarios=scenarios,
        dialects=arguments.dialects,
        rounds=arguments.rounds or (1 if arguments.quick else 3),
        pace=pace,
        place=arguments.place,
        quick=arguments.quick,
    )


def command_of(arguments: argparse.Namespace) -> str:
    """Return the command that does the same again, without the folders of this machine."""
    words = ["python -m bench run", *(["--quick"] if arguments.quick else [])]
    for name in ("only", "scenarios", "dialects"):
        value = getattr(arguments, name)
        if value and value is not DIALECTS:
            words.append(f"--{name} {','.join(value)}")
    words += [f"--{name} {value:g}" for name in ("rounds", "seconds") if (value := getattr(arguments, name))]
    return " ".join(words)


def _complain(unknown: set[str], what: str) -> None:
    if unknown:
        sys.exit(f"bench: no such {what}: {', '.join(sorted(unknown))}")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - for whoever typed the command


def _run(arguments: argparse.Namespace) -> None:
    try:
        run = Run(plan_of(arguments), command_of(arguments), _say)
    except RuntimeError as error:
        sys.exit(f"bench: {error}")
    try:
        run.run()
    finally:
        arguments.output.write_text(json.dumps(run.results, indent=1) + "\n")
        _say(f"{len(run.results['measurements'])} measurements in {arguments.output}")
    if run.results["faults"]:
        sys.exit(f"bench: {len(run.results['faults'])} faults")


def _render(arguments: argparse.Namespace) -> None:
    # Only this command needs matplotlib.
    from bench.pages import write_pages

    for path in write_pages(json.loads(arguments.results.read_text()), arguments.output):
        _say(str(path))


def _install(arguments: argparse.Namespace) -> None:
    [candidate] = [c for c in CANDIDATES if c.name == arguments.name]
    place = arguments.place / candidate.folder
    place.mkdir(parents=True, exist_ok=True)
    try:
        candidate.install(place)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench: {candidate.title} could not be installed: {error}")
    _say(f"{candidate.title} {candidate.version(place)}")


def _list(arguments: argparse.Namespace) -> None:
    for candidate in CANDIDATES:
        version = candidate.version(arguments.place / candidate.folder) or f"missing ({candidate.package})"
        _say(f"{candidate.name:12} {candidate.title}: {version}")
    for scenario in SCENARIOS:
        _say(f"{scenario.name:18} {scenario.title}")


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = options().parse_args(words)
    arguments.act(arguments)


if __name__ == "__main__":
    main()
