"""Providers over HTTP: what goes to which URL, with whose credential."""

from __future__ import annotations

from typing import Any

from attrs import evolve
from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IAgent
from zope.interface import implementer
from zope.interface.verify import verifyObject

from crabtwist import settings
from crabtwist.errors import ConfigurationError, CredentialMisdirected, UpstreamStatus
from crabtwist.http_request import BytesBody, OrderedHeaders
from crabtwist.interfaces import IProvider
from crabtwist.providers.anthropic import AnthropicProvider, AnthropicSettings
from crabtwist.providers.http import MOST_LIST_BYTES, Credential, origin_of
from crabtwist.providers.openai import OpenAIProvider, OpenAISettings
from crabtwist.settings import Secret
from crabtwist.testing import FakeResponse, FakeServices
from crabtwist.upstream import trust_only
from crabtwist.values import Call, Headers

MESSAGES = Call("messages", "anthropic", "m", False, b"", (), b'{"model":"m"}')
CHAT = evolve(MESSAGES, operation="chat.completions", dialect="openai")


@implementer(IAgent)
class FakeAgent:
    """Remembers its requests, and answers all alike."""

    def __init__(self, response: FakeResponse | None = None) -> None:
        self.requests: list[tuple[bytes, bytes, Headers, bytes | None]] = []
        self.response = response or FakeResponse(body=b"{}")

    def request(
        self, method: bytes, uri: bytes, headers: Any = None, bodyProducer: Any = None
    ) -> Deferred[Any]:
        assert isinstance(headers, OrderedHeaders)
        assert bodyProducer is None or isinstance(bodyProducer, BytesBody)
        self.requests.append((method, uri, headers.fields, bodyProducer.data if bodyProducer else None))
        return succeed(self.response)


class Services(FakeServices):
    """Services with a fake agent."""

    def __init__(self, agent: FakeAgent) -> None:
        super().__init__()
        self.made = agent
        self.ca_files: list[str | None] = []

    def agent(self, *, ca_file: str | None = None) -> FakeAgent:
        self.ca_files.append(ca_file)
        return self.made


class ProviderTestCase(SynchronousTestCase):
    """Providers with a fake agent."""

    def anthropic(self, **given: Any) -> AnthropicProvider:
        """Return a provider of Anthropic's kind."""
        self.agent = FakeAgent(given.pop("response", None))
        self.services = Services(self.agent)
        return AnthropicProvider("p", AnthropicSettings(**given), self.services)

    def openai(self, **given: Any) -> OpenAIProvider:
        """Return a provider of OpenAI's kind."""
        self.agent = FakeAgent(given.pop("response", None))
        self.services = Services(self.agent)
        return OpenAIProvider("p", OpenAISettings(**given), self.services)

    def url(self, provider: Any, call: Call) -> str:
        """Return where a call goes."""
        self.successResultOf(provider.open(call))
        return self.agent.requests[-1][1].decode()

    def fields(self, provider: Any, call: Call = MESSAGES) -> Headers:
        """Return the header fields that a call is sent with."""
        self.successResultOf(provider.open(call))
        return self.agent.requests[-1][2]


class URLTests(ProviderTestCase):
    """Where calls go."""

    def test_contract(self) -> None:
        """Both are providers, of what their vendors offer."""
        for provider, operations in (
            (self.anthropic(), {"messages", "messages.count_tokens"}),
            (self.openai(), {"chat.completions", "embeddings"}),
        ):
            verifyObject(IProvider, provider)
            self.assertEqual({provider.kind}, provider.dialects)
            self.assertEqual(operations, provider.operations)

    def test_vendors(self) -> None:
        """Without a base URL it is the vendor's own API."""
        self.assertEqual("https://api.anthropic.com/v1/messages", self.url(self.anthropic(), MESSAGES))
        self.assertEqual("https://api.openai.com/v1/chat/completions", self.url(self.openai(), CHAT))

    def test_every_operation(self) -> None:
        """Each operation has its endpoint."""
        count, embed = (
            evolve(MESSAGES, operation="messages.count_tokens"),
            evolve(CHAT, operation="embeddings"),
        )
        self.assertEqual(
            "http://a/v1/messages/count_tokens", self.url(self.anthropic(base_url="http://a"), count)
        )
        self.assertEqual("http://a/v1/embeddings", self.url(self.openai(base_url="http://a"), embed))

    def test_anthropic_spellings(self) -> None:
        """However the base is written, `/v1` stands in the URL once, behind any prefix."""
        for end in ("", "/", "/v1", "/v1/", "/v1/messages", "/v1/messages/", "/v1/messages/count_tokens"):
            for base in ("https://h:8443", "http://[::1]", "https://h/llm/anthropic"):
                self.assertEqual(
                    f"{base}/v1/messages", self.url(self.anthropic(base_url=base + end), MESSAGES)
                )

    def test_openai_spellings(self) -> None:
        """Here too; a path that the operator wrote is believed."""
        for end in ("/v1", "/v1/", "/v1/chat/completions", "/v1/embeddings"):
            for base in ("https://h:8443", "https://h/llm"):
                self.assertEqual(
                    f"{base}/v1/chat/completions", self.url(self.openai(base_url=base + end), CHAT)
                )
        for base in ("http://h", "http://h/"):
            self.assertEqual("http://h/v1/chat/completions", self.url(self.openai(base_url=base), CHAT))
        self.assertEqual(
            "http://h/inference/chat/completions", self.url(self.openai(base_url="http://h/inference"), CHAT)
        )

    def test_query(self) -> None:
        """The client's query goes along as it was written."""
        call = evolve(MESSAGES, query=b"beta=true&x=%2F&&y")
        self.assertEqual(
            "http://a/v1/messages?beta=true&x=%2F&&y", self.url(self.anthropic(base_url="http://a"), call)
        )

    def test_method_and_body(self) -> None:
        """A call is a POST of the very bytes."""
        self.successResultOf(self.anthropic().open(MESSAGES))
        method, _, _, body = self.agent.requests[0]
        self.assertEqual((b"POST", MESSAGES.body), (method, body))

    def test_unusable(self) -> None:
        """What is no base URL is complained of by its key's path, and not repeated: it may hold a secret."""
        for url in (
            *("", "api.anthropic.com", "ftp://h", "https://", "http://h:99999", "http://h:0", "http://[::1"),
            *(
                "https://user:hunter2@h",
                "https://h/?key=hunter2",
                "https://h#hunter2",
                "https://h \n",
                "https://ü.de",
            ),
        ):
            for make in (self.anthropic, self.openai):
                error = self.assertRaises(ConfigurationError, make, base_url=url)
                (complaint,) = error.complaints
                self.assertTrue(complaint.startswith("providers.p.base_url: "), complaint)
                self.assertNotIn("hunter2", complaint)

    def test_trust(self) -> None:
        """The agent is asked for with the authorities to trust."""
        self.openai(ca_file="/etc/ca.pem")
        self.assertEqual(["/etc/ca.pem"], self.services.ca_files)

    def test_no_authorities(self) -> None:
        """A file without authorities is told with the path of its key."""
        services = Services(FakeAgent(None))
        self.patch(services, "agent", lambda *, ca_file: trust_only(ca_file))
        given = OpenAISettings(ca_file="/no/such.pem")
        error = self.assertRaises(ConfigurationError, OpenAIProvider, "p", given, services)
        (complaint,) = error.complaints
        self.assertTrue(complaint.startswith("providers.p.ca_file: no certificates can be read"), complaint)


class FieldTests(ProviderTestCase):
    """What calls are sent with."""

    def test_anthropic_key(self) -> None:
        """A key goes into `x-api-key`, an OAuth token is a bearer token, and without either there is none."""
        for key, expected in (
            (Secret("sk-ant-api03-x"), ((b"x-api-key", b"sk-ant-api03-x"),)),
            (Secret("sk-ant-oat01-x"), ((b"authorization", b"Bearer sk-ant-oat01-x"),)),
            (None, ()),
        ):
            fields = self.fields(self.anthropic(api_key=key))
            sent = tuple(field for field in fields if field[0] in (b"x-api-key", b"authorization"))
            self.assertEqual(expected, sent)

    def test_openai_key(self) -> None:
        """OpenAI's keys are bearer tokens; servers without keys are sent none."""
        fields = self.fields(self.openai(api_key=Secret("sk-x")), CHAT)
        self.assertIn((b"authorization", b"Bearer sk-x"), fields)
        self.assertNotIn(b"authorization", dict(self.fields(self.openai(), CHAT)))

    def test_order(self) -> None:
        """The client's fields go first, as they were written; ours follow."""
        mine = ((b"Anthropic-Beta", b"b,a"), (b"X-New", b"1"), (b"anthropic-beta", b"c"))
        expected = (
            *mine,
            (b"anthropic-version", b"2023-06-01"),
            (b"content-type", b"application/json"),
            (b"x-api-key", b"k"),
            (b"accept-encoding", b"identity"),
        )
        self.assertEqual(
            expected, self.fields(self.anthropic(api_key=Secret("k")), evolve(MESSAGES, headers=mine))
        )

    def test_defaults(self) -> None:
        """A version or content type that the client sent, however spelled, is the only one."""
        mine = ((b"Anthropic-Version", b"2099-01-01"), (b"Content-Type", b"application/json; charset=utf-8"))
        expected = (*mine, (b"accept-encoding", b"identity"))
        self.assertEqual(expected, self.fields(self.anthropic(), evolve(MESSAGES, headers=mine)))

    def test_no_anthropic_version_elsewhere(self) -> None:
        """OpenAI's servers hear nothing of Anthropic's versions."""
        expected = ((b"content-type", b"application/json"), (b"accept-encoding", b"identity"))
        self.assertEqual(expected, self.fields(self.openai(), CHAT))

    def test_key_that_no_header_can_hold(self) -> None:
        """A key with a newline from the end of its file is complained of at the start, and not shown."""
        for cls in (AnthropicSettings, OpenAISettings):
            complaints: list[str] = []
            self.assertIsNone(settings.read(cls, {"api_key": "hunter2\n"}, "providers.p", complaints))
            (complaint,) = complaints
            self.assertTrue(complaint.startswith("providers.p.api_key: "), complaint)
            self.assertNotIn("hunter2", complaint)


class CredentialTests(SynchronousTestCase):
    """A credential is for one origin."""

    credential = Credential(((b"x-api-key", b"hunter2"),), origin_of("https://API.example.com/v1"))

    def test_own_origin(self) -> None:
        """There it goes, in any spelling of the same place."""
        for url in ("https://api.example.com/x", "HTTPS://api.EXAMPLE.com:443/x"):
            self.assertEqual(((b"x-api-key", b"hunter2"),), self.credential.fields_for(url))

    def test_elsewhere(self) -> None:
        """Nowhere else: another host, port or scheme is refused, without showing it."""
        for url in (
            "https://evil.example.com/x",
            "https://api.example.com:8443/x",
            "http://api.example.com/x",
            "http://api.example.com:443/x",
            "https://api.example.com.evil/x",
        ):
            error = self.assertRaises(CredentialMisdirected, self.credential.fields_for, url)
            self.assertNotIn("hunter2", error.message)

    def test_not_shown(self) -> None:
        """Its secret is not in its representation."""
        self.assertNotIn("hunter2", repr(self.credential))

    def test_nothing_is_sent(self) -> None:
        """A provider whose URL and credential disagree sends nothing."""
        agent = FakeAgent()
        provider = AnthropicProvider("p", AnthropicSettings(api_key=Secret("k")), Services(agent))
        provider._urls = {"messages": "https://evil.example.com/v1/messages"}
        self.assertRaises(CredentialMisdirected, provider.open, MESSAGES)
        self.assertEqual([], agent.requests)


class ModelsTests(ProviderTestCase):
    """Asking an upstream for its models."""

    def test_models(self) -> None:
        """The names are listed in the upstream's order."""
        body = b'{"data":[{"id":"b","x":1},{"id":"a"}],"has_more":false}'
        for make, url in (
            (self.anthropic, b"https://api.anthropic.com/v1/models?limit=1000"),
            (self.openai, b"https://api.openai.com/v1/models"),
        ):
            provider: Any = make(response=FakeResponse(body=body), api_key=Secret("k"))
            self.assertEqual(["b", "a"], self.successResultOf(provider.list_models()))
            method, uri, fields, sent = self.agent.requests[0]
            self.assertEqual((b"GET", url, None), (method, uri, sent))
            self.assertTrue({b"x-api-key", b"authorization"} & set(dict(fields)))

    def test_strange_names(self) -> None:
        """What is no text is no name."""
        provider = self.openai(response=FakeResponse(body=b'{"data":[{"id":null},{"id":7},{"id":"a"}]}'))
        self.assertEqual(["a"], self.successResultOf(provider.list_models()))

    def test_endless_list(self) -> None:
        """An upstream that goes on and on is closed, and not kept in memory."""
        response = FakeResponse()
        listing = self.openai(response=response).list_models()
        for _ in range(MOST_LIST_BYTES // 2**20):
            response.receive(b" " * 2**20)
        self.assertFalse(response.stopped)
        response.receive(b" ")
        self.assertIn("more than", self.failureResultOf(listing, UpstreamStatus).value.message)
        self.assertTrue(response.stopped)

    def test_no_list(self) -> None:
        """Whatever else comes back is an error that says from where, with the answer."""
        deep = b"[" * 100_000
        for body in (
            b"",
            b"<html>",
            b"[]",
            b"{}",
            b'{"data":[{}]}',
            b'{"data":7}',
            b'{"data":[null]}',
            b"\xff",
            deep,
        ):
            provider = self.openai(response=FakeResponse(403, body=body))
            error = self.failureResultOf(provider.list_models(), UpstreamStatus).value
            self.assertEqual((403, body), (error.status, error.answer.body))
            self.assertIn("https://api.openai.com/v1/models answered with status 403", error.message)
