"""What clients want in their environment to speak to the gateway, in the words of a shell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping

import attrs
import click

from crabtwist.cli.faults import Misused
from crabtwist.cli.session import Session, in_session

KEY_VARIABLE = "CRABTWIST_KEY"


@attrs.frozen
class Shell:
    """How a shell is told to set a variable, and to forget one."""

    export: str
    unset: str
    quote: Callable[[str], str]

    def lines(self, variables: Mapping[str, str | None]) -> list[str]:
        """Return a line for each variable; None is for one to forget."""
        return [
            self.unset.format(name=name)
            if value is None
            else self.export.format(name=name, value=self.quote(value))
            for name, value in variables.items()
        ]


def _fish(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if shlex.quote(text) == text else f"'{escaped}'"


def _powershell(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


SHELLS = {
    "bash": Shell("export {name}={value}", "unset {name}", shlex.quote),
    "zsh": Shell("export {name}={value}", "unset {name}", shlex.quote),
    "fish": Shell("set -gx {name} {value}", "set -e {name}", _fish),
    "powershell": Shell("$env:{name} = {value}", "Remove-Item Env:{name}", _powershell),
}


def claude_code(url: str, secret: str, environ: Mapping[str, str]) -> dict[str, str | None]:
    """
    Return what Claude Code wants.

    A key of Anthropic's own beside ours would go along, and two keys in one request are refused.
    """
    variables: dict[str, str | None] = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": secret,
        # It then offers the models that are served here whose names have "claude" in them.
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1",
    }
    return {**variables, "ANTHROPIC_API_KEY": None} if environ.get("ANTHROPIC_API_KEY") else variables


def openai(url: str, secret: str) -> dict[str, str | None]:
    """Return what OpenAI's clients want."""
    return {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": secret}


@click.command("env")
@click.option("--claude-code", "for_claude_code", is_flag=True, help="For Claude Code.")
@click.option("--openai", "for_openai", is_flag=True, help="For OpenAI's clients.")
@click.option(
    "--key",
    metavar="SECRET",
    help=f"The key's secret; else {KEY_VARIABLE}, which others on this machine do not see."
    " A hyphen reads it from stdin.",
)
@click.option("--new-key", metavar="NAME", help="Make a key of this name, for all models, and use it.")
@click.option(
    "--shell", type=click.Choice(sorted(SHELLS)), default="bash", show_default=True, help="Whose words."
)
@in_session
def env(
    session: Session,
    /,
    *,
    for_claude_code: bool,
    for_openai: bool,
    key: str | None,
    new_key: str | None,
    shell: str,
) -> None:
    """
    Print what a client's environment needs, as lines for a shell.

    Without --claude-code and --openai it is for both. To have it at once:

    \b
        eval "$(crabtwist env --claude-code --new-key laptop)"
        crabtwist env --openai --shell fish | source
    """
    if key is not None and new_key is not None:
        raise Misused("--key and --new-key exclude each other")
    secret = _secret(session, key, new_key)
    both = not (for_claude_code or for_openai)
    variables: dict[str, str | None] = {}
    if for_claude_code or both:
        variables |= claude_code(session.place.url, secret, session.environ)
    if for_openai or both:
        variables |= openai(session.place.url, secret)
    session.show(variables, lambda shown: click.echo("\n".join(SHELLS[shell].lines(shown))))


def _secret(session: Session, /, key: str | None, new_key: str | None) -> str:
    if new_key is not None:
        return str(session.client.post("keys", body={"name": new_key})["secret"])
    if key == "-":
        key = sys.stdin.readline().strip()
    secret = key or session.environ.get(KEY_VARIABLE)
    if not secret:
        raise Misused(f"which key? Give --new-key NAME to make one, set {KEY_VARIABLE}, or give --key")
    return secret
