"""No gateway at all: what the upstream and the load generator do among themselves."""

from __future__ import annotations

from pathlib import Path

from bench.candidate import Candidate, Site


class Direct(Candidate):
    """The baseline of every scenario."""

    name = "direct"
    title = "direct"
    package = "none"
    note = "No gateway. Where others retry, nothing fails."

    def version(self, place: Path) -> str | None:
        """It is always there."""
        del place
        return "-"

    def install(self, place: Path) -> None:
        """There is nothing to install."""

    def command(self, site: Site) -> list[str]:
        """There is nothing to start."""
        del site
        return []
