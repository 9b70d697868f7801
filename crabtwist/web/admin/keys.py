"""Virtual keys: those of the file, and those that are made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from msgspec import Struct

from crabtwist.admin_keys import OVERLAP_SECONDS, AdminKeys, KnownKey, NewKeyTerms
from crabtwist.keys import KeyTerms
from crabtwist.stored_keys import StoredSecret
from crabtwist.terms import KeyBudgetSettings, LimitSettings, unix_time
from crabtwist.web.admin.endpoint import ADMIN, Asked, Endpoint, about
from crabtwist.web.admin.times import rfc3339

#: What is rotated away from for longer was not meant to end.
MOST_OVERLAP_SECONDS = 366 * 86400.0

_NO_KEY = "There is no such key."
_IN_FILE = "The key is in the configuration file, or there is no `secret_key` to protect one with."


class SecretHint(Struct, frozen=True):
    """What is known of one of a key's secrets: its last letters, and until when it opens anything."""

    hint: str
    until: str | None


class Key(Struct, frozen=True, kw_only=True):
    """A key; `source` is "file" for one of the configuration file, which can only be changed there."""

    name: str
    source: Literal["file", "api"]
    models: tuple[str, ...]
    expires_at: str | None
    disabled: bool
    limits: LimitSettings | None
    budget: KeyBudgetSettings | None
    metadata: Mapping[str, str]
    created_at: str | None
    secrets: tuple[SecretHint, ...]


class KeyWithSecret(Key, frozen=True, kw_only=True):
    """A key with its newest secret, which nobody can be shown again."""

    secret: str


class Keys(Struct, frozen=True):
    """All keys: the file's, then those that were made."""

    keys: list[Key]


def _no_eternity(_instance: object, _attribute: object, value: float) -> None:
    if not 0 <= value <= MOST_OVERLAP_SECONDS:
        raise ValueError(f"must be 0 to {MOST_OVERLAP_SECONDS:.0f}, a year")


@attrs.frozen(kw_only=True)
class Rotation:
    """How a key is given a new secret."""

    overlap_seconds: float = attrs.field(
        default=OVERLAP_SECONDS,
        validator=_no_eternity,
        metadata={
            **about("for how long the old secrets go on to open the key"),
            "crabtwist.schema": {
                "type": "number",
                "minimum": 0,
                "maximum": MOST_OVERLAP_SECONDS,
                "default": OVERLAP_SECONDS,
            },
        },
    )


class KeyDoors:
    """What is done at each endpoint."""

    def __init__(self, keys: AdminKeys) -> None:
        self._keys = keys

    def all(self, _asked: Asked) -> Keys:
        """Show all."""
        return Keys([_shown(key) for key in self._keys.all()])

    def get(self, asked: Asked) -> Key:
        """Show one."""
        return _shown(self._keys.get(asked.path["name"]))

    async def create(self, asked: Asked) -> KeyWithSecret:
        """Make one."""
        return _with_secret(*await self._keys.create(asked.body))

    async def update(self, asked: Asked) -> Key:
        """Change one."""
        return _shown(await self._keys.update(asked.path["name"], asked.body))

    async def rotate(self, asked: Asked) -> KeyWithSecret:
        """Give one a new secret."""
        return _with_secret(*await self._keys.rotate(asked.path["name"], asked.body.overlap_seconds))

    async def delete(self, asked: Asked) -> None:
        """Forget one."""
        await self._keys.delete(asked.path["name"])


def key_endpoints(keys: AdminKeys) -> list[Endpoint]:
    """Return the endpoints of keys."""
    doors = KeyDoors(keys)
    return [*_of_all(doors, f"{ADMIN}keys"), *_of_one(doors, f"{ADMIN}keys/<name>")]


def _of_all(doors: KeyDoors, all_of_them: str) -> list[Endpoint]:
    return [
        Endpoint("GET", all_of_them, "List all keys", doors.all, answer=Keys),
        Endpoint(
            "POST",
            all_of_them,
            "Make a key",
            doors.create,
            action="keys.create",
            description="The answer is the only one to hold the secret.",
            body=NewKeyTerms,
            body_as_mapping=True,
            answer=KeyWithSecret,
            status=201,
            refusals={409: f"There is a key of this name already. {_IN_FILE}"},
            example={
                "name": "visitor",
                "limits": {"requests_per_minute": 10},
                "budget": {"dollars": 1, "per": "day"},
            },
        ),
    ]


def _of_one(doors: KeyDoors, one: str) -> list[Endpoint]:
    return [
        Endpoint("GET", one, "Show a key", doors.get, answer=Key, refusals={404: _NO_KEY}),
        Endpoint(
            "PATCH",
            one,
            "Change a key",
            doors.update,
            action="keys.update",
            description="A JSON merge patch (RFC 7396): what is null is as if never said.",
            body=KeyTerms,
            body_as_mapping=True,
            answer=Key,
            refusals={404: _NO_KEY, 409: _IN_FILE},
            example={"disabled": True, "limits": None},
        ),
        Endpoint(
            "DELETE",
            one,
            "Delete a key",
            doors.delete,
            action="keys.delete",
            description="It opens nothing from now on; on other nodes within a second.",
            status=204,
            refusals={404: _NO_KEY, 409: _IN_FILE},
        ),
        Endpoint(
            "POST",
            f"{one}/rotate",
            "Give a key a new secret",
            doors.rotate,
            action="keys.rotate",
            description="The old secrets go on to open it for a while: time to tell clients the new one.",
            body=Rotation,
            answer=KeyWithSecret,
            refusals={404: _NO_KEY, 409: _IN_FILE},
            example={"overlap_seconds": 3600},
        ),
    ]


def _shown(key: KnownKey) -> Key:
    return Key(**_members(key))


def _with_secret(key: KnownKey, secret: str) -> KeyWithSecret:
    return KeyWithSecret(**_members(key), secret=secret)


def _members(key: KnownKey) -> dict[str, Any]:
    terms = key.terms
    return {
        "name": key.name,
        "source": key.source,
        "models": terms.models,
        "expires_at": None if terms.expires_at is None else _in_utc(terms.expires_at),
        "disabled": terms.disabled,
        "limits": terms.limits,
        "budget": terms.budget,
        "metadata": terms.metadata,
        "created_at": None if key.created_at is None else rfc3339(key.created_at),
        "secrets": tuple(_hint(secret) for secret in key.secrets),
    }


def _hint(secret: StoredSecret) -> SecretHint:
    until = secret.digest.until
    return SecretHint(secret.hint, None if until is None else rfc3339(until))


def _in_utc(moment: str) -> str:
    try:
        return rfc3339(unix_time(moment))
    except (ValueError, OverflowError):
        # The first or the last day there is, in a zone where it is another in UTC.
        return moment
