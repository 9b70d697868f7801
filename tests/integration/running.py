"""The real thing: `twistd crabtwist` in a process of its own, on loopback, on a port of its own."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
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
        command = [sys.executable, "-m", "twisted.scripts.twistd"]
        twistd = Path(sys.executable).with_name("twistd")
        command = [str(twistd)] if twistd.exists() else command
        self.process = subprocess.Popen(
            [*command, "-n", "--pidfile=", "crabtwist", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        match = self.wait_for(_SERVING)
        self.host, self.port = match[1], int(match[2])
        self.url = f"http://{self.host}:{self.port}"

    def wait_for(self, pattern: re.Pattern[str], seconds: float = START_SECONDS) -> re.Match[str]:
        """Return the first match in the log, reading on until it comes; AssertionError if it does not."""
        deadline = time.monotonic() + seconds
        while (match := pattern.search(self.log)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                self.kill()
                raise AssertionError(f"no {pattern.pattern!r} in what the gateway printed:\n{self.log}")
        return match

    def _read(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
        self.log += data.decode("utf-8", "replace")
        return bool(data)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask it to end, and return its exit status (negative for the signal that ended it)."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Return its exit status once it has ended."""
        output, _ = self.process.communicate(timeout=seconds)
        self.log += output.decode("utf-8", "replace")
        return self.process.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError, subprocess.TimeoutExpired):
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
