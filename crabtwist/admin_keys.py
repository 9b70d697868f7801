"""What administrators do with keys: those that they made, beside those of the configuration's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import attrs
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from crabtwist.config import Config, models_complaints
from crabtwist.directory import Directory
from crabtwist.errors import Refusal
from crabtwist.keys import KeyTerms, unheeded
from crabtwist.seal import Seal
from crabtwist.settings import read, word
from crabtwist.stored_keys import StoredKey, StoredSecret, decode, issue, table_of
from crabtwist.terms import KeyBudgetSettings, LimitSettings

#: The sort of entries in the directory.
KEYS = "keys"

#: How long a key's old secret goes on to open it when it is rotated, if nobody says otherwise.
OVERLAP_SECONDS = 24 * 3600.0

T = TypeVar("T", bound=KeyTerms)

_TABLES = {"limits": LimitSettings, "budget": KeyBudgetSettings}

_log = Logger()


@attrs.frozen(kw_only=True)
class NewKeyTerms(KeyTerms):
    """A key to be made: its name, and its terms."""

    name: str = attrs.field(validator=word)


@attrs.frozen
class KnownKey:
    """
    A key as administrators see it; no secret is in it.

    `source` is "file" for one of the configuration, which can only be changed there, else "api".
    """

    name: str
    source: Literal["file", "api"]
    terms: KeyTerms
    secrets: tuple[StoredSecret, ...] = ()
    created_at: float | None = None


class AdminKeys:
    """
    The keys that there are; everything raises `Refusal` in words for whoever asked.

    `config` and `models` return the configuration and the names of what is served, as they are now.
    """

    def __init__(
        self,
        directory: Directory,
        seal: Seal | None,
        clock: IReactorTime,
        config: Callable[[], Config],
        models: Callable[[], set[str]],
    ) -> None:
        self._directory = directory
        self._seal = seal
        self._clock = clock
        self._config = config
        self._models = models
        self._decoded: dict[bytes, StoredKey | None] = {}

    def stored(self) -> tuple[StoredKey, ...]:
        """Return those that were made, by name; one that cannot be read opens nothing, and is logged."""
        if self._seal is None:
            return ()
        known, entries = self._decoded, self._directory.entries(KEYS).items()
        self._decoded = {
            data: known[data] if data in known else _readable(name, data) for name, data in entries
        }
        return tuple(key for key in self._decoded.values() if key is not None)

    def all(self) -> list[KnownKey]:
        """Return all keys: the file's, then those that were made and are not hidden by one of them."""
        written = [KnownKey(key.name, "file", _terms(key)) for key in self._config().keys]
        names = {key.name for key in written}
        return [*written, *(_known(key) for key in self.stored() if key.name not in names)]

    def get(self, name: str) -> KnownKey:
        """Return one key."""
        for key in self.all():
            if key.name == name:
                return key
        raise Refusal(404, "key_not_found", f"there is no key {name!r}")

    async def create(self, table: Mapping[str, Any]) -> tuple[KnownKey, str]:
        """Make a key as `NewKeyTerms` says it; returns it and its secret, which is shown only now."""
        digest_key = sealed(self._seal).digest_key
        if self._config().allow_anonymous:
            raise Refusal(409, "keys_unused", "the gateway serves everybody (allow_anonymous); no key counts")
        asked = self._read(NewKeyTerms, table, KeyTerms())

        async def put() -> tuple[KnownKey, str]:
            taken = next((key for key in self.all() if key.name == asked.name), None)
            if taken is not None:
                where = (
                    " in the configuration file" if taken.source == "file" else "; update or rotate that one"
                )
                raise Refusal(409, "key_exists", f"there is a key {asked.name!r} already{where}")
            key, secret = issue(asked.name, _terms(asked), digest_key, self._clock.seconds())
            if not await self._directory.make(KEYS, key.name, key.encode()):
                raise being_made("key", key.name)
            return _known(key), secret

        return await self._directory.change(KEYS, put)

    async def update(self, name: str, patch: Mapping[str, Any]) -> KnownKey:
        """Change a key's terms as a JSON merge patch says (RFC 7396)."""

        async def put() -> KnownKey:
            key = self._own(name)
            table = _with_strange(KeyTerms, merged(table_of(key.terms), patch), patch)
            for member, cls in _TABLES.items():
                if isinstance(patch.get(member), Mapping):
                    table[member] = _with_strange(cls, table[member], patch[member])
            return await self._put(attrs.evolve(key, terms=self._read(KeyTerms, table, key.terms)))

        return await self._directory.change(KEYS, put)

    async def rotate(self, name: str, overlap_seconds: float) -> tuple[KnownKey, str]:
        """
        Give a key a new secret, and return it; the old ones open it for `overlap_seconds` more.

        Of more than `MOST_SECRETS` the oldest end sooner.
        """

        async def put() -> tuple[KnownKey, str]:
            digest_key, now = sealed(self._seal).digest_key, self._clock.seconds()
            key, secret = self._own(name).rotated(digest_key, now, overlap_seconds)
            return await self._put(key), secret

        return await self._directory.change(KEYS, put)

    async def delete(self, name: str) -> None:
        """Forget a key; at once here, within a second on other nodes."""

        async def drop() -> None:
            await self._directory.delete(KEYS, self._own(name).name)

        await self._directory.change(KEYS, drop)

    async def _put(self, key: StoredKey) -> KnownKey:
        await self._directory.put(KEYS, key.name, key.encode())
        return _known(key)

    def _own(self, name: str) -> StoredKey:
        """Return a key that was made; refuses for one of the file."""
        if self.get(name).source == "file":
            raise Refusal(
                409, "key_in_file", f"the key {name!r} is in the configuration file; change it there"
            )
        return next(key for key in self.stored() if key.name == name)

    def _read(self, cls: type[T], table: Mapping[str, Any], old: KeyTerms) -> T:
        """Return terms; what was so in the old ones may stay, though it would not be let in today."""
        complaints: list[str] = []
        terms = read(cls, table, "", complaints)
        if terms is not None:
            complaints += models_complaints(terms, "", self._models() | set(old.models))
            changed = attrs.evolve(
                _terms(terms),
                limits=None if terms.limits == old.limits else terms.limits,
                budget=None if terms.budget == old.budget else terms.budget,
            )
            complaints += unheeded(changed, "", {extension.name for extension in self._config().extensions})
        if terms is None or complaints:
            raise Refusal(400, "invalid_key", "; ".join(complaints))
        return terms


def merged(target: Any, patch: Any) -> Any:
    """Return what a JSON merge patch makes of a document (RFC 7396, section 2)."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def _with_strange(cls: type[Any], table: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with the unknown members of a patch: their null removes nothing, and is refused."""
    return {**table, **{member: None for member in patch if member not in attrs.fields_dict(cls)}}


def being_made(sort: str, name: str) -> Refusal:
    """Return the refusal of what another node is making."""
    return Refusal(
        409, f"{sort}_exists", f"somebody else has just made a {sort} {name!r}, or tried to; look again"
    )


def sealed(seal: Seal | None) -> Seal:
    """Return the seal; refuses where there is none to protect the store with."""
    if seal is None:
        raise Refusal(
            409,
            "no_secret_key",
            "the gateway has no `secret_key` to protect this in the store; add one of 64 random letters to "
            "the configuration, the same on all nodes, and restart",
        )
    return seal


def _readable(name: str, data: bytes) -> StoredKey | None:
    try:
        return decode(data)
    except ValueError as error:
        _log.error("the stored key {name!r} cannot be read: {error}", name=name, error=error)
        return None


def _terms(key: KeyTerms) -> KeyTerms:
    return KeyTerms(**{field.name: getattr(key, field.name) for field in attrs.fields(KeyTerms)})


def _known(key: StoredKey) -> KnownKey:
    return KnownKey(key.name, "api", key.terms, key.secrets, key.created_at)
