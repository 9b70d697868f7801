"""The real thing: `twistd crabtwist` in a process of its own, on loopback, on a port of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 30.0

_SERVING = re.compile(r"serving on http://([0-9.]+):(\d+)")


class RunningGateway:
    """
    A gateway that was started, and has to be stopped.

    `url` is where it answers; `log` all that it printed so far.
    """

    def __init__(self, directory: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.log = ""
        command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        self.process = subprocess.Popen(
            [*command, "-n", "--pidfile=", "crabtwist", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._grown = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        match = self.wait_for(_SERVING)
        self.host, self.port = match[1], int(match[2])
        self.url = f"http://{self.host}:{self.port}"

    def _read(self) -> None:
        """Keep the log read: a full pipe would stop the gateway."""
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self._grown:
                self.log += data.decode("utf-8", "replace")
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for(self, pattern: re.Pattern[str], seconds: float = START_SECONDS) -> re.Match[str]:
        """Return the first match in the log, reading on until it comes; AssertionError if it does not."""
        with self._grown:
            found = self._grown.wait_for(lambda: pattern.search(self.log) or self._ended, seconds)
        match = pattern.search(self.log)
        if match is None:
            self.kill()
            why = "it ended" if found else f"{seconds:g} seconds passed"
            raise AssertionError(f"no {pattern.pattern!r} before {why}; the gateway printed:\n{self.log}")
        return match

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask it to end, and return its exit status (negative for the signal that ended it)."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Return its exit status once it has ended and all of its log is read."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(5)


@contextlib.contextmanager
def running(
    directory: Path, configuration: str, *arguments: str, environ: Mapping[str, str] | None = None
) -> Iterator[RunningGateway]:
    """Run a gateway with a configuration in TOML; it listens on a port of its own whatever that says."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "crabtwist.toml").write_text(configuration)
    gateway = RunningGateway(directory, "-l", "127.0.0.1:0", *arguments, environ=environ)
    try:
        yield gateway
    finally:
        gateway.kill()
