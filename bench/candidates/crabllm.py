"""crabllm, the gateway in Rust that crabtwist began as a new implementation of."""

from __future__ import annotations

from pathlib import Path

from bench.candidate import CLIENT_KEY, UPSTREAM_KEY, Candidate, Site, printed, run

_CONFIG = """\
listen = "127.0.0.1:{port}"
admin_token = "sk-bench-admin"
{storage}
[[keys]]
name = "bench"
key = "{client_key}"
models = ["*"]

[providers.messages]
kind = "anthropic"
api_key = "{upstream_key}"
base_url = "{upstream}/v1"
models = ["bench-claude"]
timeout = 600

[providers.chat]
kind = "openai"
api_key = "{upstream_key}"
base_url = "{upstream}/v1"
models = ["bench-gpt"]
timeout = 600

[models."bench-claude".pricing]
input_cost_per_million = 3.0
output_cost_per_million = 15.0

[models."bench-gpt".pricing]
input_cost_per_million = 2.0
output_cost_per_million = 8.0

[extensions]
rate_limit = {{ requests_per_minute = 100000000 }}
usage = {{}}
budget = {{ default_budget = 1000000000.0 }}
"""


_SQLITE = """
[storage]
kind = "sqlite"
path = "crabllm.db"
"""


class Crabllm(Candidate):
    """From crates.io, built into a root of its own; with the storage that it has by itself, in memory."""

    name = "crabllm"
    title = "crabllm"
    package = "crates.io: crabllm"
    note = "Keys, limits, a budget with prices and usage, all in memory: gone with the process."
    storage = ""

    @property
    def folder(self) -> str:
        """One program, whatever its storage."""
        return "crabllm"

    def version(self, place: Path) -> str | None:
        """Return what cargo says is installed."""
        listed = printed(["cargo", "install", "--list", "--root", str(place)])
        first = listed.partition("\n")[0] if listed else ""
        return first.removeprefix("crabllm v").rstrip(":") or None

    def install(self, place: Path) -> None:
        """Build and install it with cargo."""
        run(["cargo", "install", "--root", str(place), "--features", "storage-sqlite", "crabllm"])

    def files(self, site: Site) -> dict[str, str]:
        """Return its one file."""
        keys = {"client_key": CLIENT_KEY, "upstream_key": UPSTREAM_KEY, "storage": self.storage}
        return {"crabllm.toml": _CONFIG.format(port=site.port, upstream=site.upstream, **keys)}

    def command(self, site: Site) -> list[str]:
        """Return its server."""
        return [str(site.place / "bin" / "crabllm"), "serve", "--config", "crabllm.toml"]

    def environ(self, site: Site) -> dict[str, str]:
        """Return nothing but the number of cores that it has: one, as for the others."""
        del site
        return {"TOKIO_WORKER_THREADS": "1"}


class CrabllmStored(Crabllm):
    """With its storage in SQLite, so that budgets and usage are there after a restart."""

    name = "crabllmsqlite"
    title = "crabllm, SQLite"
    note = "As the other, with its storage in SQLite: each request waits for it."
    storage = _SQLITE
