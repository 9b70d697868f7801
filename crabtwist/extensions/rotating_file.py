"""
Lines appended to one file, which is put aside when it has grown large.

What is appended, one line or several, is one write to the end of the file, so it survives the death of the
process, and no two of them mix.  What was put aside is called `NAME.1`, `NAME.2` and so on, the newest first.
When somebody else puts the file aside, as logrotate does, a new one is begun within a second.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from twisted.logger import Logger

#: How often the path is looked at, to learn whether it still leads to the open file.
LOOK_SECONDS = 1.0

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
_MODE = 0o600


class CutShort(OSError):
    """Only a part of what was to be written found room; `rest` is what remains, the cut line first."""

    def __init__(self, path: Path, rest: bytes) -> None:
        super().__init__(errno.ENOSPC, "took only a part of what was to be written", str(path))
        self.rest = rest


class RotatingFile:
    """
    The file at `path`, of at most `max_bytes` (but at least one line), and `keep_files` older ones.

    With `keep_files` 0 what was full is deleted.  While it cannot be put aside it goes on growing: a line
    is worth more than a bound.
    """

    _log = Logger()

    def __init__(self, path: Path, max_bytes: int, keep_files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep_files = keep_files
        self._file: int | None = None
        self._identity = (0, 0)
        self._size_bytes = 0
        self._looked_at = 0.0
        self._torn = False
        self._stays = False
        self._told = False

    def open(self) -> None:
        """Open it, or open it anew.  Raises OSError, and then what was open stays so."""
        file = os.open(self._path, _FLAGS, _MODE)
        try:
            found = os.fstat(file)
            torn = self._is_torn(file, found)
        except OSError:
            os.close(file)
            raise
        self.close()
        self._file = file
        self._identity = (found.st_dev, found.st_ino)
        self._size_bytes = found.st_size
        self._torn = torn

    def _is_torn(self, file: int, found: os.stat_result) -> bool:
        """Whether its last line has no end, for a machine failed while it was written."""
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(self._path))
        return found.st_size > 0 and os.pread(file, 1, found.st_size - 1) != b"\n"

    def close(self) -> None:
        """Let go of it."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def append(self, lines: bytes, now: float) -> None:
        """
        Write one line or several, their ends included; `now` is in seconds.

        Raises OSError when none of it counts, `CutShort` when some of it does: the part of a line that was
        written is left as a line of its own.
        """
        if not 0.0 <= now - self._looked_at < LOOK_SECONDS:
            self._look(now)
        if self._size_bytes and self._size_bytes + len(lines) > self._max_bytes and not self._stays:
            self._put_aside()
        if self._file is None:
            raise OSError(errno.EBADF, "is not open", str(self._path))
        data = b"\n" + lines if self._torn else lines
        written = os.write(self._file, data)
        self._size_bytes += written
        begun = written if written == len(data) else data.rfind(b"\n", 0, written) + 1
        self._torn = begun < written
        if written < len(data):
            raise CutShort(self._path, data[begun:])

    def _look(self, now: float) -> None:
        self._looked_at = now
        self._stays = False
        size_bytes = self._size_now()
        if size_bytes is None:
            self.open()
        else:
            # Others may have added to it, or emptied it.
            self._size_bytes = size_bytes

    def _size_now(self) -> int | None:
        """Return the size of what is at the path, None if that is not what is open."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return found.st_size if (found.st_dev, found.st_ino) == self._identity else None

    def _put_aside(self) -> None:
        try:
            if self._size_now() is not None:
                self._rename()
            self._told = False
        except OSError as error:
            self._stays = True
            if not self._told:
                self._told = True
                self._log.error(
                    "{path} is full and cannot be put aside, so it grows: {why}", path=self._path, why=error
                )
            return
        self.open()

    def _rename(self) -> None:
        if not self._keep_files:
            self._path.unlink()
            return
        # From the oldest on: a crash in the middle loses nothing.
        for number in range(self._keep_files - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
