"""The cache of a running gateway: hundreds who ask the same, slow ones, and those who leave."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sqlite3
import threading
import urllib.request
from pathlib import Path
from string import Template
from typing import Any

import anthropic
import openai
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.money import DOLLAR
from crabtwist.records import Record, decode_record
from tests.integration import scripted_upstream as script
from tests.integration.running import running
from tests.integration.scripted_upstream import ScriptedUpstream, stream
from tests.integration.test_fidelity import CHAT, COMMON, KEY, MESSAGES, UPSTREAM_KEY, GatewayCase, until

CONFIGURATION = """
[providers.claude]
kind = "anthropic"
api_key = "$key"
base_url = "$up"
max_retries = 0
models = ["claude"]
[providers.gpt]
kind = "openai"
api_key = "$key"
base_url = "$up/v1"
max_retries = 0
models = ["gpt"]
[models.claude-answering]
input = 10
cache_read = 1
output = 100
[extensions.cache]
"""

#: What `WHOLE` costs: 12 tokens in, 5 more from the vendor's cache, 7 out.
COST = (12 * 10 + 5 * 1 + 7 * 100) * DOLLAR // 10**6

WHOLE = b"".join(script.TEXT_STREAM)
MIB = 1 << 20


def send(host: str, port: int, body: bytes, *, small_buffer: bool = False) -> http.client.HTTPConnection:
    """Send a request; return the connection that its answer comes by."""
    connection = http.client.HTTPConnection(host, port, timeout=script.PATIENCE_SECONDS)
    connection.sock = sock = socket.socket()
    sock.settimeout(script.PATIENCE_SECONDS)
    if small_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, port))
    connection.request("POST", MESSAGES, body, {"x-api-key": KEY})
    return connection


class CacheCase(GatewayCase):
    """A gateway with a cache."""

    CONFIGURATION = CONFIGURATION

    def body(self, **more: Any) -> bytes:
        """Return a body that no other test sends."""
        messages = [{"role": "user", "content": self.id()}]
        return json.dumps({"model": "claude", "max_tokens": 9, "messages": messages, **more}).encode()

    def send(self, body: bytes, *, small_buffer: bool = False) -> http.client.HTTPConnection:
        """Send a request, and wait for no answer."""
        connection = send(self.gateway.host, self.gateway.port, body, small_buffer=small_buffer)
        self.addCleanup(connection.close)
        return connection

    def wait_for_active(self, number: int) -> None:
        """Wait until so many requests are being answered."""
        until(lambda: self.counter("active_connections") == number, f"{number} requests")

    def memory_bytes(self) -> int:
        """Return what the gateway has in memory."""
        status = Path(f"/proc/{self.gateway.process.pid}/status").read_text()
        [kib] = re.findall(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)
        return int(kib) * 1024

    def said(self, response: http.client.HTTPResponse) -> tuple[int, str | None]:
        """Return an answer's status, and what it says of the cache."""
        return response.status, response.getheader("x-crabtwist-cache")


class SharingTests(CacheCase):
    """Many who ask the same at once."""

    def test_three_hundred(self) -> None:
        """Three hundred who ask the same at once share one call, and get the same bytes."""
        go, on, body = threading.Event(), threading.Event(), self.body(stream=True)
        self.upstream.play([go, *stream(*script.TEXT_STREAM[:3], on, *script.TEXT_STREAM[3:])])
        connections = [self.send(body) for _ in range(300)]
        self.wait_for_active(300)
        go.set()
        answers = [connection.getresponse() for connection in connections]
        begun = [answer.read(len(script.MESSAGE_START)) for answer in answers]
        on.set()
        for answer, beginning in zip(answers, begun, strict=True):
            self.assertEqual(WHOLE, beginning + answer.read())
        self.assertEqual(1, len(self.upstream.received))
        said = [answer.getheader("x-crabtwist-cache") for answer in answers]
        self.assertEqual((1, 299), (said.count("miss"), said.count("hit")))

    def test_three_hundred_plain_ones(self) -> None:
        """So do those who want a plain answer."""
        go = threading.Event()
        self.upstream.play([go, *script.MESSAGE_ANSWER])
        connections = [self.send(self.body()) for _ in range(300)]
        self.wait_for_active(300)
        go.set()
        bodies = {connection.getresponse().read() for connection in connections}
        self.assertEqual({json.dumps(script.MESSAGE).encode()}, bodies)
        self.assertEqual(1, len(self.upstream.received))

    def test_late_one(self) -> None:
        """A late one gets at once what has come, and then what comes."""
        on = threading.Event()
        self.upstream.play(stream(script.MESSAGE_START, *script.HELLO[:2], on, *script.TEXT_STREAM[4:]))
        first = self.send(self.body(stream=True)).getresponse()
        come = b"".join([script.MESSAGE_START, *script.HELLO[:2]])
        self.assertEqual(come, first.read(len(come)))
        late = self.send(self.body(stream=True)).getresponse()
        self.assertEqual((come, (200, "hit")), (late.read(len(come)), self.said(late)))
        on.set()
        self.assertEqual(first.read(), late.read())

    def test_first_one_leaves(self) -> None:
        """The first one's leaving ends neither the call nor the others; the last one's does, at once."""
        on, body = threading.Event(), self.body(stream=True)
        self.upstream.play(script.broken_stream(script.MESSAGE_START, on, *script.HELLO, script.SILENCE))
        connections = [self.send(body) for _ in range(3)]
        answers = [connection.getresponse() for connection in connections]
        for answer in answers:
            answer.read(len(script.MESSAGE_START))
        answers[0].close()
        connections[0].close()
        until(lambda: self.counter("open_streams") == 2, "the first one's leaving")
        on.set()
        hello = b"".join(script.HELLO)
        self.assertEqual([hello, hello], [answer.read(len(hello)) for answer in answers[1:]])
        upstream = self.upstream.connections[0]
        self.assertFalse(upstream.left.is_set())
        for answer, connection in zip(answers[1:], connections[1:], strict=True):
            answer.close()
            connection.close()
        self.assertTrue(upstream.left.wait(5))
        self.wait_for_active(0)

    def test_error_for_all(self) -> None:
        """An upstream's error goes to all who wait for it, and is not kept."""
        go = threading.Event()
        self.upstream.play([go, *script.OVERLOADED], script.MESSAGE_ANSWER)
        connections = [self.send(self.body()) for _ in range(20)]
        self.wait_for_active(20)
        go.set()
        self.assertEqual({529}, {connection.getresponse().status for connection in connections})
        self.assertEqual((200, "miss"), self.said(self.send(self.body()).getresponse()))


class SlowTests(CacheCase):
    """Clients that do not read; answers are larger than what the network holds for them, 4 MiB."""

    CONFIGURATION = CONFIGURATION + "max_entry_bytes = 8388608"

    def large(self, size: int) -> list[bytes]:
        """Return a stream of so many bytes, in events."""
        text = "x" * 8000
        delta = script.event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        return [script.MESSAGE_START, *([delta] * (size // len(delta))), *script.message_end("end_turn", 7)]

    def test_slow_ones_hold_nobody_up(self) -> None:
        """Many who do not read neither hold the others up nor cost memory: all read the same bytes."""
        go, events, body = threading.Event(), self.large(7 * MIB), self.body(stream=True)
        self.upstream.play([go, *stream(*events)])
        slow = [self.send(body, small_buffer=True) for _ in range(20)]
        quick = [self.send(body) for _ in range(3)]
        self.wait_for_active(23)
        before = self.memory_bytes()
        go.set()
        whole = b"".join(events)
        self.assertEqual([True] * 3, [each.getresponse().read() == whole for each in quick])
        self.wait_for_active(20)
        # Each with a copy of its own, they would hold 140 MiB.
        self.assertLess(self.memory_bytes() - before, 30 * MIB)
        self.assertTrue(all(each.getresponse().read() == whole for each in slow))
        self.assertEqual(1, len(self.upstream.received))

    def test_too_large_to_keep(self) -> None:
        """An answer beyond the bound goes at the pace of the slowest, in bounded memory, while that stays."""
        go, events, body = threading.Event(), self.large(40 * MIB), self.body(stream=True)
        self.upstream.play([go, *stream(*events)])
        slow, connection = self.send(body, small_buffer=True), self.send(body)
        self.wait_for_active(2)
        before, data, sizes = self.memory_bytes(), [], [0]
        go.set()
        quick = connection.getresponse()

        def read() -> None:
            while more := quick.read1(65536):
                data.append(more)
                sizes[0] += len(more)

        reading = threading.Thread(target=read)
        reading.start()
        until(lambda: sizes[0] > MIB and self.is_still(sizes), "the bound")
        self.assertLess(sizes[0], 20 * MIB)
        self.assertLess(self.memory_bytes() - before, 30 * MIB)
        slow.close()
        reading.join(script.PATIENCE_SECONDS)
        self.assertTrue(b"".join(data) == b"".join(events))

    def is_still(self, sizes: list[int]) -> bool:
        """Tell whether nothing has come for a moment."""
        size = sizes[0]
        threading.Event().wait(0.3)
        return size == sizes[0]


class ClientTests(CacheCase):
    """The vendors' own clients, on the second time."""

    def test_anthropic(self) -> None:
        """Anthropic's gets a stream from the cache as from the vendor."""
        self.upstream.play(stream(*script.THINKING_STREAM))
        client = anthropic.Anthropic(base_url=self.gateway.url, api_key=KEY, max_retries=0)
        self.addCleanup(client.close)
        asked: Any = {"model": "claude", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]}
        messages = []
        for _ in range(2):
            with client.messages.stream(**asked) as events:
                messages.append(events.get_final_message())
                said = events.response.headers["x-crabtwist-cache"]
        self.assertEqual(("hit", 1), (said, len(self.upstream.received)))
        self.assertEqual(*messages)
        self.assertEqual("tool_use", messages[1].stop_reason)

    def test_openai(self) -> None:
        """So does OpenAI's."""
        self.upstream.play(stream(*script.CHAT_STREAM))
        client = openai.OpenAI(base_url=self.gateway.url + "/v1", api_key=KEY, max_retries=0)
        self.addCleanup(client.close)
        asked: Any = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        first, second = (list(client.chat.completions.create(**asked)) for _ in range(2))
        self.assertEqual(first, second)
        self.assertEqual("Hi you", "".join(each.choices[0].delta.content or "" for each in second))
        self.assertEqual(1, len(self.upstream.received))

    def test_cache_control(self) -> None:
        """A client that wants a new answer, or none kept, says so and is told so."""
        fields = (("x-api-key", KEY), ("cache-control", "no-cache"))
        self.upstream.play(script.CHAT_ANSWER)
        body = json.dumps({"model": "gpt", "messages": [], "user": self.id()}).encode()
        said = [
            self.said(self.post(body, CHAT, fields=each))
            for each in ((fields[0],), fields, (fields[0],), (fields[0], ("cache-control", "no-store")))
        ]
        self.assertEqual(["miss", "bypass", "hit", "bypass"], [word for _, word in said])
        self.assertEqual(3, len(self.upstream.received))


class LedgerTests(SynchronousTestCase):
    """What the ledger says of it afterwards."""

    def test_who_pays(self) -> None:
        """Who asked pays, once, also where it left; hits cost nothing, and say that they are hits."""
        directory, on = Path(self.mktemp()).absolute(), threading.Event()
        with ScriptedUpstream() as upstream:
            names = {"up": upstream.url, "key": UPSTREAM_KEY}
            with running(directory, Template(CONFIGURATION + COMMON).substitute(names)) as gateway:
                upstream.play(stream(script.MESSAGE_START, on, *script.TEXT_STREAM[1:]))
                body = json.dumps({"model": "claude", "messages": [], "stream": True}).encode()
                leader = send(gateway.host, gateway.port, body)
                left = leader.getresponse()
                followers = [send(gateway.host, gateway.port, body) for _ in range(5)]
                answers = [follower.getresponse() for follower in followers]
                left.close()
                leader.close()
                until(lambda: self.open_streams(gateway.url) == 5, "the first one's leaving")
                on.set()
                self.assertEqual({WHOLE}, {answer.read() for answer in answers})
                send(gateway.host, gateway.port, body).getresponse().read()
                gateway.stop()
                self.assertEqual(1, len(upstream.received))
        records = self.records(directory)
        [paid] = [record for record in records if not record.cache_hit]
        self.assertEqual((COST, 499, 1), (paid.cost, paid.status, len(paid.attempts)))
        hits = [record for record in records if record.cache_hit]
        self.assertEqual(
            [(0, 200, None, 0)] * 6, [(r.cost, r.status, r.usage, len(r.attempts)) for r in hits]
        )

    def open_streams(self, url: str) -> int:
        """Return how many streams are being relayed."""
        with urllib.request.urlopen(url + "/metrics") as answer:
            [number] = re.findall(rb"^crabtwist_open_streams (\S+)$", answer.read(), re.MULTILINE)
        return int(float(number))

    def records(self, directory: Path) -> list[Record]:
        """Return all records."""
        with sqlite3.connect(directory / "crabtwist-ledger.db") as database:
            rows = database.execute("SELECT body FROM record").fetchall()
        return [decode_record(row[0].encode()) for row in rows]
