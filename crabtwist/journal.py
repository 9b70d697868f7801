"""
What happened to every request, written down on this machine before anybody else is told.

A line of the kind `R` is a reservation, `S` a settled record, `D` the place up to which a ledger has
confirmed everything, all as JSON; segments before that place are deleted.  A line that is torn is passed
over.  What was written survives the death of the process; a power cut takes the last `sync_seconds`.

A reservation is written when it is made, for the request may be upstream a moment later: a transport's
bytes leave when the reactor polls, and nothing is sure to happen before that (a call in 0 seconds that is
made by a timed call comes after the next poll).  A settlement waits for the next reservation or the end of
the reactor's turn, whichever comes first, so that several are one write.  If the process dies before that,
the request is still reserved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import msgspec
from twisted.internet.defer import Deferred, DeferredLock, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from crabtwist.errors import ConfigurationError
from crabtwist.records import (
    Record,
    Reservation,
    decode_record,
    decode_reservation,
    encode,
    microseconds,
)
from crabtwist.segments import CutShort, Place, Segments, frame, unframe, unframed

MAX_BYTES = 256 * 2**20
SEGMENT_BYTES = 8 * 2**20
SYNC_SECONDS = 0.1

#: What is kept free for the record of each request that is reserved; most need a tenth of it.
SETTLEMENT_BYTES = 4096

#: A batch is read at once, on the reactor's thread; this much takes a few milliseconds.
BATCH_BYTES = 2**20
#: As many settled records are remembered, so that those are not read again that are delivered in time.
MOST_FRESH = 2000

#: The alarm is over when the journal is no fuller than this.
ROOM_AGAIN = 0.9

RESERVED, SETTLED, DELIVERED = b"R", b"S", b"D"

#: Runs a blocking function somewhere else and fires with what it returns.
InThread = Callable[[Callable[[], None]], Deferred[Any]]


@attrs.frozen
class Batch:
    """
    Records that were not delivered yet, oldest first, and the place after them.

    `settled` counts their lines, those that are unreadable included.  `last` says that the journal had no
    more when they were read.
    """

    records: tuple[Record, ...]
    settled: int
    end: Place
    last: bool


@attrs.frozen
class Recovery:
    """
    What was found at the start.

    `undelivered` counts the records that no ledger has confirmed, `interrupted` those among them that were
    made for requests that were never settled, and `torn` the lines that were unreadable.
    """

    undelivered: int
    interrupted: int
    torn: int


class _Named(msgspec.Struct):
    id: str


#: A reservation's line, and the segment that it is in.
_Reserved = tuple[bytes, int]


class Journal:
    """
    The journal of one node, in a folder of its own.

    `clock` times the writes and the syncs; `in_thread` runs the syncs.  Beyond `max_bytes` what is there is
    kept and what comes is dropped: `dropped_reservations` and `dropped_records` count that, and should alarm
    somebody.  A request whose reservation was written has room for its record.  `undelivered` counts the
    records that no ledger has confirmed, `failed_syncs` the syncs that the disk refused.

    `open` first and `close` last; nothing else raises anything, for requests do not wait for the disk.
    """

    _log = Logger()

    def __init__(
        self,
        folder: Path,
        clock: IReactorTime,
        in_thread: InThread,
        *,
        max_bytes: int = MAX_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        sync_seconds: float = SYNC_SECONDS,
    ) -> None:
        self.dropped_reservations = 0
        self.dropped_records = 0
        self.failed_syncs = 0
        self.undelivered = 0
        self._folder = folder
        self._in_thread = in_thread
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._sync_seconds = sync_seconds
        self._clock = clock
        self._turn_ends = False
        self._syncing = LoopingCall(self._sync)
        self._syncing.clock = clock
        self._sync_lock = DeferredLock()
        self._segments: Segments | None = None
        self._open: dict[str, _Reserved] = {}
        # Whose settlements wait to be written, each with the reservation that it had.
        self._waiting: list[tuple[str, _Reserved | None]] = []
        # Either all that is undelivered, each with the place after it, or nothing.
        self._fresh: deque[tuple[Record, Place]] = deque()
        self._place = Place(0, 0)
        self._dropping = False

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk, or will in a moment."""
        return 0 if self._segments is None else self._segments.size_bytes

    # Opening and closing.

    def open(self) -> Recovery:
        """
        Open it, and settle whatever an earlier process left unsettled, as interrupted.

        Blocks for as long as reading the old segments takes.  Raises `ConfigurationError` when the folder
        cannot be used.
        """
        try:
            segments = self._segments = Segments(self._folder, self._segment_bytes)
            torn = self._read_old(segments)
            interrupted = self._settle_open(microseconds(segments.last_written_at))
            self._flush()
        except BlockingIOError:
            raise ConfigurationError([f"{self._folder}: another process has this journal"]) from None
        except OSError as error:
            raise ConfigurationError([f"{self._folder}: {error}"]) from error
        self._syncing.start(self._sync_seconds, now=False)
        found = Recovery(self.undelivered, interrupted, torn)
        if found != Recovery(0, 0, 0):
            self._log.warn(
                "the journal holds {undelivered} undelivered records, {interrupted} of them of requests "
                "that the last end interrupted; {torn} torn lines were passed over",
                **attrs.asdict(found),
            )
        return found

    def _read_old(self, segments: Segments) -> int:
        torn = 0
        settled: deque[Place] = deque()
        for line, end in segments.lines(Place(0, 0)):
            try:
                kind, payload = unframe(line)
                if kind == RESERVED:
                    self._open[_NAMES.decode(payload).id] = (line + b"\n", end.segment)
                elif kind == SETTLED:
                    settled.append(end)
                    self._open.pop(_NAMES.decode(payload).id, None)
                elif kind == DELIVERED:
                    self._place = max(self._place, _PLACES.decode(payload))
            except ValueError:
                torn += 1
            while settled and settled[0] <= self._place:
                settled.popleft()
        self.undelivered = len(settled)
        return torn

    def _settle_open(self, ended_at: int) -> int:
        left = list(self._open.items())
        for name, (line, _) in left:
            _, payload = unframe(line.removesuffix(b"\n"))
            try:
                reservation = decode_reservation(payload)
            except ValueError:
                reservation = Reservation(id=name)
            self.settle(reservation.interrupted(ended_at))
        return len(left)

    def close(self) -> Deferred[None]:
        """Bring everything to the disk and let go of the folder; what comes later is dropped."""
        if self._syncing.running:
            self._syncing.stop()
        self._flush()
        segments, self._segments = self._segments, None
        if segments is None:
            return succeed(None)
        closing: Deferred[None] = self._sync_lock.run(self._in_thread, segments.close)
        return closing

    def _sync(self) -> Deferred[None] | None:
        self._flush()
        if self._segments is None or not self._segments.needs_sync:
            return None
        syncing: Deferred[None] = self._sync_lock.run(self._in_thread, self._segments.sync)
        return syncing.addErrback(self._sync_failed)

    def _sync_failed(self, failure: Failure) -> None:
        self.failed_syncs += 1
        self._log.failure("the journal was not brought to the disk", failure)

    # Writing.

    def reserve(self, reservation: Reservation) -> None:
        """Note a request that goes upstream, before it does; its latest reservation counts."""
        line = self._line(RESERVED, reservation)
        if line is not None and self._has_room(line) and self._write(line):
            assert self._segments is not None
            self._open[reservation.id] = (line, self._segments.last)
        else:
            self.dropped_reservations += 1

    def settle(self, record: Record) -> None:
        """Note how a request ended; once, reserved or not.  In the file by the end of the reactor's turn."""
        line = self._line(SETTLED, record)
        reserved = record.id in self._open
        if line is not None and (reserved or self._has_room(line)) and self._append(line):
            self._remember(record)
            self.undelivered += 1
            self._waiting.append((record.id, self._open.pop(record.id, None)))
            if not self._turn_ends:
                self._turn_ends = True
                self._clock.callLater(0, self._end_turn)
        else:
            # What was reserved stays so: the next start finds it.
            self.dropped_records += 1

    def _drop(self, name: str, reserved: _Reserved | None) -> None:
        """Take the newest settlement back, which was not written."""
        if self._fresh:
            self._fresh.pop()
        self.undelivered -= 1
        if reserved is not None:
            self._open[name] = reserved
        self.dropped_records += 1

    def _remember(self, record: Record) -> None:
        assert self._segments is not None, "it was just written to"
        if len(self._fresh) == self.undelivered < MOST_FRESH:
            self._fresh.append((record, self._segments.end))
        else:
            self._fresh.clear()

    def _line(self, kind: bytes, kept: Record | Reservation) -> bytes | None:
        try:
            return frame(kind, encode(kept))
        except Exception:
            self._log.failure("{id!r} cannot be written down", id=kept.id)
            return None

    def _has_room(self, line: bytes) -> bool:
        promised = (len(self._open) + 1) * SETTLEMENT_BYTES
        if self.size_bytes + len(line) + promised <= self._max_bytes:
            return True
        self._alarm(f"it has {self.size_bytes} bytes, and may have {self._max_bytes}")
        return False

    def _write(self, line: bytes) -> bool:
        return self._append(line) and self._flush()

    def _append(self, line: bytes) -> bool:
        if self._segments is None:
            self._alarm("it is not open")
            return False
        if self._segments.full:
            self._flush()
            try:
                self._segments.begin_next()
            except OSError as error:
                self._alarm(str(error))
                return False
        self._segments.append(line)
        return True

    def _end_turn(self) -> None:
        self._turn_ends = False
        self._flush()

    def _flush(self) -> bool:
        """Write what waits, and drop the settlements that the disk does not take; say if it took all."""
        if self._segments is None:
            return False
        waiting, self._waiting = self._waiting, []
        try:
            self._segments.flush()
        except CutShort as error:
            for each in reversed(waiting[error.whole :]):
                self._drop(*each)
            self._alarm(str(error))
            return False
        return True

    def _alarm(self, why: str) -> None:
        if not self._dropping:
            self._dropping = True
            self._log.critical("the journal in {folder} drops records: {why}", folder=self._folder, why=why)

    # Delivering.

    def find(self, request_id: str) -> Record | None:
        """Return a record that was not delivered yet, if it is remembered; None for what may be elsewhere."""
        return next((record for record, _ in reversed(self._fresh) if record.id == request_id), None)

    def read(self, most_records: int) -> Batch:
        """Return the oldest undelivered records; the same again until they are `delivered`."""
        self._flush()
        records: list[Record] = []
        settled, place, unread = 0, self._place, BATCH_BYTES
        if self._segments is None:
            return Batch((), 0, place, last=True)
        if self._fresh:
            return self._fresh_batch(most_records, self._segments)
        for line, end in self._segments.lines(self._place):
            place = end
            kind, payload = unframed(line)
            if kind == SETTLED:
                settled += 1
                records += self._record(payload)
            unread -= len(line)
            if settled >= most_records or unread <= 0:
                return Batch(tuple(records), settled, place, last=False)
        # Also past the segments that are empty, so that they go like the rest.
        place = max(place, Place(self._segments.last, 0))
        return Batch(tuple(records), settled, place, last=True)

    def _fresh_batch(self, most_records: int, segments: Segments) -> Batch:
        taken = list(islice(self._fresh, most_records))
        records = tuple(record for record, _ in taken)
        last = len(taken) == len(self._fresh)
        place = taken[-1][1]
        return Batch(records, len(taken), max(place, Place(segments.last, 0)) if last else place, last)

    def _record(self, payload: bytes) -> list[Record]:
        try:
            return [decode_record(payload)]
        except ValueError as error:
            self._log.error("a record in the journal is unreadable: {error}", error=error)
            return []

    def delivered(self, batch: Batch) -> None:
        """Note that a ledger has the records of a batch, and never return them again."""
        self._place = batch.end
        self.undelivered -= batch.settled
        for _ in range(batch.settled if self._fresh else 0):
            self._fresh.popleft()
        noted = not batch.settled or self._write(frame(DELIVERED, msgspec.json.encode(batch.end)))
        if noted and self._carried_over():
            assert self._segments is not None
            self._segments.delete_before(self._place.segment)
        if self._dropping and noted and self.size_bytes < self._max_bytes * ROOM_AGAIN:
            self._dropping = False
            self._log.info("the journal in {folder} has room again", folder=self._folder)

    def _carried_over(self) -> bool:
        """Write open reservations of delivered segments again, so that these can be deleted."""
        for name, (line, segment) in list(self._open.items()):
            if segment < self._place.segment:
                if not self._write(line):
                    return False
                assert self._segments is not None
                self._open[name] = (line, self._segments.last)
        return self._segments is not None


_NAMES = msgspec.json.Decoder(_Named)
_PLACES = msgspec.json.Decoder(Place)
