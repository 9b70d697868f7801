"""The doors, through the real factory and channel: what each path says to whom."""

from __future__ import annotations

import json
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.dialects.operations import DIALECTS, OPERATIONS
from crabtwist.extension import Extension
from crabtwist.gateway import Gateway
from crabtwist.health import Health
from crabtwist.hooks import Hooks
from crabtwist.keys import KeyRing, KeySettings
from crabtwist.listener import GatewayFactory
from crabtwist.routing import Deployment, Registry
from crabtwist.settings import Secret
from crabtwist.testing import JSON, FakeProvider, FakeResponse
from crabtwist.web.admission import OPEN_PATHS, Admission
from crabtwist.web.app import make_app, shortcuts

MODELS = ("claude", "gpt", "meta/llama", "meta/llama/70b")
ALIASES = {"fast": "claude", "a/lias": "gpt"}
BODY = b'{"model":"claude"}'

#: What clients say of themselves: one key may use all models, one some.
NOBODY: dict[str, str] = {}
ALL = {"x-api-key": "all"}
SOME = {"x-api-key": "some"}
BEARER = {"authorization": "Bearer all"}
CLIENTS = {"anthropic": ALL, "openai": BEARER}


@attrs.frozen
class Said:
    """An answer as its client has it."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its document."""
        return json.loads(self.body)

    @property
    def refusal(self) -> tuple[int, str | None]:
        """Its status, and the gateway's own word for what is wrong."""
        return self.status, self.fields.get("x-crabtwist-error")

    def type_in(self, dialect: str) -> str | None:
        """Return the type of the error that the clients of a dialect find."""
        error = DIALECTS[dialect].read_error(self.body)
        assert ("type" in self.json) == (dialect == "anthropic"), "the envelope is the other dialect's"
        return error.type if error else None


class Wire(StringTransport):
    """A transport that can be half-closed."""

    def loseWriteConnection(self) -> None:
        """Do nothing: the client has seen all that it needs."""


class WebTestCase(SynchronousTestCase):
    """A gateway with two keys, whose upstream answers everything with a word."""

    keys: tuple[tuple[str, tuple[str, ...]], ...] = (("all", ("*",)), ("some", ("claude", "a/lias")))
    extensions: tuple[Extension, ...] = ()
    #: Whether operations are found as in a running gateway, or by Klein.
    short = True

    def setUp(self) -> None:
        self.clock = Clock()
        self.upstream = FakeProvider("up", [FakeResponse(200, JSON, b'{"ok":1}', 8) for _ in range(9)])
        ring = [KeySettings(name=f"key-{key}", key=Secret(key), models=models) for key, models in self.keys]
        self.gateway = Gateway(
            clock=self.clock,
            registry=Registry([Deployment(self.upstream, name, name) for name in MODELS], ALIASES),
            keys=KeyRing(ring) if ring else None,
            hooks=Hooks(self.extensions, self.clock),
            health=Health(failures=1),
        )
        admission = Admission(self.gateway)
        app = make_app(self.gateway)
        self.factory = GatewayFactory(
            app.resource(),
            reactor=self.clock,
            admit=admission,
            render_refusal=admission.refuse,
            shortcuts=shortcuts(app) if self.short else {},
        )

    def send(self, method: str, path: str, fields: dict[str, str], body: bytes = b"") -> Said:
        """Send these very bytes over a connection of their own; return what came back."""
        head = [f"{method} {path} HTTP/1.1", "host: gateway", *(f"{name}: {fields[name]}" for name in fields)]
        wire, self.channel = Wire(), self.factory.buildProtocol(None)
        self.channel.makeConnection(wire)
        self.channel.dataReceived("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        self.clock.advance(0)
        line, *lines = wire.value().partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        named = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
        return Said(int(line.split()[1] if line else 0), named, wire.value().partition(b"\r\n\r\n")[2])

    def ask(self, method: str, path: str, fields: dict[str, str], body: bytes = b"") -> Said:
        """Return the answer to a whole request: it is whole too."""
        length = {"content-length": str(len(body))} if body else {}
        said = self.send(method, path, {**fields, **length}, body)
        if method != "HEAD":
            self.assertEqual(len(said.body), int(said.fields["content-length"]))
        return said

    def counted(self, name: str, **labels: str) -> float:
        """Return what was counted."""
        return self.gateway.metrics.registry.get_sample_value(f"crabtwist_{name}_total", labels) or 0


class ModelsTests(WebTestCase):
    """The list of models."""

    def test_openai(self) -> None:
        """OpenAI's clients get the whole list in their shape: models, then aliases."""
        said = self.ask("GET", "/v1/models", BEARER)
        self.assertEqual("application/json", said.fields["content-type"])
        self.assertEqual([*MODELS, *ALIASES], [model["id"] for model in said.json["data"]])
        expected = {"id": "claude", "object": "model", "created": 0, "owned_by": "crabtwist"}
        self.assertEqual(("list", expected), (said.json["object"], said.json["data"][0]))

    def test_anthropic(self) -> None:
        """Anthropic's get it in theirs, with the fields that Claude Code reads."""
        page = self.ask("GET", "/v1/models?limit=1000", ALL).json
        self.assertEqual([*MODELS, *ALIASES], [model["id"] for model in page["data"]])
        model = page["data"][0]
        self.assertEqual(("model", "claude", "claude"), (model["type"], model["id"], model["display_name"]))
        self.assertEqual((False, "claude", "a/lias"), (page["has_more"], page["first_id"], page["last_id"]))

    def test_whose_client(self) -> None:
        """The version tells the dialect where the key's place does not."""
        said = self.ask("GET", "/v1/models", {**BEARER, "anthropic-version": "2023-06-01"})
        self.assertIn("has_more", said.json)
        self.assertNotIn("has_more", self.ask("GET", "/v1/models", {**BEARER, **ALL}).json)

    def test_pages(self) -> None:
        """`limit`, `after_id` and `before_id` page as Anthropic's do."""
        for query, names, more in (
            ("limit=2", ["claude", "gpt"], True),
            ("limit=6", [*MODELS, *ALIASES], False),
            ("limit=2&after_id=gpt", ["meta/llama", "meta/llama/70b"], True),
            ("limit=2&after_id=meta%2Fllama%2F70b", ["fast", "a/lias"], False),
            ("limit=2&before_id=fast", ["meta/llama", "meta/llama/70b"], True),
            ("limit=2&before_id=meta/llama", ["claude", "gpt"], False),
            ("after_id=a/lias", [], False),
            ("before_id=claude", [], False),
            ("before_id=unknown", [], False),
        ):
            page = self.ask("GET", f"/v1/models?{query}", ALL).json
            self.assertEqual((names, more), ([each["id"] for each in page["data"]], page["has_more"]), query)
            ends = (names[0], names[-1]) if names else (None, None)
            self.assertEqual(ends, (page["first_id"], page["last_id"]), query)

    def test_bad_limits(self) -> None:
        """A limit that is none is told so."""
        for limit in ("0", "1001", "-1", "x", "", "1e3", "9" * 5000, "%C2%B2", "1.0"):
            said = self.ask("GET", f"/v1/models?limit={limit}", ALL)
            self.assertEqual((400, "invalid_query"), said.refusal, limit)
            self.assertEqual("invalid_request_error", said.type_in("anthropic"))

    def test_only_what_the_key_may_use(self) -> None:
        """A key sees its models with their aliases, and its aliases without their models."""
        for query, names in (("", ["claude", "fast", "a/lias"]), ("?after_id=claude&limit=1", ["fast"])):
            page = self.ask("GET", f"/v1/models{query}", SOME).json
            self.assertEqual(names, [model["id"] for model in page["data"]])

    def test_one(self) -> None:
        """One model is shown in the shape of whoever asks, with any slashes in its name."""
        for name in (*MODELS, *ALIASES):
            for path in (f"/v1/models/{name}", f"/v1/models/{name.replace('/', '%2F')}"):
                one, other = self.ask("GET", path, BEARER).json, self.ask("GET", path, ALL).json
                self.assertEqual((name, "model"), (one["id"], one["object"]))
                self.assertEqual((name, "model"), (other["id"], other["type"]))

    def test_none(self) -> None:
        """What is not served, or not for this key, is not found."""
        for name in ("unknown", "gpt", "meta", "claude/"):
            said = self.ask("GET", f"/v1/models/{name}", SOME)
            self.assertEqual((404, "model_not_found"), said.refusal, name)
            self.assertEqual("not_found_error", said.type_in("anthropic"))

    def test_head(self) -> None:
        """Asked for the head alone, no body comes."""
        said = self.ask("HEAD", "/v1/models", ALL)
        self.assertEqual((200, b""), (said.status, said.body))


class ProcessTests(WebTestCase):
    """The doors that tell of the process."""

    def test_open(self) -> None:
        """They need no key."""
        for path in OPEN_PATHS:
            self.assertEqual(200, self.ask("GET", path.decode(), NOBODY).status)

    def test_health(self) -> None:
        """A process that runs is healthy, also while it drains."""
        for self.gateway.draining in (False, True):
            said = self.ask("GET", "/health", NOBODY)
            self.assertEqual((200, {"status": "ok"}), (said.status, said.json))

    def test_ready(self) -> None:
        """It is ready, until it is being stopped."""
        for self.gateway.draining, expected in ((False, (200, "ready")), (True, (503, "draining"))):
            said = self.ask("GET", "/ready", NOBODY)
            self.assertEqual(expected, (said.status, said.json["status"]))

    def test_all_cooling(self) -> None:
        """It is not while every deployment cools down, until one has recovered."""
        for name in MODELS:
            self.gateway.health.failed(f"up/{name}", self.clock.seconds())
        said = self.ask("GET", "/ready", NOBODY)
        self.assertEqual((503, {"status": "no usable deployment"}), (said.status, said.json))
        self.gateway.health.succeeded("up/gpt")
        self.assertEqual(200, self.ask("GET", "/ready", NOBODY).status)

    def test_metrics(self) -> None:
        """The metrics are Prometheus' text."""
        said = self.ask("GET", "/metrics", NOBODY)
        self.assertEqual("text/plain; version=0.0.4; charset=utf-8", said.fields["content-type"])
        self.assertIn(b"\ncrabtwist_active_connections 0.0\n", said.body)

    def test_waking(self) -> None:
        """What Claude Code asks for when it wakes is answered, by method HEAD too."""
        for path in ("/", "/api/hello"):
            self.assertEqual({"name": "crabtwist"}, self.ask("GET", path, NOBODY).json)
            said = self.ask("HEAD", path, NOBODY)
            self.assertEqual((200, b""), (said.status, said.body))

    def test_no_bodies(self) -> None:
        """Who has no key cannot make the gateway keep a body."""
        for path in OPEN_PATHS:
            for framing in ({"content-length": "9"}, {"transfer-encoding": "chunked"}):
                said = self.send("POST", path.decode(), framing)
                self.assertEqual((413, "body_not_wanted"), said.refusal)


class PathTests(WebTestCase):
    """Paths that are none, and methods that do not fit."""

    def test_unknown(self) -> None:
        """A path that leads nowhere is a 404 in JSON, in the dialect that fits best."""
        for path in ("/v1/nope", "/nope", "/v1", "/v1/./models", "/v1/x/../models"):
            for dialect, fields in CLIENTS.items():
                said = self.ask("GET", path, fields)
                self.assertEqual((404, "path_not_found"), said.refusal, path)
                self.assertEqual(DIALECTS[dialect].error_type(404), said.type_in(dialect))

    def test_wrong_method(self) -> None:
        """A method that does not fit is told which do."""
        for method, path, allowed in (
            ("GET", "/v1/messages", "POST"),
            ("DELETE", "/v1/messages/count_tokens", "POST"),
            ("OPTIONS", "/v1/models", "GET, HEAD"),
            ("POST", "/v1/models/claude", "GET, HEAD"),
            ("PUT", "/health", "GET, HEAD"),
        ):
            said = self.ask(method, path, ALL)
            self.assertEqual((405, "method_not_allowed"), said.refusal, path)
            self.assertEqual(allowed, said.fields["allow"])
            self.assertEqual("invalid_request_error", said.type_in("anthropic"))

    def test_no_redirects(self) -> None:
        """Slashes too many never redirect: the path is served, or it is not."""
        slashes = (
            "/v1/messages/",
            "//v1/messages",
            "/v1//messages",
            "/v1/models/",
            "//health",
            "/health/",
            "//",
        )
        for path in slashes:
            for method in ("GET", "POST"):
                said = self.ask(method, path, ALL)
                self.assertIn(said.status, (200, 400, 404, 405), path)
                self.assertNotIn("location", said.fields)

    def test_no_way_around_the_lock(self) -> None:
        """However a path is spelled, what is behind a key needs the key."""
        locked = ("/v1/messages", "/v1/%6Dessages", "/v1/messages/", "/v1//messages", "/v1/nope")
        nowhere = (
            *("//v1/messages", "/%761/messages", "/v1%2Fmessages", "/%2Fv1/messages", "/V1/messages"),
            *("/health/../v1/messages", "/%76%31%2f%6d%65ssages", "/nope", "/v1"),
        )
        for path, status in [(each, 401) for each in locked] + [(each, 404) for each in nowhere]:
            self.assertEqual(status, self.ask("POST", path, NOBODY, BODY).status, path)
            models = path.replace("messages", "models")
            self.assertEqual(status, self.ask("GET", models, NOBODY).status, models)
        self.assertEqual([], self.upstream.calls)

    def test_not_utf8(self) -> None:
        """A path that is no text is refused, and not logged as a failure of ours."""
        for path in ("/v1/%ff", "/v1/models/%C3"):
            said = self.ask("GET", path, ALL)
            self.assertEqual((400, "invalid_path"), said.refusal)
            self.assertEqual("invalid_request_error", said.type_in("anthropic"))

    def test_crash(self) -> None:
        """A door that fails says so, without saying how; the log knows."""
        self.gateway.registry = None  # type: ignore[assignment] # a fault of ours
        said = self.ask("GET", "/v1/models", ALL)
        self.assertEqual((500, "internal_error"), said.refusal)
        self.assertNotIn(b"NoneType", said.body)
        self.assertEqual(1, len(self.flushLoggedErrors(AttributeError)))

    def test_counted_once(self) -> None:
        """Each refusal is counted, once."""
        self.ask("GET", "/nope", ALL)
        self.ask("GET", "/v1/messages", ALL)
        self.ask("GET", "/v1/models/nope", ALL)
        self.ask("POST", "/v1/messages", ALL, b"{}")
        for slug in ("path_not_found", "method_not_allowed", "model_not_found", "invalid_body"):
            self.assertEqual(1, self.counted("refusals", reason=slug), slug)


class AdmissionTests(WebTestCase):
    """What is refused from the head alone: none of these bodies ever comes."""

    def head(self, path: str, fields: dict[str, str]) -> Said:
        """Send the head of a POST."""
        return self.send("POST", path, {**fields, "content-length": "10"})

    def test_no_key(self) -> None:
        """Without a key: 401 in the dialect of the path, saying how to prove oneself."""
        for operation in OPERATIONS.values():
            said = self.head("/v1" + operation.path, NOBODY)
            self.assertEqual((401, "credential_missing"), said.refusal)
            self.assertEqual("authentication_error", said.type_in(operation.dialect.name))
            self.assertEqual("Bearer", said.fields["www-authenticate"])
            self.assertEqual(said.fields["x-crabtwist-request-id"], said.json["request_id"])

    def test_unknown_key(self) -> None:
        """With an unknown key likewise; where the path has no dialect, in the client's."""
        for dialect, fields in CLIENTS.items():
            unknown = {name: value.replace("all", "al") for name, value in fields.items()}
            said = self.ask("GET", "/v1/models", unknown)
            self.assertEqual((401, "unknown_key"), said.refusal)
            self.assertEqual("authentication_error", said.type_in(dialect))

    def test_two_keys(self) -> None:
        """Two keys that differ are refused, even if both are known; one key sent twice is fine."""
        said = self.head("/v1/messages", {**SOME, **BEARER})
        self.assertEqual((401, "credentials_differ"), said.refusal)
        self.assertEqual(200, self.ask("GET", "/v1/models", {**ALL, **BEARER}).status)

    def test_encoded_body(self) -> None:
        """A body in another coding is refused; identity is none."""
        for coding in ("gzip", "zstd", "identity, br"):
            said = self.head("/v1/messages", {**ALL, "content-encoding": coding})
            self.assertEqual((415, "content_encoding"), said.refusal)
        said = self.ask("POST", "/v1/messages", {**ALL, "content-encoding": "Identity"}, BODY)
        self.assertEqual(200, said.status)

    def test_draining(self) -> None:
        """A gateway that is being stopped takes no new work, and says when to come again."""
        self.gateway.draining = True
        for path in ("/v1/messages", "/v1/chat/completions"):
            said = self.head(path, ALL)
            self.assertEqual((503, "draining"), said.refusal)
            self.assertEqual("1", said.fields["retry-after"])

    def test_counted_once(self) -> None:
        """Each refusal is counted, once."""
        self.head("/v1/messages", NOBODY)
        self.head("/v1/messages", {"x-api-key": "x"})
        self.head("/v1/messages", {**ALL, "content-encoding": "gzip"})
        self.send("POST", "/v1/messages", {**ALL, "content-length": "99999999"})
        self.send("POST", "/v1/messages", {**ALL, "transfer-encoding": "chunked"}, b"nonsense\r\n")
        self.gateway.draining = True
        self.head("/v1/messages", NOBODY)
        slugs = ("credential_missing", "unknown_key", "content_encoding", "draining")
        for slug in (*slugs, "body_too_large", "bad_http"):
            self.assertEqual(1, self.counted("refusals", reason=slug), slug)


class OperationTests(WebTestCase):
    """The doors of the operations."""

    def test_every_operation(self) -> None:
        """Each reaches the upstream as itself, with the query and without the key."""
        for operation in OPERATIONS.values():
            said = self.ask("POST", f"/v1{operation.path}?beta=true", {**ALL, "x-new": "1"}, BODY)
            self.assertEqual((200, b'{"ok":1}'), (said.status, said.body))
            call = self.upstream.calls[-1]
            self.assertEqual((operation.name, b"beta=true", BODY), (call.operation, call.query, call.body))
            self.assertEqual(((b"x-new", b"1"),), call.headers)

    def test_key(self) -> None:
        """The exchange knows whose key it was."""
        said = self.ask("POST", "/v1/messages", SOME, b'{"model":"gpt"}')
        self.assertEqual((403, "model_not_allowed"), said.refusal)
        self.assertIn("key-some", said.json["error"]["message"])

    def test_client_leaves(self) -> None:
        """A client that hangs up cancels what is asked in its name; its end is counted once."""
        cancelled: list[object] = []
        self.upstream._answers.insert(0, Deferred(cancelled.append))
        self.send("POST", "/v1/messages", {**ALL, "content-length": str(len(BODY))}, BODY)
        self.assertEqual([], cancelled)
        self.channel.connectionLost(Failure(ConnectionDone()))
        ends = self.counted("requests", ended_by="client", reason="client_left")
        self.assertEqual((1, 1), (len(cancelled), ends))


class OpenGatewayTests(WebTestCase):
    """A gateway that serves anybody."""

    keys = ()

    def test_no_key_needed(self) -> None:
        """Nobody needs a key, and whatever is sent for one is not looked at."""
        for fields in (NOBODY, ALL, {"authorization": "Basic x"}):
            self.assertEqual(200, self.ask("GET", "/v1/models", fields).status)
            self.assertEqual(200, self.ask("POST", "/v1/messages", fields, BODY).status)


class GivingUp(Extension):
    """A guard whose own call is cancelled, say because its connection is closed."""

    name = "giving-up"

    def on_request(self, context: object) -> Deferred[None]:
        given_up: Deferred[None] = Deferred()
        given_up.cancel()
        return given_up


class GivingUpTests(WebTestCase):
    """Cancellations that no client caused."""

    extensions = (GivingUp(),)

    def test_answered(self) -> None:
        """A client that is still there is told that the gateway failed."""
        said = self.ask("POST", "/v1/messages", ALL, BODY)
        self.assertEqual((500, "internal_error"), said.refusal)
        self.assertEqual(([], 1), (self.upstream.calls, len(self.flushLoggedErrors())))


class KleinOperationTests(OperationTests):
    """Operations, found by Klein."""

    short = False


class KleinGivingUpTests(GivingUpTests):
    """Requests that nobody waits for, found by Klein."""

    short = False
