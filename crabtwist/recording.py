"""
One answer as it comes, for all who ask the same at that time, and for those who ask later.

The first of them leads: it asks the upstream and pours the answer in here.  All of them, that first one
too, read from here, each at its own pace; the upstream waits when nobody wants more.  Nobody's leaving
ends it but the last one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.defer import fail as failed
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from crabtwist.errors import AnswerBroken, UpstreamError
from crabtwist.recording_reader import Reader
from crabtwist.values import Answer, Headers

#: How an answer ends that is whole.
_WHOLE = Failure(ResponseDone())

#: What a reader is given at a time, so that it can say that it has enough.
SLICE_BYTES = 64 * 1024


class Keeper(Protocol):
    """Whoever keeps a recording, so that it can be given again."""

    def grown(self, more: int) -> None:
        """Learn how many bytes came, or went if it is negative."""

    def settled(self, *, whole: bool) -> None:
        """Learn, once, that it has ended, and whether it is whole and complete: it may be given again."""


class _Nobody:
    def grown(self, more: int) -> None:
        pass

    def settled(self, *, whole: bool) -> None:
        pass


_NOBODY = _Nobody()


class Recording:
    """
    An answer that is shared.

    Of an answer that grows beyond `max_bytes` only what some reader still wants is kept; `whole` is then
    False, nobody new may follow it, and the upstream waits for the slowest of its readers.  `led` says
    whether somebody asks for it, `deserted` whether everybody left before its end.  `status`, `headers`,
    `length` (in bytes, None if nobody knows) and `streamed` are known when it has begun.  `answer` is one
    that was taken whole, None for any other.

    A cache makes it, is its `keeper`, and gives it to all who ask the same; it is followed, then led (for
    whoever leads reads as well), then `begin` and the methods of a `crabtwist.relay.Sink` say what comes, or
    `take` all of it at once, and `settle` that this was it; or `fail` says that nothing comes.
    """

    # Here and not set for each: a cache makes one for each request, and most need little of it.
    status = 0
    headers: Headers = ()
    length: int | None = None
    streamed = False
    answer: Answer | None = None
    whole = True
    led = False
    deserted = False
    _on_deserted: Callable[[], object] | None = None
    _begun = False
    _is_held = False
    _ended: Failure | None = None
    _error: Exception | None = None
    # The first of the slices is the one after `_dropped` others.
    _dropped = 0
    _size = 0
    _producer: Any = None
    _paused = False

    def __init__(self, max_bytes: int, keeper: Keeper = _NOBODY) -> None:
        self._max_bytes = max_bytes
        self._keeper = keeper
        self._slices: list[bytes] = []
        self._waiting: list[Deferred[Reader | Answer]] = []
        self._readers: list[Reader] = []

    # For a cache.

    @property
    def open(self) -> bool:
        """Whether one more may follow: it is here from its beginning, and comes or came to a good end."""
        return self.whole and not self._broken and (not self.deserted or self._ended is not None)

    def overflow(self) -> None:
        """Keep no more than what its readers still want: there is no room, or no use."""
        self.whole = False
        self._max_bytes = min(self._max_bytes, SLICE_BYTES)
        self.look_again()

    @property
    def size_bytes(self) -> int:
        """How much of its body is kept."""
        return self._size

    # Leading.

    def lead(self, on_deserted: Callable[[], object]) -> None:
        """Take it on; `on_deserted` is called when the last of those who followed has left before the end."""
        self.led = True
        self._on_deserted = on_deserted

    def hold(self) -> None:
        """Count whoever leads as one more who waits."""
        self._is_held = True

    def let_go(self) -> None:
        """Count it no more; harmless afterwards."""
        if self._is_held:
            self._is_held = False
            self._one_less()

    def begin(self, status: int, headers: Headers, length: int | None, *, streamed: bool) -> None:
        """Say the head; before the body is poured in."""
        self.status, self.headers, self.length, self.streamed = status, headers, length, streamed
        self._begin()

    def take(self, answer: Answer) -> None:
        """Take a plain answer that is here and whole, in the place of all that a sink is told."""
        self.answer = answer
        self.status, self.headers, self.length = answer.status, answer.headers, len(answer.body)
        self._ended = _WHOLE
        self._size = len(answer.body)
        self.whole = self._size <= self._max_bytes
        self._keeper.grown(self._size)

    def _begin(self) -> None:
        self._begun = True
        waiting, self._waiting = self._waiting, []
        # All readers are there before the first reads, which may leave at once.
        for ready, reader in [(each, self._reader()) for each in waiting]:
            if ready.called:
                reader.stopProducing()
            else:
                ready.callback(reader)

    def _give(self, answer: Answer) -> None:
        self._begun = True
        waiting, self._waiting = self._waiting, []
        for ready in waiting:
            if not ready.called:
                ready.callback(answer)

    def fail(self, error: Exception) -> None:
        """Tell everybody that there will be no answer, or no more of it."""
        self._error = error
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.called:
                each.errback(error)
        self._end(Failure(error))
        self._keeper.settled(whole=False)

    def settle(self, *, complete: bool) -> None:
        """Say whether what came was all of it; after its end.  What was taken whole is given on only now."""
        if self._ended is None:
            self._end(Failure(AnswerBroken("the request that this one shared its answer with broke off")))
        self._on_deserted = None
        self._keeper.settled(whole=complete and self.whole and not self._broken)
        if self.answer is not None:
            self._give(self.answer)

    # A relay's sink.

    def write(self, data: bytes) -> None:
        """Take some of the body."""
        self._slices += [data[i : i + SLICE_BYTES] for i in range(0, len(data), SLICE_BYTES)]
        self._size += len(data)
        for reader in list(self._readers):
            reader.read()
        self._keeper.grown(len(data))
        if self._size > self._max_bytes:
            self.whole = False
        self.look_again()

    def remark(self, data: bytes) -> None:
        """Ignore what is no part of the answer: each reader's own relay says such things."""

    def finish(self, error: UpstreamError | None = None) -> None:
        """End it as the upstream did, or for lack of the rest."""
        self._end(_WHOLE if error is None else Failure(error))

    def abort(self, error: UpstreamError | None = None) -> None:
        """End it as broken."""
        self._end(Failure(error or AnswerBroken("the shared answer broke off")))

    def brake(self, producer: object) -> None:
        """Pause and resume `producer` as the readers demand."""
        self._producer = producer
        self._weigh()

    def release(self) -> None:
        """Let the producer go."""
        self._producer = None

    def _end(self, reason: Failure) -> None:
        if self._ended is not None:
            return
        self._ended = reason
        self._producer = None
        for reader in list(self._readers):
            reader.read()

    @property
    def _broken(self) -> bool:
        return self._error is not None or (self._ended is not None and self._ended is not _WHOLE)

    # Following.

    def follow(self) -> Deferred[Reader | Answer]:
        """
        Return a Deferred of the answer, from its beginning: one that came whole, or a body to be read.

        It fires when the head is known, and fails as the asking did if there will be none.  One that has
        begun must be `open`.
        """
        if self._error is not None:
            return failed(self._error)
        if self.answer is not None and self._begun:
            return succeed(self.answer)
        if self._begun:
            assert not self._dropped, "its beginning is gone"
            return succeed(self._reader())
        ready: Deferred[Reader | Answer] = Deferred(self._stop_waiting)
        self._waiting.append(ready)
        return ready

    def _stop_waiting(self, ready: Deferred[Reader | Answer]) -> None:
        if ready in self._waiting:
            self._waiting.remove(ready)
            self._one_less()

    def _reader(self) -> Reader:
        reader = Reader(self)
        self._readers.append(reader)
        return reader

    # For the readers.

    @property
    def body(self) -> bytes | None:
        """The whole body, None while it is not, and for one whose beginning is gone."""
        if self.answer is not None:
            return self.answer.body
        whole = self._ended is not None and not self._broken and not self._dropped
        return b"".join(self._slices) if whole else None

    def at(self, position: int) -> bytes | None:
        """Return the slice of the body at a position, None if it has not come yet."""
        index = position - self._dropped
        return self._slices[index] if index < len(self._slices) else None

    @property
    def ended(self) -> Failure | None:
        """How it ended, None if it has not."""
        return self._ended

    def drop(self, reader: Reader) -> None:
        """Forget a reader that has left, or has all."""
        if reader in self._readers:
            self._readers.remove(reader)
            self._one_less()

    def _one_less(self) -> None:
        if self._readers or self._waiting or self._is_held:
            self.look_again()
        elif self._ended is None:
            self.deserted = True
            if self._on_deserted is not None:
                self._on_deserted()
        else:
            self._join_slices()
            self.look_again()

    # What is kept, and who waits.

    def look_again(self) -> None:
        """Drop what nobody wants any more, and see who wants more: a reader has come, gone or paused."""
        self._trim()
        self._weigh()

    def _trim(self) -> None:
        """Forget what everybody has read, once nobody new can ask for it."""
        if self.whole or not self._begun:
            return
        here = self._dropped + len(self._slices)
        read = min((reader.position for reader in self._readers), default=here) - self._dropped
        if read:
            gone = sum(map(len, self._slices[:read]))
            del self._slices[:read]
            self._dropped += read
            self._size -= gone
            self._keeper.grown(-gone)

    def _join_slices(self) -> None:
        """Once everybody has gone, keep as few pieces as there may be: a stream comes in thousands."""
        if len(self._slices) > 1 + self._size // SLICE_BYTES:
            data = b"".join(self._slices)
            self._slices = [data[i : i + SLICE_BYTES] for i in range(0, len(data), SLICE_BYTES)]

    def _weigh(self) -> None:
        """Pause the upstream if nobody wants more, or one is too far behind to keep it all."""
        if self._producer is None:
            return
        enough = bool(self._readers) and all(reader.paused for reader in self._readers)
        too_much = not self.whole and self._size > self._max_bytes
        if (enough or too_much) and not self._paused:
            self._paused = True
            self._producer.pauseProducing()
        elif not (enough or too_much) and self._paused:
            self._paused = False
            self._producer.resumeProducing()
