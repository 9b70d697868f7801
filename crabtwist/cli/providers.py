"""`crabtwist providers`: the upstreams that the gateway asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from crabtwist.cli.faults import Misused
from crabtwist.cli.session import Session, common, in_session, options
from crabtwist.cli.words import PAIR, joined, nulls, value_of

#: The options that say a provider's settings.
_settings = options(
    click.option("--model", "-m", "models", multiple=True, help="NAME or NAME=UPSTREAM; repeatable."),
    click.option("--set", "values", type=PAIR, multiple=True, help="A setting, as weight=2; repeatable."),
    click.option(
        "--set-from",
        "variables",
        type=PAIR,
        multiple=True,
        metavar="NAME=VARIABLE",
        help="A setting whose value is in the environment, as api_key=OPENAI_API_KEY; repeatable."
        " What stands on a command line is visible to others on this machine.",
    ),
    click.option("--probe", is_flag=True, help="Ask the upstream now whether it can be used."),
)


def _table(
    session: Session,
    models: tuple[str, ...],
    values: tuple[tuple[str, str], ...],
    variables: tuple[tuple[str, str], ...],
) -> dict[str, Any]:
    """Return the options that were given as the API's table."""
    table: dict[str, Any] = {name: value_of(text) for name, text in values}
    for name, variable in variables:
        if not session.environ.get(variable):
            raise Misused(f"--set-from {name}={variable}: the environment has no {variable}")
        table[name] = session.environ[variable]
    if models:
        table["models"] = [_model(text) for text in models]
    return table


def _model(text: str) -> dict[str, str] | str:
    name, separator, upstream = text.partition("=")
    return {"name": name, "upstream": upstream} if separator else name


@click.group()
@common
def providers() -> None:
    """Providers: the upstreams that the gateway asks."""


@providers.command("list")
@in_session
def list_providers(session: Session) -> None:
    """List all providers."""
    session.show(session.client.get("providers"), lambda answer: _show_all(answer["providers"]))


@providers.command("get")
@click.argument("name")
@in_session
def get_provider(session: Session, /, name: str) -> None:
    """Show one provider, its credentials masked."""
    session.show(session.client.get("providers", name), _show)


@providers.command("models")
@click.argument("name")
@in_session
def list_models(session: Session, /, name: str) -> None:
    """Ask a provider's upstream which models it has."""
    answer = session.client.get("providers", name, "models")
    session.show(answer, lambda said: click.echo("\n".join(said["models"]) or "It has none."))


@providers.command("create")
@click.argument("name")
@click.option("--kind", required=True, help="What it is: anthropic, openai, echo, or a plugin's word.")
@_settings
@in_session
def create_provider(
    session: Session,
    /,
    name: str,
    *,
    kind: str,
    models: tuple[str, ...],
    values: tuple[tuple[str, str], ...],
    variables: tuple[tuple[str, str], ...],
    probe: bool,
) -> None:
    """
    Make a provider, to be used at once.

    Without --model it serves all models that the upstream lists.
    """
    body = {"name": name, "kind": kind, **_table(session, models, values, variables)}
    made = session.client.post("providers", body=body, probe="true" if probe else None)
    session.show(made, _show)


@providers.command("update")
@click.argument("name")
@_settings
@click.option("--remove", multiple=True, metavar="NAME", help="A setting to unset; repeatable.")
@in_session
def update_provider(
    session: Session,
    /,
    name: str,
    *,
    models: tuple[str, ...],
    values: tuple[tuple[str, str], ...],
    variables: tuple[tuple[str, str], ...],
    probe: bool,
    remove: tuple[str, ...],
) -> None:
    """Change a provider's settings; what is not named stays as it is."""
    patch = joined(nulls(remove), _table(session, models, values, variables))
    if not (patch or probe):
        raise Misused("nothing to change: name a setting, or --remove one")
    changed = session.client.patch("providers", name, body=patch, probe="true" if probe else None)
    session.show(changed, _show)


@providers.command("delete")
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@in_session
def delete_provider(session: Session, /, name: str, *, yes: bool) -> None:
    """Delete a provider; what it is answering goes on to its end."""
    session.confirm(f"Delete the provider {name}?", sure=yes)
    session.client.delete("providers", name)
    session.show({"deleted": name}, lambda _: click.echo(f"The provider {name} was deleted."))


# --- how providers look ------------------------------------------------------------------------------


def _show_all(providers: list[dict[str, Any]]) -> None:
    from crabtwist.cli.shown import Grid, listed, show_grid

    rows = [
        (each["name"], each["source"], each["kind"], listed(_served(each["settings"]))) for each in providers
    ]
    show_grid(Grid(("NAME", "SOURCE", "KIND", "MODELS"), rows))


def _show(provider: Mapping[str, Any]) -> None:
    from crabtwist.cli.shown import listed, show_pairs

    settings = provider["settings"]
    rest = [(name, str(value)) for name, value in settings.items() if name not in ("kind", "models")]
    head = [(name, provider[name]) for name in ("name", "source", "kind")]
    show_pairs([*head, ("models", listed(_served(settings))), *rest])


def _served(settings: Mapping[str, Any]) -> list[str]:
    return [_model_text(model) for model in settings.get("models") or ()]


def _model_text(model: Any) -> str:
    if not isinstance(model, dict):
        return str(model)
    name, upstream = model["name"], model.get("upstream")
    return name if upstream in (None, name) else f"{name} ({upstream})"
