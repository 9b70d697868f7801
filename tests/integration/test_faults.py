"""Upstreams that fail and clients that leave: what is said, what is counted, what is let go."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from tests.integration import scripted_upstream as script
from tests.integration.scripted_upstream import FIN, LAST_CHUNK, RESET, SILENCE, Answer, Received, Step
from tests.integration.test_fidelity import CHAT, KEY, MESSAGES, UPSTREAM_KEY, Answered, GatewayCase, until

#: What "promptly" is allowed to be on a machine that is busy with other things.
PROMPT_SECONDS = 1.0


@attrs.frozen
class Kind:
    """A dialect's ways: a stream, an error in one, and what keeps one alive."""

    path: str
    suffix: str
    whole: list[bytes]
    error: bytes
    alive: bytes

    @property
    def begun(self) -> bytes:
        """The beginning of the stream."""
        return b"".join(self.whole[:2])

    def asking(self, model: str) -> dict[str, Any]:
        """Return a request for a stream of `model`, or its namesake in this dialect, with all it can tell."""
        options = {"stream_options": {"include_usage": True}}
        return {"model": model + self.suffix, "stream": True, **options}


KINDS = (
    Kind(MESSAGES, "", script.TEXT_STREAM, script.ERROR_EVENT, script.PING),
    Kind(CHAT, "-gpt", script.CHAT_STREAM, script.CHAT_ERROR, b": keep-alive\n\n"),
)


class FaultCase(GatewayCase):
    """A gateway with little patience, but for the models that are called patient."""

    CONFIGURATION = """
    commit_seconds = 0.2
    ping_seconds = 0.2
    max_event_bytes = 20000
    cooldown_failures = 1000
    [providers]
    patient = {kind = "anthropic", base_url = "$up", models = ["patient"]}
    patient-gpt = {kind = "openai", base_url = "$up/v1", models = ["patient-gpt"]}
    gpt = {kind = "openai", base_url = "$up/v1", models = ["hasty-gpt"], idle_timeout = 1, max_retries = 0}
    second = {kind = "anthropic", base_url = "$second", models = ["both"], weight = 0, max_retries = 0}
    nobody = {kind = "anthropic", base_url = "http://127.0.0.1:1", models = ["nobody"], max_retries = 0}
    [providers.first]
    kind = "anthropic"
    api_key = "$key"
    base_url = "$up"
    models = ["hasty", "both"]
    max_retries = 1
    idle_timeout = 1
    """

    @contextlib.contextmanager
    def rises(self, by: int, name: str, **labels: str) -> Iterator[None]:
        """Check that a counter rises by so much, soon, and no more."""
        before = self.counter(name, **labels)
        yield
        until(lambda: self.counter(name, **labels) >= before + by, f"{name} {labels}")
        self.assertEqual(by, self.counter(name, **labels) - before)

    def assert_logged(self, answered: Answered, outcome: str) -> None:
        """Check that the log has one line of how a request ended, and what that says."""
        (request_id,) = answered.values("x-crabtwist-request-id")
        line = re.compile(rf"{request_id} .* for tester: (.*) in \d+ ms")
        until(lambda: line.search(self.log()), f"a line about {request_id}")
        self.assertEqual([outcome], line.findall(self.log()))

    def assert_error(self, answered: Answered, status: int, slug: str) -> None:
        """Check that the gateway answered with an error of its own, in Anthropic's words."""
        self.assertEqual((status, [slug]), (answered.status, answered.values("x-crabtwist-error")))
        self.assertEqual("error", answered.document["type"])
        self.assertEqual(
            answered.values("x-crabtwist-request-id"), [answered.document["request_id"]], answered.body
        )

    def dial(self, body: dict[str, Any], path: str = MESSAGES, *, window_bytes: int = 0) -> socket.socket:
        """Send a request by hand; the answer is left unread."""
        client = socket.socket()
        self.addCleanup(client.close)
        if window_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
        client.settimeout(script.PATIENCE_SECONDS)
        client.connect((self.gateway.host, self.gateway.port))
        data = json.dumps(body).encode()
        line = f"POST {path} HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(line.encode() + data)
        return client


class BrokenStreamTests(FaultCase):
    """Streams that break after their head has gone down."""

    def check(self, reason: str, *ending: Step, model: str = "patient") -> None:
        """Let a stream end badly, in both dialects: one error event, and nothing that looks whole."""
        for kind in KINDS:
            here = threading.Event()
            self.upstream.play([script.beginning(), script.chunk(kind.begun), here, *ending])
            with self.rises(1, "requests_total", reason=reason):
                answered = self.ask(kind.asking(model), kind.path, begun=here)
            self.assertTrue(answered.body.startswith(kind.begun), answered.body)
            self.assert_one_error(answered.body.removeprefix(kind.begun), reason)
            self.assert_logged(answered, f"0 {reason}")

    def assert_one_error(self, rest: bytes, reason: str) -> None:
        """Check that a stream's end is one error event, after keep-alives at most."""
        *alive, last, nothing = rest.split(b"\n\n")
        data = json.loads(last[last.index(b"data: ") + 6 :])
        self.assertIn(f"[{reason}]", data["error"]["message"])
        self.assertEqual((b"", []), (nothing, [each for each in alive if b"error" in each]))
        self.assertNotIn(b"message_stop", rest)
        self.assertNotIn(b"[DONE]", rest)

    def test_clean_end(self) -> None:
        """A stream that ends in good order but without its last event is told to be truncated."""
        self.check("truncated", LAST_CHUNK)

    def test_clean_end_within_event(self) -> None:
        """Half an event at the end is kept from the client."""
        self.check("truncated", script.chunk(b'event: message_stop\ndata: {"type":"mess'), LAST_CHUNK)

    def test_closed(self) -> None:
        """An upstream that closes the connection within a stream breaks it."""
        self.check("connection_broken", FIN)

    def test_closed_within_event(self) -> None:
        """So does one that does it within an event."""
        self.check("connection_broken", script.chunk(b"data: {"), FIN)

    def test_reset(self) -> None:
        """So does one that resets the connection."""
        self.check("connection_broken", RESET)

    def test_bad_chunk(self) -> None:
        """So does one whose framing is wrong."""
        self.check("connection_broken", b"zz\r\n", SILENCE)

    def test_silence(self) -> None:
        """An upstream that falls silent for `idle_timeout` is given up, and let go."""
        self.check("idle_timeout", SILENCE, model="hasty")
        until(self.upstream.connections[0].left.is_set, "the end of the silent connection")

    def test_error_event(self) -> None:
        """The upstream's own error event comes down as it is, alone, and is counted as its fault."""
        for kind in KINDS:
            here = threading.Event()
            self.upstream.play(script.stream(kind.begun, here, kind.error))
            with self.rises(1, "requests_total", reason="upstream_error_event", ended_by="upstream"):
                answered = self.ask(kind.asking("patient"), kind.path, begun=here)
            self.assertEqual(kind.begun + kind.error, answered.body)
            self.assert_logged(answered, "0 upstream_error_event")

    def test_oversize_event(self) -> None:
        """Within an event too large to be held back nothing can be said; the connection is cut."""
        for kind in KINDS:
            self.upstream.play(script.broken_stream(kind.begun, b"data: " + b"x" * 40000, FIN))
            answered = self.ask(kind.asking("patient"), kind.path)
            self.assertEqual((False, 0), (answered.whole, answered.body.count(b"error")))
            self.assertTrue(answered.body.startswith(kind.begun))

    def test_reset_after_the_end(self) -> None:
        """A connection that breaks after the last event breaks nothing."""
        for kind in KINDS:
            here = threading.Event()
            self.upstream.play(script.broken_stream(*kind.whole, here, RESET))
            answered = self.ask(kind.asking("patient"), kind.path, begun=here)
            self.assertEqual((True, b"".join(kind.whole)), (answered.whole, answered.body))
            self.assert_logged(answered, "200 complete")


class BrokenAnswerTests(FaultCase):
    """Plain answers that break."""

    def test_small(self) -> None:
        """A small answer that breaks becomes an error of the gateway's, and is not asked for again."""
        for ending, reason, status in ((FIN, "connection_broken", 502), (SILENCE, "idle_timeout", 504)):
            self.upstream.play([script.head(200, ("content-length", "50")) + b'{"content"', ending])
            answered = self.ask({"model": "both"})
            self.assert_error(answered, status, reason)
            self.assertEqual((1, 0), (len(self.upstream.received), len(self.second.received)))

    def test_large(self) -> None:
        """A large one is cut where it broke, so that nobody takes it for a whole one."""
        endings = ((FIN, "patient"), (RESET, "patient"), (SILENCE, "hasty"))
        for ending, model in endings:
            here = threading.Event()
            self.upstream.play([script.head(200, ("content-length", "90000")) + b"x" * 80000, here, ending])
            answered = self.ask({"model": model}, begun=here)
            self.assertEqual((200, False), (answered.status, answered.whole))
            reason = "idle_timeout" if ending is SILENCE else "connection_broken"
            self.assert_logged(answered, f"0 {reason}")


class AttemptTests(FaultCase):
    """What is tried again, and where."""

    def test_overloaded_then_well(self) -> None:
        """An overloaded upstream is asked again."""
        self.upstream.play(script.OVERLOADED, script.MESSAGE_ANSWER)
        with self.rises(1, "retries_total", provider="first", error="upstream_status"):
            answered = self.ask({"model": "hasty"})
        self.assertEqual((200, 2), (answered.status, len(self.upstream.received)))
        self.assert_logged(answered, "200 complete")

    def test_overloaded_throughout(self) -> None:
        """The upstream's own words come down when it does not get better."""
        self.upstream.play(script.OVERLOADED)
        with self.rises(1, "requests_total", reason="upstream_status", ended_by="upstream"):
            answered = self.ask({"model": "hasty", "stream": True})
        self.assertEqual((529, 2), (answered.status, len(self.upstream.received)))
        self.assertEqual(script.anthropic_error("overloaded_error", "Overloaded"), answered.body)

    def test_overloaded_in_the_first_event(self) -> None:
        """A stream that begins with an error is a failed attempt: again, and then the next provider."""
        self.upstream.play(script.stream(script.PING, script.ERROR_EVENT))
        self.second.play(script.stream(*script.TEXT_STREAM))
        with (
            self.rises(1, "retries_total", provider="first"),
            self.rises(1, "fallbacks_total", provider="first"),
        ):
            answered = self.ask({"model": "both", "stream": True})
        self.assertEqual((200, b"".join(script.TEXT_STREAM)), (answered.status, answered.body))
        self.assertEqual((2, 1), (len(self.upstream.received), len(self.second.received)))
        self.assert_logged(answered, "200 complete")
        self.assertIn("by second for tester: 200 complete", self.log())

    def test_overloaded_in_every_first_event(self) -> None:
        """If there is no other provider, the client is told with the status that the event stands for."""
        for kind, status in zip(KINDS, (529, 503), strict=True):
            self.upstream.play(script.stream(kind.error, fields=[script.UP_ID]))
            answered = self.ask(kind.asking("hasty"), kind.path)
            self.assertEqual((status, "Overloaded"), (answered.status, answered.document["error"]["message"]))
            self.assertEqual(["req_011up"], answered.values("request-id"))

    def test_retry_after(self) -> None:
        """An upstream that says when to come back is not asked earlier."""
        self.upstream.play(script.limited("1"), script.MESSAGE_ANSWER)
        self.assertEqual(200, self.ask({"model": "hasty"}).status)
        early, late = self.upstream.received
        self.assertGreaterEqual(late.at - early.at, 0.99)

    def test_retry_after_too_long(self) -> None:
        """One that says to come back after the deadline is passed on at once, with what it said."""
        self.upstream.play(script.limited("3600"))
        answered = self.ask({"model": "hasty"})
        self.assertEqual(
            (429, ["3600"], 1), (answered.status, answered.values("retry-after"), len(self.upstream.received))
        )

    def test_should_not_retry(self) -> None:
        """An upstream that says not to come back is believed."""
        self.upstream.play(script.limited("0", ("x-should-retry", "false")))
        self.assertEqual((429, 1), (self.ask({"model": "hasty"}).status, len(self.upstream.received)))

    def test_credential_refused(self) -> None:
        """Where the gateway's own credential is refused, the next provider is asked, at once."""
        for status in (401, 403):
            self.upstream.play(
                script.plain(status, script.anthropic_error("authentication_error", "invalid x-api-key"))
            )
            self.second.play(script.MESSAGE_ANSWER)
            self.assertEqual(200, self.ask({"model": "both"}).status)
            self.assertEqual((1, 1), (len(self.upstream.received), len(self.second.received)))
            answered = self.ask({"model": "hasty"})
            self.assert_error(answered, 502, "upstream_credential_rejected")
            self.assertNotIn(UPSTREAM_KEY.encode(), answered.body)

    def test_redirect(self) -> None:
        """A redirect is not followed: no request, and above all no key, goes there."""
        for status in (301, 302, 307, 308):
            self.upstream.play(script.plain(status, b"", ("Location", self.second.url + MESSAGES)))
            answered = self.ask({"model": "hasty"})
            self.assert_error(answered, 502, "upstream_redirected")
            self.assertEqual(([], []), (self.second.received, answered.values("location")))

    def test_not_an_event_stream(self) -> None:
        """A 200 that is no event stream is no answer to a stream."""
        self.upstream.play(script.plain(200, b"<html>welcome</html>", kind="text/html"))
        answered = self.ask({"model": "hasty", "stream": True})
        self.assert_error(answered, 502, "not_an_event_stream")
        self.assertEqual(2, len(self.upstream.received))

    def test_empty_stream(self) -> None:
        """A stream without a first event is no answer either."""
        self.upstream.play(script.stream(script.PING))
        self.assert_error(self.ask({"model": "hasty", "stream": True}), 502, "broken_before_first_event")

    def test_no_http(self) -> None:
        """Nor is something that is no HTTP, nor a connection that closes without a word."""
        endings: list[list[Step]] = [[b"SSH-2.0-OpenSSH_9.2\r\n", SILENCE], [FIN], [RESET]]
        for ending in endings:
            self.upstream.play(ending)
            self.assert_error(self.ask({"model": "hasty"}), 502, "connection_broken")

    def test_connection_refused(self) -> None:
        """An upstream that is not there is a failed attempt."""
        answered = self.ask({"model": "nobody"})
        self.assert_error(answered, 502, "connect_failed")
        self.assert_logged(answered, "502 connect_failed")


class KeptConnectionTests(FaultCase):
    """Upstreams that close connections which the gateway keeps."""

    def test_closed_after_each_answer(self) -> None:
        """No POST is lost when the upstream closes after each answer without having said so."""
        self.upstream.play([*script.MESSAGE_ANSWER, FIN])
        connection = self.connect()
        with self.rises(60, "requests_total", reason="complete"):
            statuses = {self.ask({"model": "patient"}, connection=connection).status for _ in range(60)}
        self.assertEqual(({200}, 60), (statuses, len(self.upstream.received)))

    def test_closed_on_use(self) -> None:
        """Nor when it closes them as the next request comes; each such second try is counted."""

        def answer_once(request: Received) -> list[Step]:
            return script.MESSAGE_ANSWER if request.connection.requests == 1 else [RESET]

        self.upstream.play(answer_once)
        connection = self.connect()
        with self.rises(59, "stale_connections_total", provider="patient"), self.rises(0, "retries_total"):
            statuses = [self.ask({"model": "patient"}, connection=connection).status for _ in range(60)]
        self.assertEqual([200] * 60, statuses)
        self.assertEqual(119, len(self.upstream.received))


class KeepAliveTests(FaultCase):
    """Upstreams that think for long."""

    def listen(self, kind: Kind, go_on: threading.Event) -> bytes:
        """Read a stream; let it go on when it was kept alive twice."""
        response = self.post(kind.asking("patient"), kind.path)
        heard = b""
        while heard.count(kind.alive) < 2:
            heard += response.read1(65536) or self.fail(f"the stream ended with {heard!r}")
        go_on.set()
        return heard + response.read()

    def test_between_events(self) -> None:
        """A silent stream is kept alive between two events, and nothing of it is changed."""
        for kind in KINDS:
            go_on, events = threading.Event(), [each for each in kind.whole if each != script.PING]
            half, rest = events[1][:9], events[1][9:]
            self.upstream.play(script.stream(events[0], half, go_on, rest, *events[2:]))
            heard = self.listen(kind, go_on)
            self.assertTrue(heard.startswith(events[0] + kind.alive), heard)
            self.assertEqual(b"".join(events), heard.replace(kind.alive, b""))

    def test_before_the_first_event(self) -> None:
        """A stream whose first event is late begins after `commit_seconds`, and is kept alive."""
        for kind in KINDS:
            go_on, events = threading.Event(), [each for each in kind.whole if each != script.PING]
            self.upstream.play(script.stream(go_on, *events))
            heard = self.listen(kind, go_on)
            self.assertTrue(heard.startswith(kind.alive))
            self.assertEqual(b"".join(events), heard.replace(kind.alive, b""))

    def test_error_after_keep_alives(self) -> None:
        """An error in a first event that is so late that the head has gone down comes down as it is."""
        for kind in KINDS:
            go_on = threading.Event()
            self.upstream.play(script.stream(go_on, kind.error))
            self.assertEqual(kind.error, self.listen(kind, go_on).replace(kind.alive, b""))


class LeavingClientTests(FaultCase):
    """Clients that leave."""

    PLAIN_BEGUN = script.head(200, ("content-length", "900000"))

    def check(
        self, answer: Answer, body: dict[str, Any], heard_of: bytes = b"", path: str = MESSAGES
    ) -> None:
        """Leave by FIN, and by RST, when some bytes are here: the upstream is let go, it is counted once."""
        for linger in (b"", struct.pack("ii", 1, 0)):
            self.upstream.play(answer)
            with self.rises(1, "requests_total", ended_by="client", reason="client_left"):
                client, heard = self.dial(body, path), b""
                until(lambda: self.upstream.received, "the request at the upstream")
                while heard_of not in heard:
                    heard += client.recv(65536) or self.fail(f"the answer ended with {heard!r}")
                if linger:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                left_at = time.monotonic()
                client.close()
                (connection,) = self.upstream.connections
                until(connection.left.is_set, "the end of the upstream's connection")
            self.assertLess(connection.left_at - left_at, PROMPT_SECONDS)

    def test_before_the_head(self) -> None:
        """While the upstream is still silent."""
        self.check([SILENCE], {"model": "patient"})
        self.check([SILENCE], {"model": "patient", "stream": True})

    def test_before_the_first_event(self) -> None:
        """While a stream's first event is waited for, before and after the head went down."""
        self.check([script.beginning(), SILENCE], {"model": "patient", "stream": True})
        self.check([script.beginning(), SILENCE], {"model": "patient", "stream": True}, b"ping")

    def test_within_a_stream(self) -> None:
        """Between two events of a stream."""
        for kind in KINDS:
            answer: list[Step] = [script.beginning(), script.chunk(kind.begun), SILENCE]
            self.check(answer, kind.asking("patient"), kind.begun[-9:], kind.path)

    def test_within_a_plain_answer(self) -> None:
        """Within a plain answer, held back or not."""
        self.check([self.PLAIN_BEGUN + b"{", SILENCE], {"model": "patient"})
        self.check([self.PLAIN_BEGUN + b"x" * 50000, SILENCE], {"model": "patient"}, b"xxx")

    def test_between_attempts(self) -> None:
        """While the gateway waits before it asks again: it never does."""
        self.upstream.play(script.limited("10"))
        with self.rises(1, "requests_total", ended_by="client", reason="client_left"):
            client = self.dial({"model": "patient"})
            until(lambda: self.upstream.received, "the first attempt")
            client.close()
        self.assertEqual(1, len(self.upstream.received))


class UnreadAnswerTests(FaultCase):
    """Clients that do not read."""

    CLIENTS = 200
    GROWTH_BYTES = 64 * 1024

    def rss_bytes(self) -> int:
        """Return the gateway's resident memory."""
        status = Path(f"/proc/{self.gateway.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024

    def fifty_megabytes(self, request: Received) -> Iterator[Step]:
        """Answer with very much, as a stream or plain."""
        delta = {"type": "text_delta", "text": "x" * 8000}
        first, piece = script.head(200, ("content-length", "50000000")), b"x" * 10000
        if json.loads(request.body)["stream"]:
            first = script.beginning() + script.chunk(script.MESSAGE_START)
            piece = script.chunk(script.event("content_block_delta", index=0, delta=delta))
        yield first
        for _ in range(5000):
            yield piece

    def wait_until_stuck(self) -> None:
        """Wait until no upstream can send any more."""
        seen, since = -1, 0.0

        def stuck() -> bool:
            nonlocal seen, since
            sent, now = sum(each.sent_bytes for each in self.upstream.connections), time.monotonic()
            if sent != seen:
                seen, since = sent, now
            return len(self.upstream.received) == self.CLIENTS and now > since + 0.5

        until(stuck, "every answer stuck", 60)

    def test_memory(self) -> None:
        """Two hundred answers of fifty megabytes that nobody reads cost little memory, and are let go."""
        self.upstream.play(script.MESSAGE_ANSWER)
        for _ in range(20):
            self.ask({"model": "patient"})
        before = self.rss_bytes()
        self.upstream.play(self.fifty_megabytes)
        asked = [{"model": "patient", "stream": index % 2 == 0} for index in range(self.CLIENTS)]
        clients = [self.dial(body, window_bytes=4096) for body in asked]
        self.wait_until_stuck()
        growth = (self.rss_bytes() - before) / self.CLIENTS
        self.assertLessEqual(growth, self.GROWTH_BYTES)
        self.upstream.play(script.MESSAGE_ANSWER)
        self.assertEqual(200, self.ask({"model": "patient"}).status)
        connections = self.upstream._all[-self.CLIENTS - 1 :]
        with self.rises(self.CLIENTS, "requests_total", ended_by="client"):
            for client in clients:
                client.close()
        self.assertEqual(self.CLIENTS, sum(each.left.is_set() for each in connections))
