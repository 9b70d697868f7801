"""Keys that were made through the admin API, as the store keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import msgspec

from crabtwist.keys import Digest, KeyTerms, VirtualKey, digest_of, generate_key
from crabtwist.settings import read

#: How many secrets a key may have at once: the newest, and those that it is being rotated away from.
MOST_SECRETS = 5

#: How much of a secret is shown, so that people know which one they have.
HINT_LETTERS = 4


class _Kept(msgspec.Struct):
    """The JSON of a key."""

    name: str
    terms: dict[str, Any]
    secrets: list[_KeptSecret]
    created_at: float


class _KeptSecret(msgspec.Struct):
    digest: str
    hint: str
    until: float | None = None


@attrs.frozen
class StoredSecret:
    """What is kept of one secret: its digest, and its last letters as a `hint`."""

    digest: Digest
    hint: str


@attrs.frozen
class StoredKey:
    """A key; `secrets` are the newest first, `created_at` is Unix time."""

    name: str
    terms: KeyTerms
    secrets: tuple[StoredSecret, ...]
    created_at: float

    @property
    def virtual(self) -> VirtualKey:
        """The key as requests know it."""
        return self.terms.virtual_key(self.name)

    @property
    def digests(self) -> tuple[Digest, ...]:
        """What recognises it."""
        return tuple(secret.digest for secret in self.secrets)

    def rotated(self, digest_key: bytes, now: float, overlap_seconds: float) -> tuple[StoredKey, str]:
        """Return it with a new secret, and that; the others open it for `overlap_seconds` more at most."""
        until = now + overlap_seconds
        old = [
            StoredSecret(Digest(s.digest.digest, min(until, s.digest.until or until)), s.hint)
            for s in self.secrets
            if s.digest.until is None or s.digest.until > now
        ]
        secret, kept = _new_secret(digest_key)
        kept_ones = (kept, *(old if overlap_seconds > 0 else []))
        return attrs.evolve(self, secrets=kept_ones[:MOST_SECRETS]), secret

    def encode(self) -> bytes:
        """Return the JSON to keep."""
        secrets = [_KeptSecret(s.digest.digest.hex(), s.hint, s.digest.until) for s in self.secrets]
        return msgspec.json.encode(_Kept(self.name, table_of(self.terms), secrets, self.created_at))


def issue(name: str, terms: KeyTerms, digest_key: bytes, now: float) -> tuple[StoredKey, str]:
    """Return a new key, and its secret, which nobody can be shown again."""
    secret, kept = _new_secret(digest_key)
    return StoredKey(name, terms, (kept,), now), secret


def decode(data: bytes) -> StoredKey:
    """Return what `encode` was given; raises ValueError for what this version cannot read."""
    kept = msgspec.json.decode(data, type=_Kept)
    complaints: list[str] = []
    terms = read(KeyTerms, kept.terms, kept.name, complaints)
    if terms is None:
        raise ValueError("; ".join(complaints))
    secrets = tuple(
        StoredSecret(Digest(bytes.fromhex(each.digest), each.until), each.hint) for each in kept.secrets
    )
    return StoredKey(kept.name, terms, secrets, kept.created_at)


def table_of(terms: attrs.AttrsInstance) -> dict[str, Any]:
    """Return settings as a table that reads as they do: without what is None or empty."""
    found = attrs.asdict(terms, recurse=False)
    tables = {name: _as_written(value) for name, value in found.items()}
    return {name: value for name, value in tables.items() if value is not None and value != {}}


def _as_written(value: Any) -> Any:
    if attrs.has(type(value)):
        return table_of(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _new_secret(digest_key: bytes) -> tuple[str, StoredSecret]:
    secret = generate_key()
    return secret, StoredSecret(Digest(digest_of(secret, digest_key)), secret[-HINT_LETTERS:])
