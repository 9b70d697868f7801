"""
Virtual keys: who is asking, and which models they may ask for.

Keys that `generate_key` makes are 256 random bits.  There is nothing to guess in them, so a fast hash
protects them as well as a slow one would, and a request need not wait for a slow one.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping

import attrs

from crabtwist.errors import Refusal
from crabtwist.settings import (
    LONGEST_CREDENTIAL_BYTES,
    ONE_IS_ENOUGH,
    Secret,
    header_word,
    key_path,
    not_empty,
    word,
)
from crabtwist.terms import KeyBudgetSettings, LimitSettings, moment, unix_time

KEY_PREFIX = "sk-ct-"
EVERY_MODEL = "*"

# How much of a digest sorts the keys; the rest is compared in constant time.
_BUCKET_BYTES = 4


@attrs.frozen(kw_only=True)
class KeyTerms:
    """
    What a key may do, wherever it was made.

    `models` are names of models and aliases; "*" means all.  From `expires_at` on, and while it is
    `disabled`, it opens nothing.  `limits` and `budget` are for the extensions `rate_limit` and `budget`, in
    place of what these have for all keys.  `metadata` is for people.
    """

    models: tuple[str, ...] = attrs.field(default=(EVERY_MODEL,), validator=not_empty, metadata=ONE_IS_ENOUGH)
    expires_at: str | None = attrs.field(default=None, validator=moment)
    disabled: bool = False
    limits: LimitSettings | None = None
    budget: KeyBudgetSettings | None = None
    metadata: Mapping[str, str] = attrs.field(factory=dict)

    def virtual_key(self, name: str) -> VirtualKey:
        """Return the key of this name on these terms."""
        return VirtualKey(
            name=name,
            models=None if EVERY_MODEL in self.models else frozenset(self.models),
            expires_at=None if self.expires_at is None else unix_time(self.expires_at),
            disabled=self.disabled,
            limits=self.limits,
            budget=self.budget,
        )


@attrs.frozen(kw_only=True)
class KeySettings(KeyTerms):
    """One `[[keys]]` table: `key` is the secret that clients send."""

    name: str = attrs.field(validator=word)
    key: Secret = attrs.field(validator=header_word)

    @property
    def virtual(self) -> VirtualKey:
        """The key that it describes."""
        return self.virtual_key(self.name)


@attrs.frozen
class VirtualKey:
    """
    A key that was recognised.

    `name` is the principal.  `models` are the names of the models and aliases that it may use; None
    means all of them.  `expires_at` is Unix time, None for never.
    """

    name: str
    models: frozenset[str] | None
    expires_at: float | None = None
    disabled: bool = False
    limits: LimitSettings | None = None
    budget: KeyBudgetSettings | None = None

    def check(self, now: float) -> None:
        """Raise a 401 `Refusal` if it opens nothing at `now`, in Unix time."""
        if self.disabled:
            raise _unauthorized("key_disabled", f"the key {self.name!r} is disabled; ask whoever gave it out")
        if self.expires_at is not None and now >= self.expires_at:
            raise _unauthorized("key_expired", f"the key {self.name!r} has expired; ask for a new one")


@attrs.frozen
class Digest:
    """What is kept of a secret: its keyed digest, and until when it opens anything, None for ever."""

    digest: bytes
    until: float | None = None


class KeyRing:
    """
    The keys that are known, by keyed digests (HMAC-SHA256); the secrets themselves are not kept.

    `digest_key` is the key of the digests.  `others` are those beside the configuration's, each with its
    digests.  An empty ring recognises nobody.
    """

    def __init__(
        self,
        keys: Iterable[KeySettings],
        digest_key: bytes = b"",
        others: Iterable[tuple[VirtualKey, Iterable[Digest]]] = (),
    ) -> None:
        self._digest_key = digest_key
        self._buckets: dict[bytes, list[tuple[Digest, VirtualKey]]] = {}
        for settings in keys:
            self._add(settings.virtual, Digest(digest_of(settings.key.reveal(), digest_key)))
        for key, digests in others:
            for digest in digests:
                self._add(key, digest)

    def _add(self, key: VirtualKey, digest: Digest) -> None:
        self._buckets.setdefault(digest.digest[:_BUCKET_BYTES], []).append((digest, key))

    def __iter__(self) -> Iterator[VirtualKey]:
        """Yield each key once."""
        known = {key.name: key for bucket in self._buckets.values() for _, key in bucket}
        return iter(known.values())

    def authenticate(self, secret: bytes, now: float = 0.0) -> VirtualKey | None:
        """Return the key whose secret this is at `now`, in Unix time; None if there is no such key."""
        digest = hmac.digest(self._digest_key, secret, "sha256")
        for known, key in self._buckets.get(digest[:_BUCKET_BYTES], ()):
            if hmac.compare_digest(known.digest, digest):
                return key if known.until is None or now < known.until else None
        return None


def digest_of(secret: str, digest_key: bytes) -> bytes:
    """Return what is kept of a secret."""
    return hmac.digest(digest_key, secret.encode("ascii"), "sha256")


def allows(key: VirtualKey | None, *names: str) -> bool:
    """
    Return whether `key` may use a model that goes by all of `names`: as asked for, and as resolved.

    One listed name is enough.  A key that lists an alias may therefore use that alias, though not the
    model behind it by its own name; a key that lists a model may use it through any alias.  None, the
    key of nobody in a gateway that serves anybody, may use everything.
    """
    return key is None or key.models is None or not key.models.isdisjoint(names)


def unheeded(terms: KeyTerms, where: str, extensions: Collection[str]) -> list[str]:
    """Return complaints of terms that no extension would hold the key to; `where` is the key's path."""
    needed = {"limits": "rate_limit", "budget": "budget"}
    return [
        f"{key_path(where, name)}: nobody would hold the key to it; add [extensions.{extension}]"
        for name, extension in needed.items()
        if getattr(terms, name) is not None and extension not in extensions
    ]


def check_distinct(keys: Mapping[str, KeySettings], complaints: list[str]) -> None:
    """Complain of keys that share a name or a secret; `keys` are by their paths in the configuration."""
    names: dict[str, str] = {}
    held: dict[Secret, str] = {}
    for where, key in keys.items():
        if names.setdefault(key.name, where) != where:
            complaints.append(f'{where}.name: {names[key.name]} is called "{key.name}" already')
        if held.setdefault(key.key, where) != where:
            complaints.append(f"{where}.key: is the same as that of {held[key.key]}; generate another")


def credential(authorization: Iterable[bytes], x_api_key: Iterable[bytes]) -> bytes:
    """
    Return the secret in a request's `Authorization` and `x-api-key` fields, given by their values.

    `x-api-key: SECRET` and `Authorization: Bearer SECRET` (the scheme in any case, RFC 9110 section
    11.1) are equals; both may be sent with the same secret.  Other schemes are ignored beside an
    `x-api-key`.  Raises a 401 `Refusal` when there is no secret, when two differ, for another scheme
    alone, and for more than 1024 bytes.
    """
    offered = {value.strip() for value in x_api_key}
    offered.discard(b"")
    may_be_foreign = bool(offered)
    for value in authorization:
        scheme, token = (*value.split(None, 1), b"", b"")[:2]
        if scheme.lower() == b"bearer":
            offered.add(token.strip())
        elif scheme and not may_be_foreign:
            raise _unauthorized(
                "credential_scheme", "Authorization must be `Bearer KEY`; other schemes are not accepted"
            )
    offered.discard(b"")
    if not offered:
        raise _unauthorized(
            "credential_missing", "no key: send `x-api-key: KEY` or `Authorization: Bearer KEY`"
        )
    if len(offered) > 1:
        raise _unauthorized(
            "credentials_differ",
            "the request carries keys that differ, in x-api-key or Authorization; send one",
        )
    (secret,) = offered
    if len(secret) > LONGEST_CREDENTIAL_BYTES:
        raise _unauthorized("credential_too_long", f"the key is longer than {LONGEST_CREDENTIAL_BYTES} bytes")
    return secret


def generate_key() -> str:
    """Return a new secret of 256 random bits: `sk-ct-` and 64 hexadecimal digits."""
    return KEY_PREFIX + secrets.token_hex(32)


def _unauthorized(slug: str, message: str) -> Refusal:
    # RFC 9110 section 15.5.2: a 401 says how to authenticate.
    return Refusal(401, slug, message, headers={"www-authenticate": "Bearer"})
