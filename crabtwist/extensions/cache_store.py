"""
Answers in the store, so that one node is given what another was.

A request waits for the store only as long as the configuration says, and not at all once the store has kept
one waiting that long, or failed: then it is left alone for a while.
"""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.internet.defer import CancelledError
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

#: How long a store that was slow or failed is not asked.
REST_SECONDS = 5.0

_NAMESPACE = "cache"

_log = Logger()


class KeptAnswer(msgspec.Struct, frozen=True):
    """A complete answer; `kept_at` is Unix time."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    length: int | None
    streamed: bool
    kept_at: float
    body: bytes


class AnswerStore:
    """The answers of all nodes; nothing here fails, at worst nothing is found."""

    def __init__(self, storage: Any, clock: IReactorTime, *, ttl_seconds: float, wait_seconds: float) -> None:
        self._storage = storage
        self._clock = clock
        self._ttl_seconds = ttl_seconds
        self._wait_seconds = wait_seconds
        self._not_before = 0.0

    async def find(self, key: bytes) -> KeptAnswer | None:
        """Return the answer under a key, None if there is none or it does not come in time."""
        if self._clock.seconds() < self._not_before:
            return None
        try:
            looking = self._storage.get(_NAMESPACE, key)
            data = await looking.addTimeout(self._wait_seconds, self._clock)
            return None if data is None else _decode(data)
        except CancelledError:
            raise
        except (Exception, DeferredTimeoutError) as error:
            self._rest(error)
            return None

    def keep(self, key: bytes, answer: KeptAnswer) -> None:
        """Keep an answer, in the background."""
        if self._clock.seconds() >= self._not_before:
            keeping = self._storage.set(_NAMESPACE, key, _encode(answer), self._ttl_seconds)
            keeping.addErrback(lambda failure: self._rest(failure.value))

    def _rest(self, error: BaseException) -> None:
        self._not_before = self._clock.seconds() + REST_SECONDS
        _log.warn(
            "the store with the cached answers is left alone for {seconds} s: {error!r}",
            seconds=REST_SECONDS,
            error=error,
        )


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KeptAnswer).decode
