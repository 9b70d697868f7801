"""Bifrost, a gateway in Go; its npm package fetches the program itself from its maker's server."""

from __future__ import annotations

import json
from pathlib import Path

from bench.candidate import UPSTREAM_KEY, Candidate, Site, run
from bench.scenarios import MESSAGES


class Bifrost(Candidate):
    """From npm, under a prefix of its own, the program beside it."""

    name = "bifrost"
    title = "Bifrost"
    package = "npm: @maximhq/bifrost"
    note = "Configured by file; its stores of configuration and logs are off."

    def _program(self, place: Path) -> Path | None:
        return next(iter(sorted((place / "bifrost").glob("*/bin/bifrost*"))), None)

    def version(self, place: Path) -> str | None:
        """Return the version of the program, which has to be there, not its npm package alone."""
        program = self._program(place)
        return program.parts[-3] if program else None

    def install(self, place: Path) -> None:
        """Install it with npm, and have it fetch its program: that needs its maker's server."""
        run(["npm", "install", "--prefix", str(place), self.package.partition(" ")[2]])
        started = [str(place / "node_modules" / ".bin" / "bifrost"), "--help"]
        run(started, XDG_CACHE_HOME=str(place))

    def route(self, dialect: str) -> tuple[str, str]:
        """Return the paths that speak the vendors' own dialects."""
        path, model = super().route(dialect)
        vendor = "anthropic" if dialect == MESSAGES else "openai"
        return f"/{vendor}{path}", f"{vendor}/{model}"

    def files(self, site: Site) -> dict[str, str]:
        """Return its one file."""
        network = {"base_url": site.upstream, "max_retries": 2, "default_request_timeout_in_seconds": 600}
        document = {
            "config_store": {"enabled": False},
            "logs_store": {"enabled": False},
            "client": {"drop_excess_requests": False, "enable_logging": False},
            "providers": {
                vendor: {
                    "keys": [{"name": vendor, "value": UPSTREAM_KEY, "models": [model], "weight": 1.0}],
                    "network_config": network,
                    "concurrency_and_buffer_size": {"concurrency": 4096, "buffer_size": 8192},
                }
                for vendor, model in (("anthropic", "bench-claude"), ("openai", "bench-gpt"))
            },
        }
        return {"config.json": json.dumps(document, indent=2) + "\n"}

    def command(self, site: Site) -> list[str]:
        """Return its server, with its files in its folder."""
        where = ["-host", "127.0.0.1", "-port", str(site.port)]
        return [str(self._program(site.place)), "-app-dir", str(site.directory), *where]

    def environ(self, site: Site) -> dict[str, str]:
        """Return nothing but the number of cores that it has: one, as for the others."""
        del site
        return {"GOMAXPROCS": "1"}
