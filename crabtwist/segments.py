"""
The journal's files: a folder of numbered segments that are only ever appended to.

One line is one write, made at once: it survives the death of the process, for the system has it then.
The disk has it after the next sync.  Lines are

    CRC LENGTH KIND PAYLOAD

with the CRC-32 and the length of what follows in eight hexadecimal digits each.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import attrs

CHUNK_BYTES = 2**18

#: Where in a line its kind is.
KIND = slice(18, 19)


@attrs.frozen(order=True)
class Place:
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


class Segments:
    """
    The files: appended to at the end, read from any place, deleted from the beginning.

    Makes the folder if there is none, and begins a new segment: what a dead process wrote is never
    appended to.  Everything raises OSError, making one also BlockingIOError when another process has the
    folder.
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

    def append(self, line: bytes) -> None:
        """Write one line.  Raises OSError if it could not be written whole."""
        if self._sizes[self.last] >= self._segment_bytes:
            full = self._file
            self._begin(self.last + 1)
            self._replaced.append(full)
        written = os.write(self._file, self._mend + line)
        self._sizes[self.last] += written
        self.size_bytes += written
        self._dirty = True
        whole = written == len(self._mend) + len(line)
        # The rest of a line that was torn must not become the beginning of the next.
        self._mend = b"" if whole else b"\n"
        if not whole:
            raise OSError(f"only {written} of {len(line)} bytes were written")

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
        """Sync and close."""
        try:
            self.sync()
        finally:
            os.close(self._file)
            os.close(self._folder_file)
