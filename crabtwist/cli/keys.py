"""`crabtwist keys`: who may use the gateway, for what, and how much of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click

from crabtwist.cli.faults import Fault, Misused
from crabtwist.cli.session import Session, common, in_session, options
from crabtwist.cli.words import AHEAD, DOLLARS, PAIR, SPAN, joined, nulls

EVERY_MODEL = "*"
LIMITS = ("requests_per_minute", "input_tokens_per_minute", "output_tokens_per_minute", "concurrent_requests")
#: As `crabtwist.web` has it where nobody says.
OVERLAP = "24h"

_COUNT = click.IntRange(min=1)


#: The options that say a key's terms.
_terms = options(
    click.option("--model", "-m", "models", multiple=True, help="A model or alias it may use; repeatable."),
    click.option("--requests-per-minute", type=_COUNT, metavar="N", help="Needs [extensions.rate_limit]."),
    click.option("--input-tokens-per-minute", type=_COUNT, metavar="N"),
    click.option("--output-tokens-per-minute", type=_COUNT, metavar="N"),
    click.option("--concurrent-requests", type=_COUNT, metavar="N"),
    click.option("--dollars", type=DOLLARS, help="What it may spend; needs [extensions.budget]."),
    click.option(
        "--per",
        type=click.Choice(["total", "day", "month"]),
        help="In which time; else as for all, by the month if nothing is said.",
    ),
    click.option("--time-zone", help="By whose clocks a day or month begins, as Europe/Berlin."),
    click.option(
        "--expires", "expires_at", type=AHEAD, help="From then on it opens nothing: 30d, or a moment."
    ),
    click.option("--disabled/--enabled", default=None, help="Whether it opens nothing for now."),
    click.option("--metadata", type=PAIR, multiple=True, help="For people, as team=a; repeatable."),
)


def _table(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given as the API's table of terms."""
    said = {name: value for name, value in given.items() if value not in (None, ())}
    table: dict[str, Any] = {name: said[name] for name in ("expires_at", "disabled") if name in said}
    if "models" in said:
        table["models"] = list(said["models"])
    limits = {name: said[name] for name in LIMITS if name in said}
    budget = {name: said[name] for name in ("dollars", "per", "time_zone") if name in said}
    metadata = dict(said.get("metadata", ()))
    tables = {"limits": limits, "budget": budget, "metadata": metadata}
    return table | {name: members for name, members in tables.items() if members}


@click.group()
@common
def keys() -> None:
    """Virtual keys: who may use the gateway, for what, and how much of it."""


@keys.command("list")
@in_session
def list_keys(session: Session) -> None:
    """List all keys."""
    session.show(session.client.get("keys"), lambda answer: _show_all(answer["keys"]))


@keys.command("get")
@click.argument("name")
@in_session
def get_key(session: Session, /, name: str) -> None:
    """Show one key."""
    session.show(session.client.get("keys", name), _show)


@keys.command("create")
@click.argument("name")
@_terms
@in_session
def create_key(session: Session, /, name: str, **terms: Any) -> None:
    """
    Make a key, and print its secret: once, now.

    Without --model it may use every model, without --dollars and the limits what the configuration says
    for all keys.
    """
    made = session.client.post("keys", body={"name": name, **_table(terms)})
    session.show(made, lambda key: _show_secret(session, key, f"The key {name} was made."))


@keys.command("update")
@click.argument("name")
@_terms
@click.option(
    "--remove", multiple=True, metavar="PATH", help="What to unset, as limits.requests_per_minute or budget."
)
@in_session
def update_key(session: Session, /, name: str, *, remove: tuple[str, ...], **terms: Any) -> None:
    """Change a key's terms; what is not named stays as it is."""
    patch = joined(nulls(remove), _table(terms))
    if not patch:
        raise Misused("nothing to change: name a term, or --remove one")
    session.show(session.client.patch("keys", name, body=patch), _show)


@keys.command("rotate")
@click.argument("name")
@click.option(
    "--overlap", type=SPAN, default=OVERLAP, show_default=True, help="How long the old secret goes on; or 0."
)
@in_session
def rotate_key(session: Session, /, name: str, *, overlap: float) -> None:
    """Give a key a new secret, and print it: once, now."""
    rotated = session.client.post("keys", name, "rotate", body={"overlap_seconds": overlap})
    session.show(rotated, lambda key: _show_secret(session, key, _rotated(key)))


@keys.command("delete")
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@in_session
def delete_key(session: Session, /, name: str, *, yes: bool) -> None:
    """Delete a key; it stops at once."""
    session.confirm(f"Delete the key {name}? It stops at once, and cannot be had back.", sure=yes)
    session.client.delete("keys", name)
    session.show({"deleted": name}, lambda _: click.echo(f"The key {name} was deleted."))


# --- how keys look -----------------------------------------------------------------------------------


def _show_all(keys: list[dict[str, Any]]) -> None:
    from crabtwist.cli.shown import Grid, show_grid

    heads = ("NAME", "SOURCE", "MODELS", "LIMITS", "BUDGET", "EXPIRES", "STATE", "SECRET")
    empty = "There are no keys. Make one: crabtwist keys create NAME"
    show_grid(Grid(heads, [_row(key) for key in keys], empty=empty))


def _row(key: Mapping[str, Any]) -> tuple[str, ...]:
    from crabtwist.cli.shown import listed, or_nothing, when

    expires = key.get("expires_at")
    return (
        key["name"],
        or_nothing(key.get("source")),
        _models(key),
        limits_text(key.get("limits")),
        budget_text(key.get("budget")),
        "never" if expires is None else when(expires),
        "disabled" if key.get("disabled") else "enabled",
        listed(f"...{secret['hint']}" for secret in key.get("secrets") or ()),
    )


def _show(key: Mapping[str, Any]) -> None:
    from crabtwist.cli.shown import listed, show_pairs, when

    heads = ("name", "source", "models", "limits", "budget", "expires", "state")
    secrets = [
        f"...{each['hint']}" + (f" until {when(each['until'])}" if each.get("until") else "")
        for each in key.get("secrets") or ()
    ]
    metadata = [f"{name}={text}" for name, text in (key.get("metadata") or {}).items()]
    made = when(key["created_at"]) if key.get("created_at") else ""
    more = [("made", made), ("metadata", listed(metadata)), ("secrets", listed(secrets))]
    show_pairs([*zip(heads, _row(key), strict=False), *more])


def _show_secret(session: Session, key: Mapping[str, Any], words: str) -> None:
    """Print a key with its secret, and how to use it."""
    from crabtwist.cli.environment import SHELLS, claude_code, openai

    url, secret, bash = session.place.url, key["secret"], SHELLS["bash"]
    claude = "\n  ".join(bash.lines(claude_code(url, secret, session.environ)))
    clients = "\n  ".join(bash.lines(openai(url, secret)))
    click.echo(f"{words} The secret is shown only now:\n\n  {secret}\n")
    click.echo(f"Claude Code:\n\n  {claude}\n  claude{_model_option(session, key)}\n")
    click.echo(f"OpenAI's clients:\n\n  {clients}\n")
    click.echo(f"What it asks for: crabtwist logs --follow --key {key['name']}")


def _model_option(session: Session, key: Mapping[str, Any]) -> str:
    """Return what to tell Claude Code of models, "" where those that it asks for by itself are served."""
    names = [name for name in key["models"] if name != EVERY_MODEL]
    if not names:
        # The secret is shown already, and must not be lost by this.
        with suppress(Fault, KeyError, TypeError):
            names = [model["name"] for model in session.client.get("models")["models"]]
    if not names or any("claude" in name for name in names):
        return ""
    return f" --model {shlex.quote(names[0])}"


def _rotated(key: Mapping[str, Any]) -> str:
    from crabtwist.cli.shown import when

    untils = [each["until"] for each in key.get("secrets") or () if each.get("until")]
    old = f"goes on until {when(untils[0])}" if untils else "has stopped"
    return f"The key {key['name']} has a new secret; the old one {old}."


def _models(key: Mapping[str, Any]) -> str:
    from crabtwist.cli.shown import listed

    models = key.get("models") or ()
    return "all" if EVERY_MODEL in models else listed(models)


def limits_text(limits: Mapping[str, Any] | None) -> str:
    """Return limits in short: "10 requests/min"."""
    from crabtwist.cli.shown import listed

    known = {name: number for name, number in (limits or {}).items() if number is not None}
    return listed(f"{number} {_limit_words(name)}" for name, number in known.items())


def _limit_words(name: str) -> str:
    return name.replace("_per_minute", "/min").replace("concurrent_requests", "at once").replace("_", " ")


def budget_text(budget: Mapping[str, Any] | None) -> str:
    """Return a budget in short: "$1/month"."""
    if not budget:
        return "-"
    amount = budget.get("dollars")
    said = "as for all" if amount is None else f"${amount}".removesuffix(".0")
    per = f"/{budget['per']}" if budget.get("per") else ""
    zone = f" ({budget['time_zone']})" if budget.get("time_zone") else ""
    return said + per + zone
