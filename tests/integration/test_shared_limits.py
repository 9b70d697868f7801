"""One limit on three real gateways and a real Redis, and what that does while it is slow, hung or gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from crabtwist.leases import BLOCKS, HEARTBEAT_SECONDS
from tests.integration import servers
from tests.integration.running import RunningGateway
from tests.integration.slow_road import SlowRoad

NODES = 3
LIMIT = 100
#: How many are let through at the most: a tenth more for each node but one.
MOST = LIMIT + (NODES - 1) * (LIMIT // BLOCKS)
SLOW_SECONDS = 2.0
#: Far less than a slow reply takes, and enough for a machine that is busy with other things.
PROMPT_SECONDS = 1.0

CONFIGURATION = """
[storage]
kind = "redis"
url = "{url}"

[extensions.rate_limit]
without_store = "{without_store}"
requests_per_minute = 100_000

[extensions.rate_limit.keys.first]
requests_per_minute = 100

[extensions.rate_limit.keys.second]
requests_per_minute = 100

[[keys]]
name = "many"
key = "sk-ct-many"

[[keys]]
name = "first"
key = "sk-ct-first"

[[keys]]
name = "second"
key = "sk-ct-second"

[providers.echo]
models = ["echo"]
"""

_OUT_OF_TOUCH = re.compile("rate_limit: out of touch with the store")
_IN_TOUCH = re.compile("rate_limit: the store answers again")


@attrs.frozen
class Answer:
    """What came back, and how long that took."""

    status: int
    retry_after: str | None
    text: str
    seconds: float


class Client:
    """Asks one gateway, over one connection."""

    def __init__(self, gateway: RunningGateway, key: str) -> None:
        self._connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=30)
        self._connection.connect()
        self._key = f"sk-ct-{key}"

    def ask(self) -> Answer:
        """Send a request, and return its answer."""
        body = json.dumps({"model": "echo", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]})
        began = time.monotonic()
        self._connection.request("POST", "/v1/messages", body, {"x-api-key": self._key})
        response = self._connection.getresponse()
        text = response.read().decode()
        seconds = time.monotonic() - began
        return Answer(response.status, response.getheader("retry-after"), text, seconds)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Load:
    """Requests to all gateways, one behind the other on each, until it is told to end."""

    def __init__(self, gateways: list[RunningGateway]) -> None:
        self.answers: list[Answer] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in gateways]
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Answer]:
        """Return all answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
        return self.answers

    def _run(self, gateway: RunningGateway) -> None:
        client = Client(gateway, "many")
        while not self._ended.wait(0.005):
            self.answers.append(client.ask())
        client.close()


def show(measured: str) -> None:
    """Print what was measured."""
    print(f"\n      {measured}")  # noqa: T201 - a bound that holds says less than by how much


class SharedLimitCase(SynchronousTestCase):
    """Three gateways on one Redis."""

    without_store = "local"

    def setUp(self) -> None:
        """Start everything, and wait until the nodes have heard of each other."""
        if servers.redis_program() is None:
            raise SkipTest("the Debian package redis-server is missing")
        self.server = servers.RedisServer()
        self.addCleanup(self.server.remove)
        self.server.start()
        self.road = SlowRoad(self.server.port)
        self.addCleanup(self.road.close)
        with ThreadPoolExecutor(NODES) as pool:
            self.gateways = list(pool.map(self.start, [Path(self.mktemp()) for _ in range(NODES)]))
        time.sleep(HEARTBEAT_SECONDS + 0.5)

    def start(self, directory: Path) -> RunningGateway:
        """Start a gateway."""
        directory.mkdir(parents=True)
        url = self.road.leads(self.server.url)
        configuration = CONFIGURATION.format(url=url, without_store=self.without_store)
        (directory / "crabtwist.toml").write_text(configuration)
        gateway = RunningGateway(directory, "-l", "127.0.0.1:0")
        self.addCleanup(gateway.kill)
        return gateway

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Have requests all the while; each is answered promptly, and none with an error."""
        load = Load(self.gateways)
        try:
            yield
        finally:
            answers = load.end()
        seconds = sorted(each.seconds for each in answers)
        statuses = Counter(each.status for each in answers)
        p99 = seconds[len(seconds) * 99 // 100]
        show(f"{statuses}; p99 {p99:.3f} s, longest {seconds[-1]:.3f} s")
        self.assertEqual({200}, set(statuses))
        self.assertGreater(len(answers), 100)
        self.assertLess(seconds[-1], PROMPT_SECONDS)

    def wait_for(self, pattern: re.Pattern[str]) -> None:
        """Wait until all gateways have logged something."""
        for gateway in self.gateways:
            gateway.wait_for(pattern, 15)

    def at_once(self, key: str, number: int) -> list[Answer]:
        """Send requests over as many connections, spread over the gateways, all at once."""
        clients = [Client(self.gateways[each % NODES], key) for each in range(number)]
        barrier = threading.Barrier(number)

        def ask(client: Client) -> Answer:
            barrier.wait(30)
            return client.ask()

        with ThreadPoolExecutor(number) as pool:
            answers = list(pool.map(ask, clients))
        for client in clients:
            client.close()
        self.assertLessEqual({each.status for each in answers}, {200, 429})
        return answers

    def admitted(self, key: str) -> list[int]:
        """Return how many of 300 requests at once are let through, and of some more each second after."""
        rounds = []
        for number in (300, 60, 60, 60):
            rounds.append(sum(each.status == 200 for each in self.at_once(key, number)))
            time.sleep(1)
        return rounds

    def check_limit(self, key: str) -> None:
        """Use a limit up, and see that it is one."""
        rounds = self.admitted(key)
        show(f"of a limit of {LIMIT}, {sum(rounds)} were let through ({rounds}); at most {MOST} may be")
        self.assertLessEqual(sum(rounds), MOST)
        self.assertGreaterEqual(sum(rounds), LIMIT)


class LocalTests(SharedLimitCase):
    """Nodes that go on with their part while the store is gone."""

    def test_one_limit(self) -> None:
        """Three hundred requests at once, spread over three gateways, get what one would let through."""
        self.check_limit("first")

    def test_slow(self) -> None:
        """A Redis that takes two seconds for each reply makes no request slower."""
        with self.load():
            self.road.delay_seconds = SLOW_SECONDS
            self.wait_for(_OUT_OF_TOUCH)
            time.sleep(SLOW_SECONDS)
            self.road.delay_seconds = 0
            self.wait_for(_IN_TOUCH)
        self.check_limit("second")

    def test_hung(self) -> None:
        """A Redis that hangs makes no request slower; each node has its part, and the rest afterwards."""
        with self.load():
            self.server.pause()
            self.wait_for(_OUT_OF_TOUCH)
            answers = self.at_once("first", 300)
            self.server.resume()
            self.wait_for(_IN_TOUCH)
        self.assertEqual(NODES * (LIMIT // NODES), sum(each.status == 200 for each in answers))
        self.check_limit("second")

    def test_killed(self) -> None:
        """A Redis that is killed and started again does not harm; what was used before still counts."""
        before = sum(each.status == 200 for each in self.at_once("first", 30))
        with self.load():
            self.server.kill()
            self.wait_for(_OUT_OF_TOUCH)
            time.sleep(1)
            self.server.start()
            self.wait_for(_IN_TOUCH)
        rounds = self.admitted("first")
        self.assertTrue(LIMIT <= before + sum(rounds) <= MOST, (before, rounds))


class RefuseTests(SharedLimitCase):
    """Nodes that refuse while the store is gone."""

    without_store = "refuse"

    def test_killed(self) -> None:
        """Without Redis requests are refused with a 503 that says when to ask again, and only then."""
        clients = [Client(gateway, "many") for gateway in self.gateways]
        self.assertEqual([200] * NODES, [client.ask().status for client in clients])
        self.server.kill()
        self.wait_for(_OUT_OF_TOUCH)
        for client in clients:
            answer = client.ask()
            self.assertEqual((503, "5"), (answer.status, answer.retry_after))
            self.assertIn("does not answer", answer.text)
            self.assertLess(answer.seconds, PROMPT_SECONDS)
        self.server.start()
        self.wait_for(_IN_TOUCH)
        self.assertEqual([200] * NODES, [client.ask().status for client in clients])
        for client in clients:
            client.close()
