"""`crabtwist usage` and `crabtwist budget`: what was used, and how much may be."""

from __future__ import annotations

from typing import Any

import click

from crabtwist.cli.faults import Fault
from crabtwist.cli.session import Session, in_session
from crabtwist.cli.words import DAY

GROUPS = ("principal", "model", "provider", "day")
#: What people call the principal.
KEY = "key"

_NUMBERS = ("REQUESTS", "INPUT", "CACHED", "OUTPUT", "COST", "UNPRICED")


def _groups(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    words = ["principal" if word == KEY else word for word in value.split(",") if word]
    if set(words) - set(GROUPS):
        raise click.BadParameter("has to be some of key, model, provider and day, with commas between them")
    return ",".join(words)


@click.command("usage")
@click.option(
    "--by", default=KEY, show_default=True, callback=_groups, help="Any of key, model, provider, day; or ''."
)
@click.option("--since", type=DAY, help="From this day on: 2026-11-30, today, or 7d.")
@click.option("--until", type=DAY, help="Before this day.")
@in_session
def show_usage(session: Session, /, *, by: str, since: str | None, until: str | None) -> None:
    """Show requests, tokens and cost, from the ledger."""
    answer = session.client.get("usage", by=by or None, since=since, until=until)
    session.show(answer, lambda said: _show_totals(by.split(",") if by else [], said["totals"]))


def _show_totals(by: list[str], totals: list[dict[str, Any]]) -> None:
    from crabtwist.cli.shown import Grid, show_grid

    heads = ["KEY" if group == "principal" else group.upper() for group in by]
    rows = [[_name(total.get(group)) for group in by] + _numbers(total) for total in totals]
    empty = "Nothing was used."
    show_grid(Grid((*heads, *_NUMBERS), rows, frozenset(_NUMBERS), empty))


def _name(value: object) -> str:
    return str(value or "(none)")


def _numbers(total: dict[str, Any]) -> list[str]:
    from crabtwist.cli.shown import dollars

    cached = sum(
        total.get(name, 0) for name in ("cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens")
    )
    output = total.get("output_tokens", 0) + total.get("reasoning_tokens", 0)
    counts = (total["requests"], total.get("input_tokens", 0), cached, output)
    return [*map(str, counts), dollars(total["cost_dollars"]), str(total.get("unpriced", 0))]


@click.command("budget")
@click.argument("key", required=False)
@in_session
def show_budget(session: Session, /, key: str | None) -> None:
    """Show how budgets stand: of all keys that have one, or of one key."""
    answer = session.client.get("budgets")
    if key is not None:
        found = [each for each in answer["budgets"] if each["principal"] == key]
        if not found:
            words = f"nothing is known of a budget of {key!r}: it has none, or has not asked for anything yet"
            raise Fault(words, slug="budget_not_found")
        answer = {"budgets": found}
    session.show(answer, lambda said: _show_budgets(said["budgets"]))


def _show_budgets(budgets: list[dict[str, Any]]) -> None:
    from crabtwist.cli.shown import Grid, show_grid

    heads = ("KEY", "PERIOD", "BUDGET", "SPENT", "RESERVED", "LEFT", "ENDS")
    empty = (
        "No key has a budget, or none has used it. Keys have one with --dollars, or by [extensions.budget]."
    )
    rows = [_budget_row(each) for each in budgets]
    show_grid(Grid(heads, rows, frozenset(heads[2:6]), empty))


def _budget_row(budget: dict[str, Any]) -> list[str]:
    from crabtwist.cli.shown import dollars, when

    amounts = [dollars(budget[f"{name}_dollars"]) for name in ("budget", "spent", "reserved", "left")]
    ends = "never" if budget.get("ends_at") is None else when(budget["ends_at"])
    return [budget["principal"], budget.get("label") or budget["per"], *amounts, ends]
