"""Providers: those of the file, and those that are made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from msgspec import Struct

from crabtwist.admin_providers import AdminProviders, KnownProvider
from crabtwist.settings import word
from crabtwist.tables import ProviderSettings
from crabtwist.web.admin.endpoint import ADMIN, Asked, Endpoint, about

_NO_PROVIDER = "There is no such provider."
_IN_FILE = "The provider is in the configuration file, or there is no `secret_key` to protect it with."
_MODELS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "upstream": {"type": "string"}},
                "required": ["name"],
                "additionalProperties": False,
            },
        ]
    },
}
_UNUSABLE = "The upstream was asked for its models, and did not tell them."


@attrs.frozen(kw_only=True)
class Probing:
    """Whether to ask the upstream first."""

    probe: bool = attrs.field(
        default=False,
        metadata=about("ask the upstream for its models, and refuse the change if it does not tell them"),
    )


@attrs.frozen(kw_only=True)
class ProviderTerms(ProviderSettings):
    """
    What a provider may say; the settings of its kind, such as `api_key` and `base_url`, are beside these.

    Without `models` it serves all that the upstream lists.
    """

    OTHERS_TOO = True

    models: Any = attrs.field(default=None, metadata={"crabtwist.schema": _MODELS})


@attrs.frozen(kw_only=True)
class NewProvider(ProviderTerms):
    """A provider to be made."""

    name: str = attrs.field(validator=word)


class Provider(Struct, frozen=True):
    """A provider; `source` is "file" for one of the configuration file.  Credentials are masked."""

    name: str
    source: Literal["file", "api"]
    kind: str
    settings: Mapping[str, Any]


class Providers(Struct, frozen=True):
    """All providers: the file's, then those that were made."""

    providers: list[Provider]


class UpstreamModels(Struct, frozen=True):
    """What an upstream lists."""

    models: list[str]


class ProviderDoors:
    """What is done at each endpoint."""

    def __init__(self, providers: AdminProviders) -> None:
        self._providers = providers

    def all(self, _asked: Asked) -> Providers:
        """Show all."""
        return Providers([_shown(each) for each in self._providers.all()])

    def get(self, asked: Asked) -> Provider:
        """Show one."""
        return _shown(self._providers.get(asked.path["name"]))

    async def create(self, asked: Asked) -> Provider:
        """Make one."""
        return _shown(await self._providers.create(asked.body, probe=asked.query.probe))

    async def update(self, asked: Asked) -> Provider:
        """Change one."""
        name = asked.path["name"]
        return _shown(await self._providers.update(name, asked.body, probe=asked.query.probe))

    async def delete(self, asked: Asked) -> None:
        """Forget one."""
        await self._providers.delete(asked.path["name"])

    async def models(self, asked: Asked) -> UpstreamModels:
        """Ask one's upstream."""
        return UpstreamModels(await self._providers.models(asked.path["name"]))


def provider_endpoints(providers: AdminProviders) -> list[Endpoint]:
    """Return the endpoints of providers."""
    doors = ProviderDoors(providers)
    return [*_of_all(doors, f"{ADMIN}providers"), *_of_one(doors, f"{ADMIN}providers/<name>")]


def _of_all(doors: ProviderDoors, all_of_them: str) -> list[Endpoint]:
    return [
        Endpoint("GET", all_of_them, "List all providers", doors.all, answer=Providers),
        Endpoint(
            "POST",
            all_of_them,
            "Make a provider",
            doors.create,
            action="providers.create",
            description="Its models are served at once; on other nodes within a second.",
            query=Probing,
            body=NewProvider,
            body_as_mapping=True,
            answer=Provider,
            status=201,
            refusals={409: f"There is a provider of this name already. {_IN_FILE}", 422: _UNUSABLE},
            example={"name": "second", "kind": "openai", "base_url": "http://127.0.0.1:8000/v1"},
        ),
    ]


def _of_one(doors: ProviderDoors, one: str) -> list[Endpoint]:
    return [
        Endpoint("GET", one, "Show a provider", doors.get, answer=Provider, refusals={404: _NO_PROVIDER}),
        Endpoint(
            "PATCH",
            one,
            "Change a provider",
            doors.update,
            action="providers.update",
            description=(
                "A JSON merge patch (RFC 7396): what is null is as if never said; null `models` are asked "
                "for anew. A mask in a credential's place leaves the credential."
            ),
            query=Probing,
            body=ProviderTerms,
            body_as_mapping=True,
            answer=Provider,
            refusals={404: _NO_PROVIDER, 409: _IN_FILE, 422: _UNUSABLE},
            example={"weight": 3, "models": ["small", {"name": "large", "upstream": "large-2"}]},
        ),
        Endpoint(
            "DELETE",
            one,
            "Delete a provider",
            doors.delete,
            action="providers.delete",
            description="It serves nothing from now on; what it is answering goes on to its end.",
            status=204,
            refusals={404: _NO_PROVIDER, 409: _IN_FILE},
        ),
        Endpoint(
            "GET",
            f"{one}/models",
            "Ask a provider's upstream for its models",
            doors.models,
            answer=UpstreamModels,
            refusals={404: _NO_PROVIDER, 422: _UNUSABLE},
        ),
    ]


def _shown(known: KnownProvider) -> Provider:
    settings = {name: value for name, value in known.settings.items() if name != "kind"}
    return Provider(known.name, known.source, known.kind, settings)
