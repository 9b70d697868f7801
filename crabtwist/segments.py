"""
The journal's files: a folder of numbered segments that are only ever appended to.

Lines are collected, and written with one write: they survive the death of the process then, for the system
has them.  The disk has them after the next sync.  Lines are

    CRC LENGTH KIND PAYLOAD

with the CRC-32 and the length of what follows in eight hexadecimal digits each.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import msgspec

CHUNK_BYTES = 2**18

#: Where in a line its kind is.
KIND = slice(18, 19)
LINE_END = ord("\n")


class Place(msgspec.Struct, frozen=True, order=True):
    """A place in the journal: a segment's number and an offset in bytes."""

    segment: int
    offset: int


def frame(kind: bytes, payload: bytes) -> bytes:
    """Return a line; `payload` has no line ends of its own."""
    framed = kind + b" " + payload
    return b"%08x %08x %b\n" % (zlib.crc32(framed), len(framed), framed)


def unframe(line: bytes) -> tuple[bytes, bytes]:
    """Return kind and payload of a line without its end.  Raises ValueError if it is torn."""
    framed = line[KIND.start :]
    if line[: KIND.start] != b"%08x %08x " % (zlib.crc32(framed), len(framed)):
        raise ValueError("a torn line")
    return framed[:1], framed[2:]


def unframed(line: bytes) -> tuple[bytes, bytes]:
    """Return kind and payload of a line without its end, b"" for both if it is torn."""
    try:
        return unframe(line)
    except ValueError:
        return b"", b""


class CutShort(OSError):
    """Of several lines only the first `whole` were written whole; those after them are lost."""

    def __init__(self, whole: int, why: str) -> None:
        super().__init__(why)
        self.whole = whole


class Segments:
    """
    The files: appended to at the end, read from any place, deleted from the beginning.

    Makes the folder if there is none, and begins a new segment: what a dead process wrote is never
    appended to.  Sizes and places count lines from `append` on, though nobody reads them before `flush`.
    `full` says that it is time to `begin_next`.  Everything but `append` raises OSError, making one also
    BlockingIOError when another process has the folder.
    """

    def __init__(self, folder: Path, segment_bytes: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._folder_file = os.open(folder, os.O_RDONLY)
        try:
            # The system lets go of it when the process dies, however it dies.
            fcntl.flock(self._folder_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._folder_file)
            raise
        self._segment_bytes = segment_bytes
        found = sorted(int(path.stem) for path in folder.glob("*.journal") if path.stem.isdigit())
        self._sizes = {number: self._path(number).stat().st_size for number in found}
        self._replaced: list[int] = []
        self._doomed: list[int] = []
        self._dirty = False
        self._waiting: list[bytes] = []
        self._mend = b""
        self._begin(found[-1] + 1 if found else 1)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.journal"

    def _begin(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._file = os.open(self._path(number), flags, 0o600)
        self._sizes[number] = 0
        self.size_bytes = sum(self._sizes.values())
        self.last = number
        self.full = False

    @property
    def first(self) -> int:
        """The number of the oldest segment."""
        return next(iter(self._sizes))

    @property
    def end(self) -> Place:
        """The place after all that was written."""
        return Place(self.last, self._sizes[self.last])

    @property
    def last_written_at(self) -> float:
        """When the newest of the old segments was last written to, in Unix time; 0.0 if there is none."""
        return max((self._path(n).stat().st_mtime for n in self._sizes if n != self.last), default=0.0)

    def begin_next(self) -> None:
        """Go on in a new file; everything has been flushed."""
        full = self._file
        self._begin(self.last + 1)
        self._replaced.append(full)
        self._mend = b""

    def append(self, line: bytes) -> None:
        """Add a line, for `flush` to write."""
        if self._mend and not self._waiting:
            # What there is of a line that was torn must not become the beginning of the next.
            line = self._mend + line
        self._waiting.append(line)
        self._grow(len(line))

    def _grow(self, size: int) -> None:
        self._sizes[self.last] = grown = self._sizes[self.last] + size
        self.size_bytes += size
        self.full = grown >= self._segment_bytes

    def flush(self) -> None:
        """Write what was appended.  Raises `CutShort` if it could not be written whole."""
        if not self._waiting:
            return
        lines, self._waiting = self._waiting, []
        data = b"".join(lines)
        written, why = 0, ""
        try:
            written = os.write(self._file, data)
        except OSError as error:
            why = str(error)
        if written:
            self._dirty = True
            self._mend = b"" if data[written - 1] == LINE_END else b"\n"
        if written < len(data):
            self._grow(written - len(data))
            # A line of which nothing but its end is missing is read like any other.
            ends = [end - 1 for end in accumulate(map(len, lines))]
            whole = sum(end <= written for end in ends)
            if written and self._mend and written not in ends:
                self._mend = b"!\n"
            raise CutShort(whole, why or f"only {written} of {len(data)} bytes were written")

    def lines(self, start: Place) -> Iterator[tuple[bytes, Place]]:
        """
        Yield the lines from a place on, without their ends, each with the place after it.

        Lines that were torn are among them.
        """
        for number in [number for number in self._sizes if number >= start.segment]:
            offset = start.offset if number == start.segment else 0
            with self._path(number).open("rb", CHUNK_BYTES) as file:
                file.seek(offset)
                for line in file:
                    offset += len(line)
                    yield line.removesuffix(b"\n"), Place(number, offset)

    def delete_before(self, number: int) -> None:
        """Delete all segments before one, after the next sync."""
        for old in [old for old in self._sizes if old < number]:
            self.size_bytes -= self._sizes.pop(old)
            self._doomed.append(old)

    @property
    def needs_sync(self) -> bool:
        """Whether something was written or is to be deleted."""
        return self._dirty or bool(self._doomed) or bool(self._replaced)

    def sync(self) -> None:
        """Bring everything to the disk; blocks, and may run in another thread."""
        doomed, current, self._dirty = len(self._doomed), self._file, False
        try:
            os.fsync(current)
            while self._replaced:
                os.fsync(self._replaced[0])
                os.close(self._replaced.pop(0))
        except OSError:
            self._dirty = True
            raise
        # Only now: what was worth keeping of these was written again into those.
        for _ in range(doomed):
            self._path(self._doomed.pop(0)).unlink(missing_ok=True)
        os.fsync(self._folder_file)

    def close(self) -> None:
        """Sync what was flushed, and close."""
        try:
            self.sync()
        finally:
            os.close(self._file)
            os.close(self._folder_file)
