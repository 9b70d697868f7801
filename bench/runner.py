"""A candidate that runs: started, measured, frozen between, stopped."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from bench.behavior import Behavior
from bench.candidate import Candidate, Site
from bench.processes import Tree
from bench.programs import Upstream
from bench.question import body_of
from bench.scenarios import DIALECTS

START_SECONDS = 90.0
_LOG = "candidate.log"
_LAST_LINES = 15


class DidNotStart(Exception):
    """A candidate did not serve in time; the message has the end of what it printed."""


def free_port() -> int:
    """Return a port of the loopback that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Runner:
    """
    One candidate, with its files in a folder and its process on a core.

    `start` returns how long it took until it served; without a process (the direct baseline) it does nothing.
    """

    def __init__(
        self, candidate: Candidate, place: Path, directory: Path, upstream: Upstream, core: int
    ) -> None:
        self.candidate = candidate
        self.core = core
        self.upstream = upstream
        self._place = place
        self._directory = directory
        self._starts = 0
        self.tree: Tree | None = None
        self.site = self._next_site()

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self.site.port

    def _next_site(self) -> Site:
        """Return a new folder with new ports: nothing is left of an earlier process."""
        self._starts += 1
        directory = self._directory / f"{self.candidate.name}-{self._starts}"
        return Site(free_port(), self.upstream.port, self._place, directory)

    def start(self) -> float:
        """Start it, and return the seconds until every endpoint answered; raises `DidNotStart`."""
        self.site = self._next_site()
        command = self.candidate.command(self.site)
        if not command:
            self.site = Site(self.upstream.port, self.upstream.port, self._place, self.site.directory)
            return 0.0
        self._write_files()
        self.upstream.behave(Behavior())
        began = time.monotonic()
        with (self.site.directory / _LOG).open("wb") as log:
            environ = self.candidate.environ(self.site)
            self.tree = Tree(command, self.core, self.site.directory, environ, log)
        for dialect in DIALECTS:
            self._until_answered(dialect, began + START_SECONDS)
        return time.monotonic() - began

    def _write_files(self) -> None:
        self.site.directory.mkdir(parents=True)
        for name, text in self.candidate.files(self.site).items():
            (self.site.directory / name).write_text(text)

    def _until_answered(self, dialect: str, deadline: float) -> None:
        said = ""
        while time.monotonic() < deadline and self.tree is not None and not self.tree.ended:
            try:
                status, said = self._ask(dialect)
            except (OSError, HTTPException) as error:
                said = str(error)
            else:
                if status == 200:
                    return
            time.sleep(0.005)
        self.stop()
        raise DidNotStart(f"{self.candidate.title}, {dialect}: {said}\n{self._end_of_log()}")

    def _ask(self, dialect: str) -> tuple[int, str]:
        path, model = self.candidate.route(dialect)
        headers = {"content-type": "application/json", **self.candidate.headers(dialect, self.site)}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", path, body_of(dialect, model, 200, stream=False), headers)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def _end_of_log(self) -> str:
        lines = (self.site.directory / _LOG).read_text("utf-8", "replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])

    def stop(self) -> None:
        """End it, if it runs."""
        if self.tree is not None:
            self.tree.stop()
            self.tree = None

    def freeze(self) -> None:
        """Let it do nothing while others are measured."""
        self._if_running(Tree.freeze)

    def thaw(self) -> None:
        """Let it go on."""
        self._if_running(Tree.thaw)

    def _if_running(self, act: Callable[[Tree], None]) -> None:
        if self.tree is not None:
            act(self.tree)

    def cpu_ns(self) -> int:
        """Return the CPU time that it used; 0 without a process."""
        return self.tree.cpu_ns() if self.tree is not None else 0

    def resident_bytes(self) -> int:
        """Return its resident memory; 0 without a process."""
        return self.tree.resident_bytes() if self.tree is not None else 0
