"""What the providers have in common that speak to an upstream over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import attrs
import msgspec
import treq
from twisted.internet.defer import Deferred
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from crabtwist.errors import ConfigurationError, CredentialMisdirected, UpstreamStatus
from crabtwist.http_request import BytesBody, OrderedHeaders
from crabtwist.interfaces import IProvider
from crabtwist.upstream import parse_uri
from crabtwist.values import Answer, Call, Headers

#: What people paste from documentation, and what the gateway adds itself.
_ENDPOINTS = ("/chat/completions", "/embeddings", "/messages/count_tokens", "/messages")

_NOT_ENCODED = (b"accept-encoding", b"identity")

#: No list of models is longer.
MOST_LIST_BYTES = 4 * 2**20


@attrs.frozen
class Credential:
    """
    Header fields that prove who we are, and the one origin that they may be sent to.

    `origin` is scheme, host and port as `origin_of` gives them.
    """

    fields: Headers = attrs.field(repr=False)
    origin: str

    def fields_for(self, url: str) -> Headers:
        """Return the fields; raises `CredentialMisdirected` for any other origin."""
        if origin_of(url) != self.origin:
            raise CredentialMisdirected(
                f"a credential for {self.origin} was about to be sent to {origin_of(url)}; nothing was sent"
            )
        return self.fields


@lru_cache(maxsize=1024)  # the providers' own URLs, whoever asks
def origin_of(url: str) -> str:
    """Return a URL's scheme, host and port, in one spelling."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme.lower()}://{(parts.hostname or '').lower()}:{port}"


def checked_base_url(name: str, base_url: str) -> str:
    """
    Return a base URL without what does not belong to a base.

    Raises `ConfigurationError`, which never holds the URL, if it is none that can be asked.
    """
    path = f"providers.{name}.base_url"
    try:
        origin, target = parse_uri(base_url.encode())
    except ValueError as error:
        raise ConfigurationError([f"{path}: {error}"]) from None
    if origin.port == 0 or b"?" in target:
        raise ConfigurationError([f"{path}: may have no query, and no port 0"])
    trimmed = base_url.rstrip("/")
    for endpoint in _ENDPOINTS:
        trimmed = trimmed.removesuffix(endpoint)
    return trimmed.rstrip("/")


@implementer(IProvider)
class HTTPProvider:
    """
    An upstream that takes the call's body as it is.

    `urls` maps the operations that it serves to where they are.  The client's end-to-end fields go first,
    then those of `defaults` that it did not send, then the credential.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        dialect: str,
        agent: IAgent,
        urls: Mapping[str, str],
        models_url: str,
        credential: Credential,
        defaults: Headers = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.dialects = frozenset({dialect})
        self.operations = frozenset(urls)
        self._agent = agent
        self._urls = urls
        self._models_url = models_url
        self._credential = credential
        self._defaults = defaults

    def open(self, call: Call) -> Deferred[IResponse]:
        """Send the call; see `IProvider`."""
        url = self._urls[call.operation]
        target = url.encode() + (b"?" + call.query if call.query else b"")
        given = {name.lower() for name, _ in call.headers}
        missing = [field for field in self._defaults if field[0] not in given]
        fields = (*call.headers, *missing, *self._credential.fields_for(url), _NOT_ENCODED)
        return self._agent.request(b"POST", target, OrderedHeaders(fields), BytesBody(call.body))

    def list_models(self) -> Deferred[list[str]]:
        """Ask the upstream for its models; fails with `UpstreamStatus` if it does not say."""
        return Deferred.fromCoroutine(self._list_models())

    async def _list_models(self) -> list[str]:
        fields = (*self._defaults, *self._credential.fields_for(self._models_url))
        response = await self._agent.request(b"GET", self._models_url.encode(), OrderedHeaders(fields))
        body = await self._list_in(response)
        try:
            listed = msgspec.json.decode(body)
            return [model["id"] for model in listed["data"] if isinstance(model["id"], str)]
        except (msgspec.DecodeError, RecursionError, LookupError, TypeError):
            raise UpstreamStatus(
                f"{self._models_url} answered with status {response.code} and no list of models",
                Answer(response.code, (), body),
            ) from None

    async def _list_in(self, response: Any) -> bytes:
        """Return a response's body; one that goes on and on is closed, and fails with `UpstreamStatus`."""
        body = bytearray()

        def take(part: bytes) -> None:
            body.extend(part)
            if len(body) > MOST_LIST_BYTES:
                message = f"{self._models_url} answered with more than {MOST_LIST_BYTES} bytes"
                raise UpstreamStatus(message, Answer(response.code, (), b""))

        await treq.collect(response, take)
        return bytes(body)


def agent_for(name: str, services: Any, ca_file: str | None) -> IAgent:
    """
    Return the agent for the provider `name`, verifying against `ca_file` if it is given.

    Raises `ConfigurationError` if there is nothing in that file to verify against.
    """
    try:
        return services.agent(ca_file=ca_file)  # type: ignore[no-any-return] # IServices' contract
    except ConfigurationError as error:
        raise ConfigurationError(
            [f"providers.{name}.ca_file: {each}" for each in error.complaints]
        ) from error
