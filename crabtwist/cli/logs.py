"""`crabtwist logs`: the requests that were made, as they end or long after, and their receipts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from crabtwist.cli.faults import INTERRUPTED, Misused, Unreachable
from crabtwist.cli.session import Session, in_session
from crabtwist.cli.words import BACK

#: The most that the API gives at once.
PAGE = 1000
DEFAULT_LIMIT = 50


@click.command("logs")
@click.argument("words", nargs=-1, metavar="[[get] ID]")
@click.option("--key", "principal", help="Only this key's.")
@click.option("--model", help="Only for this model.")
@click.option("--provider", help="Only of this provider.")
@click.option("--reason", help="Only what ended like this: complete, refused, client_left ...")
@click.option("--since", type=BACK, help="From this moment on: 2h, 7d, 2026-11-30, 2026-11-30T18:00:00Z.")
@click.option("--until", type=BACK, help="Before this moment.")
@click.option(
    "--limit", "-n", type=click.IntRange(min=1), default=DEFAULT_LIMIT, show_default=True, help="How many."
)
@click.option("--follow", "-f", is_flag=True, help="Show requests as they end, until Ctrl-C.")
@in_session
def logs(session: Session, /, *, words: tuple[str, ...], limit: int, follow: bool, **filters: Any) -> None:
    """
    Show the latest requests, newest first; or one, with its receipt.

    \b
        crabtwist logs --key alice --since 1h
        crabtwist logs --follow
        crabtwist logs ID
    """
    if words:
        record = session.client.get("requests", _id(words, follow=follow, filters=filters))
        session.show(record, _show_one)
    elif follow:
        _follow(session, filters)
    else:
        session.show(_page(session, limit, filters), lambda page: _show_page(page["requests"]))


def _id(words: tuple[str, ...], *, follow: bool, filters: dict[str, Any]) -> str:
    request_id = words[-1]
    if len(words) > 2 or (len(words) == 2 and words[0] != "get") or words == ("get",):
        raise Misused("give one ID: `crabtwist logs ID`, or `crabtwist logs get ID`")
    if follow or any(filters.values()):
        raise Misused("one request's receipt takes no filters and no --follow")
    return request_id


def _page(session: Session, limit: int, filters: dict[str, Any]) -> dict[str, Any]:
    """Return the newest `limit` requests, in as many pages as it takes, as one."""
    found: list[Any] = []
    before = None
    while True:
        wanted = min(PAGE, limit - len(found))
        page = session.client.get("requests", **filters, before=before, limit=wanted)
        found += page["requests"]
        before = page.get("next")
        if before is None or len(found) >= limit or not page["requests"]:
            return {"requests": found, "next": before}


# --- following ---------------------------------------------------------------------------------------


def _follow(session: Session, filters: dict[str, Any]) -> None:
    """Show requests until somebody has seen enough; raises `Fault` when the stream ends before that."""
    from crabtwist.cli.request_lines import head_line, request_line
    from crabtwist.cli.shown import show_json_line

    try:
        events = session.client.follow("requests", "follow", **filters)
        if not session.as_json:
            click.echo(f"Following {session.place.url}; Ctrl-C ends it.", err=True)
            click.echo(head_line())
        for request in _requests(events):
            if session.as_json:
                show_json_line(request)
            else:
                click.echo(request_line(request))
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None
    raise Unreachable("the gateway ended the stream; is it stopping?", slug="stream_ended")


def _requests(events: Iterator[Any]) -> Iterator[Any]:
    for event in events:
        if event.name == "request":
            yield json.loads(event.text)
        else:
            raise Unreachable(_last_words(event.text), slug="stream_ended")


def _last_words(text: str) -> str:
    """Return what the last event of a stream says, however it says it."""
    try:
        said = json.loads(text)
    except ValueError:
        return text
    error = said.get("error", said) if isinstance(said, dict) else said
    return str(error.get("message", text)) if isinstance(error, dict) else text


# --- how requests look -------------------------------------------------------------------------------


def _show_page(requests: list[dict[str, Any]]) -> None:
    from crabtwist.cli.request_lines import HEADS, NUMBERS, request_row
    from crabtwist.cli.shown import Grid, show_grid

    rows = [[*request_row(request), request["id"]] for request in requests]
    show_grid(Grid((*HEADS, "ID"), rows, NUMBERS, "No requests."))


def _show_one(record: dict[str, Any]) -> None:
    from crabtwist.cli.receipts import show_receipt

    show_receipt(record)
