"""How answers look: tables for people, plain where they are piped, and JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs
import click

#: Stands where there is nothing to show.
NOTHING = "-"

#: Wide enough that nothing is cut or wrapped where no terminal sets a width.
_PIPED_COLUMNS = 100_000


@attrs.frozen
class Grid:
    """A table: heads, and rows with a text for each; `right` are the heads of columns with numbers."""

    heads: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: frozenset[str] = frozenset()
    empty: str = "There are none."


def show_json(content: object) -> None:
    """Print a JSON document."""
    click.echo(json.dumps(content, indent=2))


def show_json_line(content: object) -> None:
    """Print a JSON document in one line, at once."""
    click.echo(json.dumps(content))


def show_grid(grid: Grid) -> None:
    """Print a table, or in words that it is empty."""
    if not grid.rows:
        click.echo(grid.empty)
        return
    from rich.console import Console

    table = _rich_table(grid)
    if sys.stdout.isatty():
        # A table that is too wide is left to the terminal to wrap: an id that is cut cannot be copied.
        needed = Console(width=_PIPED_COLUMNS).measure(table).maximum
        width = max(needed, Console().width)
        Console(highlight=False, width=width).print(table)
        return
    console = Console(highlight=False, width=_PIPED_COLUMNS, color_system=None)
    with console.capture() as capture:
        console.print(table)
    # The last column is filled up with spaces, too.
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


def _rich_table(grid: Grid) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in grid.heads:
        table.add_column(head, justify="right" if head in grid.right else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names with what they are, one in a line; those that are nothing are left out."""
    known = [(name, text) for name, text in pairs if text not in ("", NOTHING)]
    width = max((len(name) for name, _ in known), default=0)
    for name, text in known:
        click.echo(f"{name.ljust(width)}  {plain(text)}")


# --- texts -------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a text without what would steer a terminal: clients make up the names of models."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def or_nothing(value: object) -> str:
    """Return a value as a text, `NOTHING` for None."""
    return NOTHING if value is None else str(value)


def dollars(text: object, *, estimated: bool = False) -> str:
    """Return exact dollars as people read them; None is a price that nobody knows."""
    if text is None:
        return NOTHING
    amount = str(text)
    sign = "-" if amount.startswith("-") else ""
    return f"{'~' if estimated else ''}{sign}${amount.removeprefix('-')}"


def when(text: object) -> str:
    """Return a moment of RFC 3339 to the second, in UTC."""
    moment = moment_of(text)
    try:
        return or_nothing(text) if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    except OverflowError:
        # The first or the last day there is, in a zone where it is another in UTC.
        return str(text)


def moment_of(text: object) -> datetime | None:
    """Return a moment of RFC 3339 as a value, None for anything else."""
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def listed(words: Iterable[object]) -> str:
    """Return words with commas between them, `NOTHING` for none."""
    return ", ".join(map(str, words)) or NOTHING
