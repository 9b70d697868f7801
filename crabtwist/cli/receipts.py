"""One request and its receipt: the arithmetic of what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from crabtwist.cli.request_lines import request_row, seconds_text, status_text, tokens_text
from crabtwist.cli.shown import Grid, dollars, listed, show_grid, show_pairs, when


def show_receipt(record: Mapping[str, Any]) -> None:
    """Print a request, its attempts and its receipt."""
    show_pairs(_head(record))
    attempts = record.get("attempts") or ()
    if attempts:
        click.echo()
        show_grid(Grid(("ATTEMPT AT", "MODEL", "STATUS", "ERROR", "SECONDS"), [*map(_attempt, attempts)]))
    click.echo()
    _show_lines(record.get("receipt") or {}, estimated=bool(record.get("estimated")))


def _head(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    _, key, model, provider, *_ = request_row(record)
    asked = record.get("model_asked") or ""
    return [
        ("id", str(record["id"])),
        ("time", when(record["accepted_at"])),
        ("key", key),
        ("asked for", record.get("operation") or ""),
        ("model", model if asked in ("", model) else f"{model} (asked as {asked})"),
        ("answered", record.get("model_answered") or ""),
        ("provider", provider),
        ("status", status_text(record)),
        ("message", record.get("message") or ""),
        ("tokens", tokens_text(record.get("usage"))),
        ("seconds", seconds_text(record)),
        ("bytes", f"{record.get('bytes_in', 0)} in, {record.get('bytes_out', 0)} out"),
    ]


def _attempt(attempt: Mapping[str, Any]) -> list[str]:
    seconds = attempt.get("duration_seconds")
    return [
        str(attempt.get("provider") or "-"),
        str(attempt.get("model") or "-"),
        str(attempt.get("status") or "-"),
        str(attempt.get("error") or "-"),
        "-" if seconds is None else f"{seconds:.3f}",
    ]


def _show_lines(receipt: Mapping[str, Any], *, estimated: bool) -> None:
    lines = receipt.get("lines") or ()
    if lines:
        heads = ("MODEL", "WHAT", "COUNT", "PRICE OF ONE", "AMOUNT")
        show_grid(Grid(heads, [*map(_line, lines)], frozenset(heads[2:])))
        click.echo()
    total = receipt.get("total_dollars")
    words = "Total" if not estimated else "Total, by estimate, for nobody counted"
    click.echo(f"{words}: {'nothing is known of its cost' if total is None else dollars(total)}")
    if receipt.get("unpriced"):
        click.echo(f"Not in it, for nobody knows the price: {listed(receipt['unpriced'])}")


def _line(line: Mapping[str, Any]) -> list[str]:
    amounts = [dollars(line["price_dollars"]), dollars(line["amount_dollars"])]
    return [line["model"], line["what"], str(line["count"]), *amounts]
