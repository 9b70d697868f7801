"""`crabtwist models`, `crabtwist plugins` and `crabtwist cache`: what is served, by what, and kept."""

from __future__ import annotations

from typing import Any

import click

from crabtwist.cli.session import Session, common, in_session


@click.command("models")
@in_session
def models(session: Session) -> None:
    """Show the models that are served, by whom, and their other names."""
    session.show(session.client.get("models"), _show_models)


def _show_models(answer: dict[str, Any]) -> None:
    from crabtwist.cli.shown import Grid, show_grid, when

    rows = [
        [
            model["name"],
            each["provider"],
            each["upstream_model"],
            str(each["weight"]),
            f"cooling until {when(each['cooling_until'])}" if each.get("cooling_until") else "usable",
        ]
        for model in answer["models"]
        for each in model["deployments"]
    ]
    show_grid(Grid(("MODEL", "PROVIDER", "MODEL THERE", "WEIGHT", "STATE"), rows, frozenset({"WEIGHT"})))
    if answer["aliases"]:
        click.echo()
        show_grid(Grid(("ALIAS", "MODEL"), sorted(answer["aliases"].items())))


@click.command("plugins")
@in_session
def plugins(session: Session) -> None:
    """Show the plugins that the gateway found, and those that it could not load."""
    session.show(session.client.get("plugins"), _show_plugins)


def _show_plugins(answer: dict[str, Any]) -> None:
    from crabtwist.cli.shown import Grid, show_grid

    rows = [
        [sort.removesuffix("s"), each["name"], each["module"] or "-", each["path"] or "-"]
        for sort, makers in answer.items()
        if sort != "failed"
        for each in makers
    ]
    show_grid(Grid(("SORT", "NAME", "DROP-IN", "MAKES"), rows))
    failed = answer.get("failed") or {}
    if failed:
        click.echo()
        show_grid(Grid(("COULD NOT BE LOADED", "WHY"), [*failed.items()]))


@click.group("cache")
@common
def cache() -> None:
    """The cache of answers."""


@cache.command("clear")
@in_session
def clear_cache(session: Session) -> None:
    """Forget all answers that this node keeps."""
    answer = session.client.post("cache", "clear")
    session.show(answer, lambda said: click.echo(f"{said['cleared']} answers were forgotten."))
