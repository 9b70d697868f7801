"""What one run of the command knows, and the options that all commands have."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import click

from crabtwist.cli.faults import Fault

F = TypeVar("F", bound=Callable[..., Any])


class Session:
    """The common options of one run, wherever on the line they stood, and whom to ask by them."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.url: str | None = None
        self.token: str | None = None
        self.config: str | None = None
        self.as_json = False
        self.environ = environ

    @cached_property
    def place(self) -> Any:
        """The `crabtwist.cli.place.Place` of the gateway; raises `Fault`."""
        from crabtwist.cli.place import LocalFile, find_place

        return find_place(self.url, self.token, LocalFile(self.config, self.environ), self.environ)

    @cached_property
    def client(self) -> Any:
        """The `crabtwist.cli.client.Client` that asks there."""
        from crabtwist.cli.client import Client

        return Client(self.place)

    def show(self, answer: object, show: Callable[[Any], object]) -> None:
        """Print an answer: as it is for programs, or by `show` for people."""
        from crabtwist.cli.shown import show_json

        try:
            (show_json if self.as_json else show)(answer)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            words = f"the gateway's answer is not understood ({error!r}); is it of another version?"
            raise Fault(words, slug="answer_not_understood") from error

    def confirm(self, question: str, *, sure: bool) -> None:
        """Ask whoever sits at a terminal; scripts are not asked."""
        if not sure and not self.as_json and sys.stdin.isatty():
            click.confirm(question, abort=True, err=True)


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value:
        setattr(context.ensure_object(Session), str(parameter.name), value)


def options(*several: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return what gives a command several options, which its help lists in this order."""

    def give(command: F) -> F:
        for option in reversed(several):
            command = option(command)
        return command

    return give


_KEPT: Any = {"expose_value": False, "callback": _keep}

#: Gives a command, or a group of them, the options that all have.
common = options(
    click.option(
        "--url",
        metavar="URL",
        **_KEPT,
        help="Where the gateway is; else CRABTWIST_URL, else `listen` of the configuration file.",
    ),
    click.option(
        "--token",
        metavar="TOKEN",
        **_KEPT,
        help="The admin token; else CRABTWIST_ADMIN_TOKEN, else `admin_token` of the configuration file."
        " What stands on a command line is visible to others on this machine: better use the variable.",
    ),
    click.option(
        "--config",
        "-c",
        metavar="FILE",
        **_KEPT,
        help="The configuration file, ./crabtwist.toml if it is there.",
    ),
    click.option("--json", "as_json", is_flag=True, **_KEPT, help="Print JSON, errors too (on stderr)."),
)

_pass_session = click.make_pass_decorator(Session, ensure=True)


def in_session(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that all have, and the run's `Session` as its first argument."""
    return common(_pass_session(command))
