"""What a first start does: writes a configuration that works at once, and says how to use it."""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from crabtwist.errors import ConfigurationError
from crabtwist.keys import generate_key
from crabtwist.settings import Secret

ECHO_MODEL = "echo"
CLAUDE_MODELS = ("claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-5-5", "claude-fable-5-1")
GPT_MODELS = ("gpt-6.1-sol", "gpt-6-astra", "gpt-6-luna", "gpt-5.5")

# Lines that begin with `#` and no space are settings to be had by removing the `#`.
_TOP = """\
# The configuration of crabtwist, written at its first start and yours to change.
#
# In any string, ${{VAR}} stands for the environment variable VAR, and ${{VAR:-default}} for VAR or else
# the default.  A line that begins with # and no space is a setting; remove the # to have it.

# Where to listen: here, for this machine alone.  Endpoint strings of Twisted's are fine as well.
listen = "127.0.0.1:5632"

# Opens what is below /v1/admin/ to whoever sends it as a key is sent.
admin_token = "{admin_token}"

# Protects what the admin API keeps in the store.  All nodes on one store need the same; without it, the keys
# made there open nothing any more.
secret_key = "{secret_key}"

# How long requests may go on after the order to stop, in seconds.
#shutdown_timeout = 30

# Virtual keys: clients send one as `x-api-key: KEY` or `Authorization: Bearer KEY`.
[[keys]]
name = "default"
key = "{key}"
# The models and aliases that it may use, "*" for all.
models = ["*"]

# Answers with what it was asked, for trying out clients; nothing leaves this machine.
[providers.echo]
kind = "echo"
models = ["echo"]

# What it would cost, in dollars per million tokens: made up, so that budgets and receipts can be tried out.
[models.echo]
input = 1.0
output = 5.0
"""

_PROVIDER = """\
[providers.{name}]
api_key = "${{{variable}}}"
models = {models}
"""

_BOTTOM = """\
# Other names for models.
#[aliases]
#fast = "echo"

# Extensions see every request, in the order in which they stand here.  The first one logs a line for each;
# the others hold keys to limits and budgets, those that they bring with them or those that you write here.
[extensions.logging]

[extensions.rate_limit]
#requests_per_minute = 60

[extensions.budget]
#dollars = 50.0
#per = "month"

# Where extensions keep counters and values.  Relative paths begin at this file's folder.
#[storage]
#kind = "sqlite"
#path = "crabtwist.db"

# The record of every request, without the bodies; kind = "none" keeps none.
#[ledger]
#kind = "sqlite"
#path = "crabtwist-ledger.db"
#journal = "crabtwist-journal"
#keep_days = 400
"""


@attrs.frozen
class FirstStart:
    """What was written: the file, its secrets, and the names of its models, in its order."""

    path: Path
    admin_token: Secret
    key: Secret
    models: tuple[str, ...]


def write_first_config(path: str | os.PathLike[str], environ: Mapping[str, str]) -> FirstStart:
    """
    Write a new configuration to `path`, readable by its owner alone.

    It has an admin token, a key called "default", the echo provider, and those of Anthropic and OpenAI
    whose usual variables (ANTHROPIC_API_KEY, OPENAI_API_KEY) `environ` holds; the variables' names are
    written, not what they hold.  Nothing is ever overwritten: raises `ConfigurationError` when there is
    something at `path` already, and when it cannot be written.
    """
    admin_token = f"ct-admin-{secrets.token_hex(32)}"
    key = generate_key()
    blocks = [_TOP.format(admin_token=admin_token, secret_key=secrets.token_hex(32), key=key)]
    models = [ECHO_MODEL]
    for name, variable, served in (
        ("anthropic", "ANTHROPIC_API_KEY", CLAUDE_MODELS),
        ("openai", "OPENAI_API_KEY", GPT_MODELS),
    ):
        wanted = bool(environ.get(variable, "").strip())
        blocks.append(_provider_block(name, variable, served, wanted=wanted))
        models += served if wanted else ()
    _write_new(Path(path), "\n".join([*blocks, _BOTTOM]))
    return FirstStart(Path(path), Secret(admin_token), Secret(key), tuple(models))


def welcome(first_start: FirstStart, url: str) -> str:
    """
    Return what to show once, on the terminal and never in a log, for it holds the secrets.

    `url` is where the gateway answers, without a path ("http://127.0.0.1:5632").
    """
    key = first_start.key.reveal()
    url = url.rstrip("/")
    claude = next((model for model in first_start.models if model.startswith("claude-")), ECHO_MODEL)
    return f"""\
crabtwist wrote its first configuration: {first_start.path}

  admin token  {first_start.admin_token.reveal()}
  key          {key}

Both stand in that file, which only you can read; they are not shown again.

Try it:

  {_curl(url, key)}

Claude Code:

  export ANTHROPIC_BASE_URL={shlex.quote(url)} ANTHROPIC_AUTH_TOKEN={key}
  claude --model {claude}

OpenAI clients:

  export OPENAI_BASE_URL={shlex.quote(f"{url}/v1")} OPENAI_API_KEY={key}

A key for somebody else, and what is asked for as it comes:

  crabtwist keys create NAME --dollars 1 --requests-per-minute 10
  crabtwist logs --follow

Models: {", ".join(first_start.models)}

What is counted and who asked for what is kept beside the configuration, in crabtwist.db,
crabtwist-ledger.db and crabtwist-journal; [storage] and [ledger] say otherwise.
"""


def _curl(url: str, key: str) -> str:
    body = {"model": ECHO_MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
    words = ["curl", f"{url}/v1/messages"]
    for header in (f"x-api-key: {key}", "anthropic-version: 2023-06-01", "content-type: application/json"):
        words += ["-H", header]
    return shlex.join([*words, "-d", json.dumps(body)])


def _provider_block(name: str, variable: str, models: Sequence[str], *, wanted: bool) -> str:
    block = _PROVIDER.format(name=name, variable=variable, models=json.dumps(models))
    if wanted:
        return f"# The key itself stays in the environment.\n{block}"
    lines = "".join(f"#{line}\n" for line in block.splitlines())
    return f"# To have this one, set {variable} and remove the #.\n{lines}"


def _write_new(path: Path, text: str) -> None:
    try:
        # O_EXCL also refuses a symbolic link, wherever it leads.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            # Half a configuration would pass for somebody's own at the next start.
            path.unlink()
            raise
    except OSError as error:
        raise ConfigurationError([f"{path}: cannot be written: {error.strerror or error}"]) from error
