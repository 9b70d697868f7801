"""
Lines on their way into a file, and what becomes of them while it takes none.

They wait in memory, up to a bound, and are written when the file takes them again, in order.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from twisted.logger import Logger

from crabtwist.extensions.rotating_file import CutShort, RotatingFile

#: How often a file that took no line is tried again.
RETRY_SECONDS = 1.0

#: What may wait; lines that come when there is no room are lost, and counted.
MOST_WAITING_BYTES = 2**20


class Trail:
    """
    Writes lines to a file, and never raises for it.

    `failures` counts the writes that failed, `lost` the lines that are in no file and never will be.
    `clock` is what is asked when to try again, and `what` names the whole in the log.
    """

    _log = Logger()

    def __init__(self, file: RotatingFile, clock: Any, what: str = "the audit") -> None:
        self.failures = 0
        self.lost = 0
        self._file = file
        self._clock = clock
        self._what = what
        self._is_open = False
        self._failing = False
        self._tried_at = 0.0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0

    def open(self) -> None:
        """Open the file.  Raises OSError."""
        self._file.open()
        self._is_open = True

    def close(self) -> None:
        """Write what waits, if the file takes it, and close it."""
        if self._failing:
            self._try_again(self._clock.seconds())
        self._is_open = False
        self._file.close()
        if self._waiting:
            self.lost += sum(lines.count(b"\n") for lines in self._waiting)
            self._log.critical("{what} ends without {lost} of its lines", what=self._what, lost=self.lost)

    def works(self) -> bool:
        """Whether the file takes lines, as far as is known; finds out where it did not."""
        if not self._failing:
            return True
        now = self._clock.seconds()
        return not 0.0 <= now - self._tried_at < RETRY_SECONDS and self._try_again(now)

    def write(self, lines: bytes) -> None:
        """Write one line or several, their ends included, now or later."""
        if not self._is_open:
            self.lost += lines.count(b"\n")
        elif self._failing and not self.works():
            self._keep(lines)
        else:
            self._write_or_keep(lines)

    def _write_or_keep(self, lines: bytes) -> None:
        now = self._clock.seconds()
        try:
            self._file.append(lines, now)
        except OSError as error:
            self._failed(error, now)
            self._keep(_rest(error, lines))

    def _keep(self, lines: bytes) -> None:
        if self._waiting_bytes + len(lines) > MOST_WAITING_BYTES:
            self.lost += lines.count(b"\n")
            return
        self._waiting.append(lines)
        self._waiting_bytes += len(lines)

    def _try_again(self, now: float) -> bool:
        try:
            self._file.open()
            while self._waiting:
                self._file.append(self._waiting[0], now)
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            if self._waiting:
                whole, self._waiting[0] = self._waiting[0], _rest(error, self._waiting[0])
                self._waiting_bytes -= len(whole) - len(self._waiting[0])
            self._failed(error, now)
            return False
        self._failing = False
        self._log.info(
            "{what} is written again; {lost} lines were lost so far", what=self._what, lost=self.lost
        )
        return True

    def _failed(self, error: OSError, now: float) -> None:
        self.failures += 1
        self._tried_at = now
        if not self._failing:
            self._failing = True
            self._log.critical("{what} cannot be written: {why}", what=self._what, why=error)


def _rest(error: OSError, lines: bytes) -> bytes:
    """Return what has still to be written of lines that an error kept from the file."""
    return error.rest if isinstance(error, CutShort) else lines


# What lines are made of, whoever writes them.


def time_of(seconds: float) -> str:
    """Return a Unix time as RFC 3339 has it, in UTC, to the millisecond."""
    second, microseconds = divmod(round(seconds * 1e6), 10**6)
    return f"{_second(second)}.{microseconds // 1000:03d}Z"


@lru_cache(maxsize=64)
def _second(second: int) -> str:
    # Dear, and many requests of a second share it.
    return datetime.fromtimestamp(second, UTC).isoformat()[:-6]


def whole_text(text: str) -> str:
    """Return a text with `?` for each half of a surrogate pair, which is no UTF-8."""
    return text.encode("utf-8", "replace").decode()
