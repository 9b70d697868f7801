"""
Virtual keys: who is asking, and which models they may ask for.

Keys that `generate_key` makes are 256 random bits.  There is nothing to guess in them, so a fast hash
protects them as well as a slow one would, and a request need not wait for a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping

import attrs

from crabtwist.errors import Refusal
from crabtwist.settings import (
    LONGEST_CREDENTIAL_BYTES,
    ONE_IS_ENOUGH,
    Secret,
    header_word,
    not_empty,
    word,
)

KEY_PREFIX = "sk-ct-"
EVERY_MODEL = "*"

# How much of a digest sorts the keys; the rest is compared in constant time.
_BUCKET_BYTES = 4


@attrs.frozen(kw_only=True)
class KeySettings:
    """
    One `[[keys]]` table.

    `key` is the secret that clients send.  `models` are names of models and aliases; "*" means all.
    """

    name: str = attrs.field(validator=word)
    key: Secret = attrs.field(validator=header_word)
    models: tuple[str, ...] = attrs.field(default=(EVERY_MODEL,), validator=not_empty, metadata=ONE_IS_ENOUGH)


@attrs.frozen
class VirtualKey:
    """
    A key that was recognised.

    `name` is the principal.  `models` are the names of the models and aliases that it may use; None
    means all of them.
    """

    name: str
    models: frozenset[str] | None


class KeyRing:
    """
    The keys of one configuration, as SHA-256 digests; the secrets themselves are not kept.

    An empty ring recognises nobody.
    """

    def __init__(self, keys: Iterable[KeySettings]) -> None:
        self._buckets: dict[bytes, list[tuple[bytes, VirtualKey]]] = {}
        for settings in keys:
            digest = hashlib.sha256(settings.key.reveal().encode("ascii")).digest()
            models = None if EVERY_MODEL in settings.models else frozenset(settings.models)
            bucket = self._buckets.setdefault(digest[:_BUCKET_BYTES], [])
            bucket.append((digest, VirtualKey(settings.name, models)))

    def authenticate(self, secret: bytes) -> VirtualKey | None:
        """Return the key whose secret this is, None if there is no such key."""
        digest = hashlib.sha256(secret).digest()
        for known, key in self._buckets.get(digest[:_BUCKET_BYTES], ()):
            if hmac.compare_digest(known, digest):
                return key
        return None


def allows(key: VirtualKey | None, *names: str) -> bool:
    """
    Return whether `key` may use a model that goes by all of `names`: as asked for, and as resolved.

    One listed name is enough.  A key that lists an alias may therefore use that alias, though not the
    model behind it by its own name; a key that lists a model may use it through any alias.  None, the
    key of nobody in a gateway that serves anybody, may use everything.
    """
    return key is None or key.models is None or not key.models.isdisjoint(names)


def check_distinct(keys: Mapping[str, KeySettings], complaints: list[str]) -> None:
    """Complain of keys that share a name or a secret; `keys` are by their paths in the configuration."""
    names: dict[str, str] = {}
    held: dict[Secret, str] = {}
    for where, key in keys.items():
        if names.setdefault(key.name, where) != where:
            complaints.append(f'{where}.name: {names[key.name]} is called "{key.name}" already')
        if held.setdefault(key.key, where) != where:
            complaints.append(f"{where}.key: is the same as that of {held[key.key]}; generate another")


def credential(authorization: list[bytes], x_api_key: list[bytes]) -> bytes:
    """
    Return the secret in a request's `Authorization` and `x-api-key` fields, given by their values.

    `x-api-key: SECRET` and `Authorization: Bearer SECRET` (the scheme in any case, RFC 9110 section
    11.1) are equals; both may be sent with the same secret.  Other schemes are ignored beside an
    `x-api-key`.  Raises a 401 `Refusal` when there is no secret, when two differ, for another scheme
    alone, and for more than 1024 bytes.
    """
    offered = {value.strip() for value in x_api_key} - {b""}
    schemes = [(*value.split(None, 1), b"", b"")[:2] for value in authorization]
    foreign = [scheme for scheme, _ in schemes if scheme.lower() not in (b"", b"bearer")]
    if foreign and not offered:
        raise _unauthorized(
            "credential_scheme", "Authorization must be `Bearer KEY`; other schemes are not accepted"
        )
    offered |= {token.strip() for scheme, token in schemes if scheme.lower() == b"bearer"} - {b""}
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
