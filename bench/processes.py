"""Processes of a candidate: pinned to a core, stopped and let go on, and what they use, from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_PROC = Path("/proc")
STOP_SECONDS = 10.0


def pinned(command: Sequence[str], core: int) -> list[str]:
    """Return a command that runs on one core alone, with all that it starts."""
    return ["taskset", "--cpu-list", str(core), *command]


class Tree:
    """A process and all that it started, in a session of its own; what it prints goes to a file."""

    def __init__(
        self, command: Sequence[str], core: int, directory: Path, environ: Mapping[str, str], log: IO[bytes]
    ) -> None:
        self.process = subprocess.Popen(
            pinned(command, core),
            cwd=directory,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether its first process has ended."""
        return self.process.poll() is not None

    def freeze(self) -> None:
        """Let it do nothing, not even what it does when it has nothing to do."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        """End it: by SIGTERM, then by force."""
        self._send(signal.SIGTERM)
        self.thaw()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self._send(signal.SIGKILL)
        self.process.wait(STOP_SECONDS)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def cpu_ns(self) -> int:
        """Return the CPU time of all its live threads, in user and kernel."""
        return sum(map(_cpu_ns, _descendants(self.process.pid)))

    def resident_bytes(self) -> int:
        """Return its resident memory; pages that its processes share count for each."""
        return sum(map(_resident_bytes, _descendants(self.process.pid)))


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    for thread in _listed(_PROC / str(pid) / "task"):
        for child in _read(thread / "children").split():
            yield from _descendants(int(child))


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    """Return a file of /proc; "" if the process has just ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpu_ns(pid: int) -> int:
    """Return the CPU time of a process: the scheduler's nanoseconds, or its ticks where those are off."""
    precise = sum(
        int(_read(thread / "schedstat").partition(" ")[0] or 0)
        for thread in _listed(_PROC / str(pid) / "task")
    )
    return precise or _ticks_ns(_read(_PROC / str(pid) / "stat"))


def _ticks_ns(stat: str) -> int:
    """Return utime and stime of /proc/PID/stat (proc(5)); the name before them may have blanks in it."""
    fields = stat.rpartition(")")[2].split()
    if not fields:
        return 0
    return (int(fields[11]) + int(fields[12])) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    fields = _read(_PROC / str(pid) / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0
