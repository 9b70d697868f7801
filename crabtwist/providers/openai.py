"""OpenAI's API, at OpenAI or at any server that speaks it: vLLM, llama.cpp, Ollama and many more."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import attrs

from crabtwist.providers.http import Credential, HTTPProvider, agent_for, checked_base_url, origin_of
from crabtwist.settings import Secret, header_word


@attrs.frozen
class OpenAISettings:
    """
    What `[providers.NAME]` of this kind may say.

    `base_url` is written as OpenAI's SDKs take it, with `/v1`; a bare host is understood.  `ca_file` is
    the path of a PEM file with the only authorities to trust.
    """

    api_key: Secret | None = attrs.field(default=None, validator=header_word)
    base_url: str = "https://api.openai.com/v1"
    ca_file: str | None = None


class OpenAIProvider(HTTPProvider):
    """The provider of the kind `openai`."""

    Settings = OpenAISettings

    def __init__(self, name: str, settings: OpenAISettings, services: Any) -> None:
        base = checked_base_url(name, settings.base_url)
        if not urlsplit(base).path:
            base += "/v1"
        key = settings.api_key
        fields = ((b"authorization", b"Bearer " + key.reveal().encode()),) if key is not None else ()
        super().__init__(
            name=name,
            kind="openai",
            dialect="openai",
            agent=agent_for(name, services, settings.ca_file),
            urls={
                "chat.completions": base + "/chat/completions",
                "embeddings": base + "/embeddings",
            },
            models_url=base + "/models",
            credential=Credential(fields, origin_of(base)),
            defaults=((b"content-type", b"application/json"),),
        )
