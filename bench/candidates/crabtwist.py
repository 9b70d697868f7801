"""crabtwist, of this checkout: with everything on, and bare."""

from __future__ import annotations

import sys
from configparser import ConfigParser
from pathlib import Path

from bench.candidate import CLIENT_KEY, UPSTREAM_KEY, Candidate, Site, printed

CHECKOUT = Path(__file__).parents[2]

_ROUTES = """\
listen = "127.0.0.1:{port}"
{admin}
[[keys]]
name = "bench"
key = "{client_key}"

[providers.messages]
kind = "anthropic"
api_key = "{upstream_key}"
base_url = "{upstream}"
models = ["bench-claude"]
max_connections = 8192

[providers.chat]
kind = "openai"
api_key = "{upstream_key}"
base_url = "{upstream}/v1"
models = ["bench-gpt"]
max_connections = 8192
"""

_EVERYTHING = """
[models."bench-claude"]
input = 3.0
output = 15.0

[models."bench-gpt"]
input = 2.0
output = 8.0

[extensions.rate_limit]
requests_per_minute = 100_000_000
input_tokens_per_minute = 1_000_000_000_000
output_tokens_per_minute = 1_000_000_000_000
concurrent_requests = 100_000

[extensions.budget]
dollars = 1_000_000_000.0

[extensions.usage]

[extensions.logging]
path = "requests.jsonl"

[storage]
kind = "sqlite"

[ledger]
kind = "sqlite"
"""

_ALL_EXTENSIONS = """
[extensions.audit]

[extensions.cache]
"""

_NO_EXTENSION = """
[models."bench-claude"]
input = 3.0
output = 15.0

[models."bench-gpt"]
input = 2.0
output = 8.0

[storage]
kind = "sqlite"

[ledger]
kind = "sqlite"
"""

_BARE = """
[storage]
kind = "memory"

[ledger]
kind = "none"
"""


class _Crabtwist(Candidate):
    package = "this checkout"
    rest = ""
    admin = ""

    def version(self, place: Path) -> str | None:
        """Return the version, and the commit where there is one."""
        del place
        setup = ConfigParser()
        setup.read(CHECKOUT / "setup.cfg")
        commit = printed(["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]) or ""
        return f"{setup['metadata']['version']} {commit}".strip()

    def install(self, place: Path) -> None:
        """It is what this is run from."""

    def files(self, site: Site) -> dict[str, str]:
        """Return its one file."""
        routes = _ROUTES.format(
            port=site.port,
            admin=self.admin,
            client_key=CLIENT_KEY,
            upstream_key=UPSTREAM_KEY,
            upstream=site.upstream,
        )
        return {"crabtwist.toml": routes + self.rest}

    def command(self, site: Site) -> list[str]:
        """Return `twistd crabtwist`, of the Python that runs this."""
        del site
        twistd = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        return [*twistd, "--nodaemon", "--pidfile=", "--logfile=twistd.log", "crabtwist"]

    def environ(self, site: Site) -> dict[str, str]:
        """Return where it is found."""
        del site
        return {"PYTHONPATH": str(CHECKOUT)}


class Everything(_Crabtwist):
    """Everything on that is asked of a gateway in production."""

    name = "everything"
    title = "crabtwist, everything on"
    note = (
        "Keys, limits, a budget with prices, usage, a log line for each request, storage and ledger in "
        "SQLite, metrics. The cache is off: all bodies differ."
    )
    admin = 'admin_token = "ct-bench-admin"\n'
    rest = _EVERYTHING


class Extended(_Crabtwist):
    """Every built-in extension, those too that not everybody wants."""

    name = "extended"
    title = "crabtwist, all extensions"
    note = "As everything on, with the audit and the cache, which has to keep each answer: all bodies differ."
    rest = _EVERYTHING + _ALL_EXTENSIONS


class Unextended(_Crabtwist):
    """The same without any extension."""

    name = "unextended"
    title = "crabtwist, no extension"
    note = "Keys, prices, storage and ledger in SQLite, metrics; no extension."
    rest = _NO_EXTENSION


class Bare(_Crabtwist):
    """Nothing but keys and metrics, which cannot be switched off."""

    name = "bare"
    title = "crabtwist, bare"
    note = "A key, metrics, and nothing else: no extension, no ledger, storage in memory."
    rest = _BARE
