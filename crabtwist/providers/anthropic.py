"""Anthropic's API, at Anthropic or at anybody who offers it."""

from __future__ import annotations

from typing import Any

import attrs

from crabtwist.providers.http import Credential, HTTPProvider, agent_for, checked_base_url, origin_of
from crabtwist.settings import Secret, header_word
from crabtwist.values import Headers

#: For clients that send no version of their own.
DEFAULT_VERSION = b"2023-06-01"


@attrs.frozen
class AnthropicSettings:
    """
    What `[providers.NAME]` of this kind may say.

    `base_url` is written as Anthropic's SDKs take it, without `/v1`; with it is understood.  `ca_file`
    is the path of a PEM file with the only authorities to trust.
    """

    api_key: Secret | None = attrs.field(default=None, validator=header_word)
    base_url: str = "https://api.anthropic.com"
    ca_file: str | None = None


def credential_fields(api_key: Secret | None) -> Headers:
    """Return the field that carries a key: OAuth tokens (`sk-ant-oat...`) are bearer tokens."""
    if api_key is None:
        return ()
    key = api_key.reveal().encode()
    if key.startswith(b"sk-ant-oat"):
        return ((b"authorization", b"Bearer " + key),)
    return ((b"x-api-key", key),)


class AnthropicProvider(HTTPProvider):
    """The provider of the kind `anthropic`."""

    Settings = AnthropicSettings

    def __init__(self, name: str, settings: AnthropicSettings, services: Any) -> None:
        base = checked_base_url(name, settings.base_url).removesuffix("/v1")
        super().__init__(
            name=name,
            kind="anthropic",
            dialect="anthropic",
            agent=agent_for(name, services, settings.ca_file),
            urls={
                "messages": base + "/v1/messages",
                "messages.count_tokens": base + "/v1/messages/count_tokens",
            },
            models_url=base + "/v1/models?limit=1000",
            credential=Credential(credential_fields(settings.api_key), origin_of(base)),
            defaults=((b"anthropic-version", DEFAULT_VERSION), (b"content-type", b"application/json")),
        )
