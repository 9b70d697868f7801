"""What a gateway has to tell about itself to be measured."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

from bench.scenarios import CHAT, MESSAGES

#: The key that clients send, and the one that gateways send upstream.
CLIENT_KEY = "sk-bench-client"
UPSTREAM_KEY = "sk-bench-upstream"
MODELS = {MESSAGES: "bench-claude", CHAT: "bench-gpt"}
PATHS = {MESSAGES: "/v1/messages", CHAT: "/v1/chat/completions"}


@attrs.frozen
class Site:
    """Where a candidate runs: its port, the upstream's, its installation and a folder for its files."""

    port: int
    upstream_port: int
    place: Path
    directory: Path

    @property
    def upstream(self) -> str:
        """The upstream's address."""
        return f"http://127.0.0.1:{self.upstream_port}"


class Candidate:
    """
    A gateway; a subclass says what is its own.

    `name` is what the command line calls it.  `package` says where it comes from, `note` what a reader of
    its figures has to know.
    """

    name = ""
    title = ""
    package = ""
    note = ""

    @property
    def folder(self) -> str:
        """The folder that it is installed in; two that are the same program share one."""
        return self.name

    def version(self, place: Path) -> str | None:
        """Return its version, as installed in `place` (or on the machine); None where it is missing."""
        raise NotImplementedError

    def install(self, place: Path) -> None:
        """Install it into `place`, by its own package manager; raises `CalledProcessError`."""
        raise NotImplementedError

    def files(self, site: Site) -> dict[str, str]:
        """Return its configuration: the texts of files, by their names."""
        del site
        return {}

    def command(self, site: Site) -> list[str]:
        """Return what starts it in the foreground, in its folder; empty: nothing to start."""
        raise NotImplementedError

    def environ(self, site: Site) -> dict[str, str]:
        """Return what its environment has to hold."""
        del site
        return {}

    def route(self, dialect: str) -> tuple[str, str]:
        """Return the path of an endpoint, and the model as its clients have to name it."""
        return PATHS[dialect], MODELS[dialect]

    def headers(self, dialect: str, site: Site) -> dict[str, str]:
        """Return the header fields that its clients send, beside the usual."""
        del site
        if dialect == MESSAGES:
            return {"anthropic-version": "2023-06-01", "x-api-key": CLIENT_KEY}
        return {"authorization": f"Bearer {CLIENT_KEY}"}


def run(command: Sequence[str], directory: Path | None = None, **environ: str) -> None:
    """Run a package manager, showing what it says; raises `CalledProcessError`."""
    path = shutil.which("env")
    subprocess.run(
        [path or "env", *(f"{k}={v}" for k, v in environ.items()), *command], cwd=directory, check=True
    )


def printed(command: Sequence[str]) -> str | None:
    """Return what a command prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout + done.stderr).strip()
