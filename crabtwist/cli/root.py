"""The command `crabtwist`: its parts, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from crabtwist.cli.doctor import doctor
from crabtwist.cli.environment import env
from crabtwist.cli.faults import INTERRUPTED, tell
from crabtwist.cli.keys import keys
from crabtwist.cli.logs import logs
from crabtwist.cli.providers import providers
from crabtwist.cli.serving import cache, models, plugins
from crabtwist.cli.session import common
from crabtwist.cli.spending import show_budget, show_usage

_EPILOG = (
    "Exit status: 0 fine; 1 refused by the gateway, or something is wrong; 2 the command was not put together"
    " rightly; 3 no gateway answers; 4 not allowed."
)


class Root(click.Group):
    """Says every error on stderr, as JSON if so asked, and ends with a status that scripts can use."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> NoReturn:
        """Run, and end the process (by SystemExit)."""
        words = list(sys.argv[1:] if args is None else args)
        more["standalone_mode"] = False
        try:
            status = super().main(words, *rest, **more)
        except click.ClickException as error:
            tell(error, as_json="--json" in words)
            status = error.exit_code
        except click.Abort:
            status = INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)


def _version(context: click.Context, _parameter: click.Parameter, value: object) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"crabtwist {version('crabtwist')}")
        except PackageNotFoundError:
            click.echo("crabtwist, of a version that is unknown: it was not installed")
        context.exit()


@click.group(cls=Root, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
@common
def main() -> None:
    """
    Run and watch a crabtwist gateway, through its admin API.

    `twistd -n crabtwist` starts one; its first start writes crabtwist.toml.
    """


for _command in (keys, providers, show_usage, show_budget, logs, cache, models, plugins, env, doctor):
    main.add_command(_command)
