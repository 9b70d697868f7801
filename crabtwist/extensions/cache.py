"""
The `cache` extension: who asks what was asked before is given the answer that was given then.

Whoever asks the same while it is still being answered shares that answer: one upstream call, from whose
beginning everybody reads at a pace of their own.  Streams are kept and given again as streams.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Coroutine
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import attrs
import msgspec

from crabtwist.extension import Extension
from crabtwist.extensions.cache_store import AnswerStore, KeptAnswer
from crabtwist.recording import SLICE_BYTES, Recording
from crabtwist.settings import positive
from crabtwist.values import Answer, Context, Headers

#: Says on every answer where it is from.
CACHE = b"x-crabtwist-cache"

#: What an entry takes beside its answer's body: its key, a head of two dozen fields, its place in the order.
ENTRY_BYTES = 8192

#: Fields that change what a vendor answers, by their beginnings.
_DECISIVE = (b"anthropic-", b"openai-")


@attrs.frozen(kw_only=True)
class CacheSettings:
    """
    What is kept, for how long and for whom.

    `scope` "key" gives each key a cache of its own, "shared" all keys the same one.  With `match` "exact"
    bodies are the same if their bytes are; with "meaning" if they say the same in JSON, whatever name the
    model has in them, and the members that `ignore` names (of the outermost object) left out.  An answer
    larger than `max_entry_bytes` is not kept.  With `in_store` answers are kept in the store as well, where
    other nodes find them; whoever asks waits for it up to `store_wait_seconds`.
    """

    ttl_seconds: float = attrs.field(default=3600.0, validator=positive)
    max_entries: int = attrs.field(default=10000, validator=positive)
    max_bytes: int = attrs.field(default=67108864, validator=positive)
    max_entry_bytes: int = attrs.field(default=1048576, validator=positive)
    scope: Literal["key", "shared"] = "key"
    match: Literal["exact", "meaning"] = "exact"
    ignore: tuple[str, ...] = ()
    in_store: bool = False
    store_wait_seconds: float = attrs.field(default=0.05, validator=positive)

    def __attrs_post_init__(self) -> None:
        if self.ignore and self.match == "exact":
            raise ValueError('`ignore` needs `match = "meaning"`: exact bytes hold all members')


class _Entry:
    """
    One answer; `kept_at` is None until it is complete.

    A small plain one that is complete is an `answer`, and no recording any more: there may be thousands,
    and what they are made of is looked at again and again by Python's garbage collection.
    """

    __slots__ = ("answer", "cache", "kept_at", "key", "recording", "size_bytes")

    def __init__(self, cache: CacheExtension, key: bytes, max_bytes: int) -> None:
        self.cache = cache
        self.key = key
        self.recording: Recording | None = Recording(max_bytes, self)
        self.answer: Answer | None = None
        self.size_bytes = ENTRY_BYTES
        self.kept_at: float | None = None

    def grown(self, more: int) -> None:
        """Count bytes that came or went."""
        self.cache.grown(self, more)

    def settled(self, *, whole: bool) -> None:
        """Keep the answer, or forget it."""
        self.cache.settled(self, whole=whole)


@attrs.frozen
class _Wish:
    """What a client's Cache-Control says (RFC 9111, 5.2.1), as far as it is honoured."""

    no_cache: bool = False
    no_store: bool = False
    max_age_seconds: float = float("inf")


class CacheExtension(Extension):
    """Keeps complete answers with status 200; the least recently used leave when there is no room."""

    name = "cache"
    Settings = CacheSettings

    def __init__(self, settings: CacheSettings, services: Any) -> None:
        self.size_bytes = 0
        self._settings = settings
        self._clock = services.clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        services.show("cache_entries", "Answers that are kept or on their way.", lambda: len(self))
        services.show("cache_bytes", "What they take in memory.", lambda: self.size_bytes)
        self._store: AnswerStore | None = None
        if settings.in_store:
            self._store = AnswerStore(
                services.storage,
                services.clock,
                ttl_seconds=settings.ttl_seconds,
                wait_seconds=settings.store_wait_seconds,
            )

    def __len__(self) -> int:
        """How many answers are kept or on their way."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything; what is on its way still arrives where it is awaited."""
        for key in list(self._entries):
            self._drop(key)

    def on_cache_lookup(
        self, context: Context, body: bytes
    ) -> Answer | Recording | Coroutine[Any, Any, Recording] | None:
        """Return what others were given, or are being given now, or something to record the answer in."""
        wish = _wish(context.headers)
        if wish.no_store:
            context.answer_headers[CACHE] = b"bypass"
            return None
        key = self._key(context, body)
        entry = None if wish.no_cache else self._usable(key, wish)
        recording = None
        if entry is not None:
            self._entries.move_to_end(key)
            recording = entry.recording
            if recording is None or recording.led:
                context.answer_headers[CACHE] = b"hit"
                return recording or entry.answer
        context.answer_headers[CACHE] = b"bypass" if wish.no_cache else b"miss"
        # One that nobody leads yet may still be found in the store.
        recording = recording or self._new(key)
        if self._store is None or wish.no_cache:
            return recording
        return self._looked_for(self._store, key, recording, context, wish)

    async def _looked_for(
        self, store: AnswerStore, key: bytes, recording: Recording, context: Context, wish: _Wish
    ) -> Recording:
        """Return a recording, played from the store if that has the answer."""
        kept = await store.find(key)
        entry = self._entries.get(key)
        if recording.led and recording.open:
            # Somebody else has begun to ask meanwhile, or has found it.
            context.answer_headers[CACHE] = b"hit"
        if kept is None or entry is None or entry.recording is not recording or recording.led:
            return recording
        if self._clock.seconds() - kept.kept_at <= min(wish.max_age_seconds, self._settings.ttl_seconds):
            entry.kept_at = kept.kept_at
            _play(kept, recording)
            context.answer_headers[CACHE] = b"hit"
        return recording

    def _usable(self, key: bytes, wish: _Wish) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None or (entry.recording is not None and not entry.recording.open):
            return None
        age_seconds = 0.0 if entry.kept_at is None else self._clock.seconds() - entry.kept_at
        if age_seconds >= self._settings.ttl_seconds:
            self._drop(key)
            return None
        return entry if age_seconds <= wish.max_age_seconds else None

    # What is kept.

    def _new(self, key: bytes) -> Recording:
        self._drop(key)
        entry = self._entries[key] = _Entry(self, key, self._settings.max_entry_bytes)
        recording = entry.recording
        assert recording is not None, "it has just been made"
        self.size_bytes += ENTRY_BYTES
        self._make_room()
        return recording

    def grown(self, entry: _Entry, more: int) -> None:
        """Count bytes that came to an entry, or went."""
        if self._entries.get(entry.key) is entry:
            entry.size_bytes += more
            self.size_bytes += more
            self._make_room()

    def settled(self, entry: _Entry, *, whole: bool) -> None:
        """Keep what is whole and complete; forget anything else."""
        recording = entry.recording
        if recording is None or self._entries.get(entry.key) is not entry:
            return
        if not whole:
            self._drop(entry.key)
            return
        if entry.kept_at is None:
            entry.kept_at = self._clock.seconds()
            if self._store is not None and recording.body is not None:
                self._store.keep(entry.key, _kept(recording, recording.body, entry.kept_at))
        if recording.answer is not None:
            entry.answer, entry.recording = recording.answer, None

    def _make_room(self) -> None:
        settings = self._settings
        while len(self._entries) > settings.max_entries or self.size_bytes > settings.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= entry.size_bytes
            recording, entry.recording = entry.recording, None
            if recording is not None:
                # Those who still read it need no more than what they have not read.
                recording.overflow()

    # What is the same.

    def _key(self, context: Context, body: bytes) -> bytes:
        settings = self._settings
        whose = (context.principal or "") if settings.scope == "key" else ""
        kind = "stream" if context.stream else "plain"
        said = body if settings.match == "exact" else _meaning(body, settings.ignore)
        decisive = sorted(
            [(n, value) for name, value in context.headers if (n := name.lower()).startswith(_DECISIVE)]
        )
        digest = _begun(
            whose, context.operation, context.dialect, context.model, kind, context.query, *decisive
        ).copy()
        digest.update(said)
        return digest.digest()


@lru_cache(maxsize=256)
def _begun(*words: object) -> blake2b:
    """Return the digest of what is asked for beside the body; the same for most requests of one client."""
    # What repr makes of strings and bytes is quoted, so no two ways of dividing them look the same.
    return blake2b(repr(words).encode(), digest_size=32)


def _kept(recording: Recording, body: bytes, kept_at: float) -> KeptAnswer:
    return KeptAnswer(
        recording.status, recording.headers, recording.length, recording.streamed, kept_at, body
    )


def _play(kept: KeptAnswer, recording: Recording) -> None:
    recording.lead(lambda: None)
    if kept.streamed or len(kept.body) > SLICE_BYTES:
        recording.begin(kept.status, kept.headers, kept.length, streamed=kept.streamed)
        recording.write(kept.body)
        recording.finish()
    else:
        recording.take(Answer(kept.status, kept.headers, kept.body))
    recording.settle(complete=True)


def _meaning(body: bytes, ignored: tuple[str, ...]) -> bytes:
    try:
        said = msgspec.json.decode(body)
        # Aliases have been followed: the model is in the key by its own name.
        kept = {name: value for name, value in said.items() if name != "model" and name not in ignored}
        return msgspec.json.encode(kept, order="sorted")
    except (ValueError, RecursionError):
        return body


def _wish(fields: Headers) -> _Wish:
    values = [value for name, value in fields if len(name) == 13 and name.lower() == b"cache-control"]
    if not values:
        return _ANYTHING
    said = b",".join(values).lower()
    words = [word.strip() for word in said.split(b",")]
    ages = [word[8:] for word in words if word.startswith(b"max-age=") and word[8:].isdigit()]
    return _Wish(
        no_cache=b"no-cache" in words,
        no_store=b"no-store" in words,
        max_age_seconds=min(map(float, ages), default=_ANYTHING.max_age_seconds),
    )


_ANYTHING = _Wish()
