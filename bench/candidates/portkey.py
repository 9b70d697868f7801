"""Portkey's gateway on Node.js; it has no configuration, each request brings its own."""

from __future__ import annotations

import json
from pathlib import Path

from bench.candidate import UPSTREAM_KEY, Candidate, Site, run
from bench.scenarios import MESSAGES

_PACKAGE = Path("node_modules", "@portkey-ai", "gateway")
_RETRY = {"attempts": 2, "on_status_codes": [429, 500, 502, 503, 504, 529]}

#: With `node-server` 1.14.2, and others that npm would choose, every stream ends in a 500: issue 1389 of
#: Portkey-AI/gateway.
_MANIFEST = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "*", "@hono/node-server": "1.13.8"},
    "overrides": {"@hono/node-server": "$@hono/node-server"},
}


class Portkey(Candidate):
    """From npm, under a prefix of its own."""

    name = "portkey"
    title = "Portkey"
    package = "npm: @portkey-ai/gateway"
    note = "No keys, limits or records. Its configuration is in each request's headers."

    def version(self, place: Path) -> str | None:
        """Return what is installed."""
        description = place / _PACKAGE / "package.json"
        return str(json.loads(description.read_text())["version"]) if description.exists() else None

    def install(self, place: Path) -> None:
        """Install it with npm, and with a library of a version that its streams work with."""
        (place / "package.json").write_text(json.dumps(_MANIFEST))
        run(["npm", "install", "--prefix", str(place)])

    def command(self, site: Site) -> list[str]:
        """Return its server, without the console."""
        server = site.place / _PACKAGE / "build" / "start-server.js"
        return ["node", str(server), f"--port={site.port}", "--headless"]

    def environ(self, site: Site) -> dict[str, str]:
        """Return what makes libraries quick."""
        del site
        return {"NODE_ENV": "production"}

    def headers(self, dialect: str, site: Site) -> dict[str, str]:
        """Return the one that says where to go, with which key and how often."""
        config = {
            "provider": "anthropic" if dialect == MESSAGES else "openai",
            "api_key": UPSTREAM_KEY,
            "custom_host": f"{site.upstream}/v1",
            "retry": _RETRY,
        }
        return {"x-portkey-config": json.dumps(config)}
