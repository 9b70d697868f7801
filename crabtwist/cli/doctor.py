"""`crabtwist doctor`: what is wrong, why that matters, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crabtwist.cli.faults import Fault
from crabtwist.cli.session import Session, in_session

_MARKS = {"fine": "ok      ", "warning": "warning ", "problem": "PROBLEM "}
_COLOURS = {"fine": "green", "warning": "yellow", "problem": "red"}


@click.command()
@in_session
def doctor(session: Session) -> None:
    """
    Look for what is wrong, and say what to do.

    Looks at the configuration and its folder, the plugins and their cache, and the gateway if it runs: its
    clock, its stores, and whether its upstreams answer. Stores are opened from here only if it does not
    run. The exit status is 1 if something is wrong; warnings are fine.
    """
    findings = _look(session)
    wrong = any(finding.level == "problem" for finding in findings)
    content = {"ok": not wrong, "findings": [_described(finding) for finding in findings]}
    session.show(content, lambda _: _show(findings))
    if wrong:
        raise click.exceptions.Exit(1)


def _look(session: Session) -> list[Any]:
    from crabtwist.cli.folder_checks import look_at_folder
    from crabtwist.cli.place import CONFIGURATION
    from crabtwist.cli.plugin_checks import look_at_plugins

    _hush()
    path = Path(session.config or CONFIGURATION)
    plugins, makers = look_at_plugins()
    looked = look_at_folder(path, session.environ, makers)
    running, answers = _look_there(session)
    stores = [] if answers or looked.config is None else _stores(path.absolute().parent, looked.config)
    return [*looked.findings, *plugins, *stores, *running]


def _look_there(session: Session) -> tuple[list[Any], bool]:
    """Return what is to say of the gateway, and whether one answers."""
    from crabtwist.cli.findings import problem
    from crabtwist.cli.gateway_checks import look_at_gateway

    try:
        return [*look_at_gateway(session.client)], True
    except Fault as fault:
        why = "What a running gateway could tell was not looked at."
        return [problem(fault.message, why, "Start it, or say where it is.")], False


def _stores(folder: Path, config: Any) -> list[Any]:
    """Open and close the stores, in a reactor that runs no longer than that."""
    from contextlib import suppress

    from twisted.internet.task import react

    from crabtwist.cli.folder_checks import look_at_stores

    found: list[Any] = []

    async def look(reactor: Any) -> None:
        found.extend(await look_at_stores(folder, config, reactor))

    with suppress(SystemExit):
        react(look)
    return found


def _hush() -> None:
    """Keep Twisted's log away: what matters of it is said in the findings."""
    from twisted.logger import globalLogBeginner

    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False, discardBuffer=True)


# --- how findings look -------------------------------------------------------------------------------


def _described(finding: Any) -> dict[str, str]:
    return {"level": finding.level, "what": finding.what, "why": finding.why, "do": finding.do}


def _show(findings: Sequence[Any]) -> None:
    from crabtwist.cli.shown import plain

    for finding in findings:
        click.secho(_MARKS[finding.level], fg=_COLOURS[finding.level], nl=False)
        click.echo(plain(finding.what))
        for words in filter(None, (finding.why, finding.do and f"-> {finding.do}")):
            click.echo(f"        {plain(words)}")
    counted = {level: sum(finding.level == level for finding in findings) for level in _MARKS}
    click.echo(f"{counted['problem']} problems, {counted['warning']} warnings")
