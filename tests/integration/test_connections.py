"""Connections by the thousand, and those that take their time."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import time
from http.client import HTTPConnection
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.integration.running import RunningGateway, running

BASE = """
allow_anonymous = true
[providers.echo]
kind = "echo"
models = ["echo"]
"""
MANY = 10_000
#: Descriptors that both processes need for other things.
OTHERS = 200
#: More than a connection that has asked and waits should cost the gateway.
BYTES_PER_CONNECTION = 8 * 1024
SECONDS = 30.0
DRIP_SECONDS = 0.2
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


def memory_bytes(gateway: RunningGateway) -> int:
    """Return what the gateway has of the machine's memory."""
    try:
        pages = Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1]
    except OSError:
        raise SkipTest("the memory of a process can be read on Linux alone") from None
    return int(pages) * resource.getpagesize()


class Case(SynchronousTestCase):
    def run_gateway(self, top: str) -> RunningGateway:
        """Return a running gateway, ended with the test."""
        context = running(Path(self.mktemp()).absolute(), top + BASE)
        gateway = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.place = (gateway.host, gateway.port)
        return gateway

    def connect(self, send: bytes = b"") -> socket.socket:
        """Return a connection, closed with the test, on which something was sent."""
        client = socket.create_connection(self.place, SECONDS)
        self.addCleanup(client.close)
        client.sendall(send)
        return client

    def answer_seconds(self, *, stream: bool = False) -> float:
        """Return how long a whole answer takes that has to be right."""
        began_at = time.monotonic()
        connection = HTTPConnection(*self.place, timeout=SECONDS)
        self.addCleanup(connection.close)
        messages = [{"role": "user", "content": "hello"}]
        connection.request(
            "POST", "/v1/messages", json.dumps({"model": "echo", "stream": stream, "messages": messages})
        )
        response = connection.getresponse()
        self.assertIn(b'"text":"hello"', response.read())
        return time.monotonic() - began_at


class TestIdle(Case):
    def allow(self, count: int) -> int:
        """Return how many connections this process and its children may open, `count` at most."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + OTHERS if hard == resource.RLIM_INFINITY else min(count + OTHERS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        return min(count, wanted - OTHERS)

    def wait_idly(self, count: int) -> list[socket.socket]:
        """Return connections that have had an answer each."""
        clients = [self.connect(GET) for _ in range(count)]
        for client in clients:
            self.assertIn(b"200 OK", client.recv(4096))
        return clients

    def test_many(self) -> None:
        """Ten thousand connections that wait cost little memory, and delay nobody."""
        count = self.allow(MANY)
        gateway = self.run_gateway("keep_alive_timeout = 600\n")
        self.answer_seconds(stream=True)
        before = memory_bytes(gateway)
        self.wait_idly(count)
        self.assertLess((memory_bytes(gateway) - before) / count, BYTES_PER_CONNECTION)
        for stream in False, True:
            self.assertLess(self.answer_seconds(stream=stream), 1)

    def test_keep_alive_timeout(self) -> None:
        """A connection that waits is closed after `keep_alive_timeout`, not before."""
        self.run_gateway("keep_alive_timeout = 2\n")
        began_at = time.monotonic()
        clients = self.wait_idly(self.allow(300))
        self.assertEqual({client.recv(1) for client in clients}, {b""})
        self.assertTrue(2 <= time.monotonic() - began_at < 6)


class TestSlow(Case):
    def drip(self, beginning: bytes, client: socket.socket) -> tuple[bytes, float]:
        """Send a byte now and again until there is an answer; return it, and how long it took."""
        began_at = time.monotonic()
        client.sendall(beginning)
        while not select.select([client], [], [], DRIP_SECONDS)[0]:
            self.assertLess(time.monotonic() - began_at, SECONDS)
            client.sendall(b"x")
        return client.recv(4096), time.monotonic() - began_at

    def assert_cut(self, beginning: bytes, client: socket.socket | None = None) -> None:
        answer, seconds = self.drip(beginning, client or self.connect())
        self.assertTrue(answer.startswith(b"HTTP/1.1 408 "), answer)
        self.assertIn(b"\r\nconnection: close\r\n", answer.lower())
        self.assertTrue(1 <= seconds < 3, seconds)

    def test_head(self) -> None:
        """A head is cut at `head_timeout`, though it goes on coming."""
        self.run_gateway("head_timeout = 1\n")
        self.assert_cut(b"GET /health HTTP/1.1\r\nHost: a\r\nX: ")
        self.assertLess(self.answer_seconds(), 1)

    def test_second_head(self) -> None:
        """So is the head of a connection's second request, from its first byte on."""
        self.run_gateway("head_timeout = 1\n")
        client = self.connect(GET)
        self.assertIn(b"200 OK", client.recv(4096))
        self.assert_cut(b"GET /health HTTP/1.1\r\nHost: a\r\nX: ", client)

    def test_body(self) -> None:
        """A body is cut at `body_timeout`, though it goes on coming."""
        self.run_gateway("body_timeout = 1\n")
        self.assert_cut(b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")

    def test_silence(self) -> None:
        """A connection on which nothing was ever said is closed at `head_timeout`."""
        self.run_gateway("head_timeout = 1\n")
        self.assertEqual(self.connect().recv(1), b"")


class TestDescriptors(Case):
    def test_exhaustion(self) -> None:
        """Without descriptors for new connections the gateway lives on, and recovers when it has some."""
        if not hasattr(resource, "prlimit"):
            raise SkipTest("the limits of another process can be set on Linux alone")
        gateway = self.run_gateway("")
        old = self.connect(GET)
        self.assertIn(b"200 OK", old.recv(4096))
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        crowd = [self.connect() for _ in range(200)]
        old.sendall(GET)
        self.assertIn(b"200 OK", old.recv(4096))
        self.assertTrue(select.select(crowd, [], [], 0)[0], "all were taken")
        for client in crowd:
            client.close()
        self.assertLess(self.recovery_seconds(), 5)
        gateway.stop()
        self.assertLess(gateway.log.count("\n"), 1000)

    def recovery_seconds(self) -> float:
        """Return how long it takes until there is an answer again."""
        began_at = time.monotonic()
        while time.monotonic() - began_at < SECONDS:
            with contextlib.suppress(ConnectionError):
                self.answer_seconds(stream=True)
                break
        return time.monotonic() - began_at
