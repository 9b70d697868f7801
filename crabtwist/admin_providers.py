"""What administrators do with providers: those that they made, beside those of the configuration's file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import attrs
import msgspec
from twisted.logger import Logger

from crabtwist.admin_keys import being_made, merged, sealed
from crabtwist.config import Config, ConfiguredProvider, read_provider
from crabtwist.directory import Directory
from crabtwist.discovery import Makers
from crabtwist.errors import ConfigurationError, Refusal, UpstreamError
from crabtwist.keys import EVERY_MODEL
from crabtwist.seal import Seal
from crabtwist.settings import Secret, fault_in, key_path, model_name, read, word
from crabtwist.tables import ProviderSettings

#: The sort of entries in the directory.
PROVIDERS = "providers"

#: Stands for a credential where it is shown; where it comes back, the credential stays.
MASK = "********"

#: An upstream that lists more is not served as a whole.
MOST_LISTED_MODELS = 5_000

_UNKNOWN = ["unknown"]

_log = Logger()

#: Asks an upstream, by a provider that is made for it and then let go, for the models that it serves.
Probe = Callable[[ConfiguredProvider], Awaitable[list[str]]]

#: Makes a provider and lets it go; raises `ConfigurationError` if it cannot be made.
Try = Callable[[ConfiguredProvider], object]


@attrs.frozen
class KnownProvider:
    """
    A provider as administrators see it: its table, with `MASK` for each credential.

    `source` is "file" for one of the configuration, which can only be changed there, else "api".
    """

    name: str
    source: Literal["file", "api"]
    kind: str
    settings: Mapping[str, Any]


@attrs.frozen
class _Named:
    name: str = attrs.field(validator=word)


class AdminProviders:
    """The providers that there are; everything raises `Refusal` in words for whoever asked."""

    def __init__(
        self,
        directory: Directory,
        seal: Seal | None,
        makers: Makers,
        config: Callable[[], Config],
        probe: Probe,
        try_making: Try,
    ) -> None:
        self._directory = directory
        self._seal = seal
        self._makers = makers
        self._config = config
        self._probe = probe
        self._try_making = try_making

    def stored(self) -> tuple[ConfiguredProvider, ...]:
        """Return those that were made, by name; one that cannot be used is logged and left out."""
        found = []
        for name in self._directory.entries(PROVIDERS) if self._seal else ():
            try:
                found.append(self._read(name, self._table(name)))
            except (Refusal, ValueError) as error:
                _log.error("the stored provider {name!r} cannot be used: {error}", name=name, error=error)
        return tuple(found)

    def all(self) -> list[KnownProvider]:
        """Return all providers: the file's, then those that were made and are not hidden by one of them."""
        written = [_known(each, "file") for each in self._config().providers]
        names = {each.name for each in written}
        return [*written, *(_known(each, "api") for each in self.stored() if each.name not in names)]

    def get(self, name: str) -> KnownProvider:
        """Return one provider."""
        for each in self.all():
            if each.name == name:
                return each
        raise Refusal(404, "provider_not_found", f"there is no provider {name!r}")

    async def create(self, table: Mapping[str, Any], *, probe: bool) -> KnownProvider:
        """
        Make a provider of a table like one of the file's, with its `name`, and serve its models at once.

        Without `models` it serves all that the upstream lists; `probe` asks the upstream in any case, so that
        a wrong address or credential is told now.
        """
        rest = {member: value for member, value in table.items() if member != "name"}
        name = self._checked_name(table, rest)

        async def put() -> KnownProvider:
            if any(each.name == name for each in self.all()) or name in self._directory.entries(PROVIDERS):
                message = f"there is a provider {name!r} already; update that one"
                raise Refusal(409, "provider_exists", message)
            return await self._put(name, rest, probe=probe, new=True)

        return await self._directory.change(PROVIDERS, put)

    async def update(self, name: str, patch: Mapping[str, Any], *, probe: bool) -> KnownProvider:
        """
        Change a provider's table as a JSON merge patch says (RFC 7396).

        `"models": null` has them filled from the upstream again.
        """

        async def put() -> KnownProvider:
            old = self._own_table(name)
            known = self._members_of(old.get("kind", name))
            # A null that removes nothing is still refused if there is no such setting.
            strange = {member: None for member in patch if member not in known}
            table = {**_with_credentials(merged(old, patch), old), **(strange if known else {})}
            self._refuse_to_redirect(name, old, table, patch)
            return await self._put(name, table, probe=probe)

        return await self._directory.change(PROVIDERS, put)

    async def delete(self, name: str) -> None:
        """Serve nothing by a provider any more; what it is answering now goes on."""

        async def drop() -> None:
            self._own_table(name)
            await self._directory.delete(PROVIDERS, name)

        await self._directory.change(PROVIDERS, drop)

    async def models(self, name: str) -> list[str]:
        """Return what a provider's upstream says that it serves."""
        configured = [*self._config().providers, *self.stored()]
        for each in configured:
            if each.name == name:
                return await self._probed(each)
        raise Refusal(404, "provider_not_found", f"there is no provider {name!r}")

    def _checked_name(self, table: Mapping[str, Any], rest: Mapping[str, Any]) -> str:
        """Return the name of a provider to be made; refuses a wrong one, with all else that is wrong."""
        complaints: list[str] = []
        named = read(_Named, {"name": table["name"]} if "name" in table else {}, "", complaints)
        if named is not None:
            return named.name
        _, others = self._examined("new", {"models": _UNKNOWN, **rest})
        raise _refused([*complaints, *others])

    def _refuse_to_redirect(
        self, name: str, old: Mapping[str, Any], new: Mapping[str, Any], patch: Mapping[str, Any]
    ) -> None:
        """Refuse to send a credential to another host than it was given for; `patch` may give it again."""
        before, after = (self._examined(name, {**table, "models": _UNKNOWN})[0] for table in (old, new))
        if after is None or (before is not None and _origins(before.settings) == _origins(after.settings)):
            return
        secrets = [each for each, value in _values(after.settings).items() if isinstance(value, Secret)]
        kept = [each for each in secrets if patch.get(each, MASK) == MASK]
        if kept:
            raise _refused(
                [f"{each}: was given for another host; give it again with the new" for each in kept]
            )

    async def _put(
        self, name: str, table: Mapping[str, Any], *, probe: bool, new: bool = False
    ) -> KnownProvider:
        seal = sealed(self._seal)
        masks = [f"{each}: is only a mask; give the credential" for each in table if table[each] == MASK]
        if masks:
            raise _refused(masks)
        if table.get("models") is None:
            # Something has to stand there until the upstream has told what it is.
            listed = await self._probed(self._read(name, {**table, "models": _UNKNOWN}))
            table = {**table, "models": self._servable(listed)}
            if not table["models"]:
                raise _refused(["models: the upstream lists none; name those to serve"])
            if len(table["models"]) > MOST_LISTED_MODELS:
                raise _refused([f"models: the upstream lists {len(listed)}; name those to serve"])
        elif probe:
            await self._probed(self._read(name, table))
        configured = self._read(name, table)
        try:
            self._try_making(configured)
        except ConfigurationError as error:
            raise _refused(_without_path(name, error.complaints)) from error
        data = seal.close(msgspec.json.encode(table))
        if not new:
            await self._directory.put(PROVIDERS, name, data)
        elif not await self._directory.make(PROVIDERS, name, data):
            raise being_made("provider", name)
        return _known(configured, "api")

    def _servable(self, listed: list[str]) -> list[str]:
        """Return those of an upstream's models that can be served by their own names."""
        aliases = self._config().aliases
        return [
            name
            for name in dict.fromkeys(listed)
            if name not in aliases and name != EVERY_MODEL and fault_in(model_name, name) is None
        ]

    async def _probed(self, configured: ConfiguredProvider) -> list[str]:
        try:
            return await self._probe(configured)
        except ConfigurationError as error:
            raise _refused(_without_path(configured.name, error.complaints)) from error
        except UpstreamError as error:
            raise Refusal(
                422, "upstream_unusable", f"the upstream was asked for its models: {error.message}"
            ) from error

    def _table(self, name: str) -> dict[str, Any]:
        table: dict[str, Any] = msgspec.json.decode(
            sealed(self._seal).open(self._directory.entries(PROVIDERS)[name]), type=dict[str, Any]
        )
        return table

    def _own_table(self, name: str) -> dict[str, Any]:
        """Return the table of a provider that was made; refuses for one of the file."""
        if any(each.name == name for each in self._config().providers):
            message = f"the provider {name!r} is in the configuration file; change it there"
            raise Refusal(409, "provider_in_file", message)
        if name not in self._directory.entries(PROVIDERS):
            raise Refusal(404, "provider_not_found", f"there is no provider {name!r}")
        try:
            return self._table(name)
        except ValueError:
            # It cannot be read any more; what is put in its place has to be whole.
            return {}

    def _members_of(self, kind: str) -> set[str]:
        """Return what a table of this kind may have."""
        maker = self._makers.providers.get(kind)
        classes = [] if maker is None else [ProviderSettings, maker.settings_class()]
        return {field.name for cls in classes for field in attrs.fields(cls)}

    def _read(self, name: str, table: Mapping[str, Any]) -> ConfiguredProvider:
        configured, complaints = self._examined(name, table)
        if configured is None or complaints:
            raise _refused(complaints)
        return configured

    def _examined(self, name: str, table: Mapping[str, Any]) -> tuple[ConfiguredProvider | None, list[str]]:
        complaints: list[str] = []
        configured = read_provider(name, table, self._makers, complaints)
        if configured is not None:
            aliases = self._config().aliases
            complaints += [
                f"models: {model.name!r} is the name of an alias; serve it under another"
                for model in configured.common.models
                if model.name in aliases
            ]
        return configured, _without_path(name, complaints)


def _without_path(name: str, complaints: list[str]) -> list[str]:
    """Return complaints as they are of what was sent, which has no `providers.NAME` around it."""
    prefixes = (f"{key_path('providers', name)}.", f"providers.{name}.")
    return [each.removeprefix(prefixes[0]).removeprefix(prefixes[1]) for each in complaints]


def _refused(complaints: list[str]) -> Refusal:
    return Refusal(400, "invalid_provider", "; ".join(complaints))


def _known(configured: ConfiguredProvider, source: Literal["file", "api"]) -> KnownProvider:
    common, own = _shown(configured.common), _shown(configured.settings)
    return KnownProvider(configured.name, source, configured.common.kind, {**common, **own})


def _shown(settings: Any) -> dict[str, Any]:
    """Return settings as a table, credentials masked."""
    return {
        name: value
        for name, value in attrs.asdict(settings, value_serializer=_masked).items()
        if value is not None
    }


def _masked(_instance: object, _field: object, value: Any) -> Any:
    return MASK if isinstance(value, Secret) else value


def _values(settings: Any) -> dict[str, Any]:
    """Return a settings object's fields."""
    return attrs.asdict(settings, recurse=False)


def _origins(settings: Any) -> set[tuple[str, str]]:
    """Return where settings lead to: scheme and host of each URL in them."""
    texts = [value for value in _values(settings).values() if isinstance(value, str) and "://" in value]
    return {(urlsplit(text).scheme.lower(), urlsplit(text).netloc.lower()) for text in texts}


def _with_credentials(table: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Put the old credentials in the place of masks that came back."""
    return {name: old.get(name, value) if value == MASK else value for name, value in table.items()}
