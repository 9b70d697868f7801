"""
Three real gateways that hold one limit, one budget and one ledger, through all that befalls their servers.

They run with the configuration of the page on several nodes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import signal
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice, product
from random import Random

import attrs

from crabtwist.money import DOLLAR, in_dollars
from crabtwist.records import INTERRUPTED, MICROSECONDS
from tests.integration.callers import PATHS, Answer, Load, Question, until
from tests.integration.nodes import (
    BUDGET,
    CROWD,
    LIMIT,
    MOST_REQUESTS,
    MOST_SPENT,
    NodesCase,
    picodollars,
)
from tests.integration.running import RunningGateway

SLOW_SECONDS = 2.0
#: Far less than a slow reply takes, and enough for a machine that is busy with other things.
PROMPT_SECONDS = 1.0
#: A stream that lasts for 20 seconds.
LONG = "word " * 400
#: How many streams a node has when it is killed.
HELD = 3

#: What ends a budget: nobody has anything reserved, and there is not enough for another request.
_SPENT = {"budget_too_small", "budget_spent"}
_COST = re.compile(r"may cost \$([0-9.]+)")
_RESERVED = re.compile(r"still run \(\$([0-9.]+)\)")
_NAMES = ("principal", "model", "provider")
_SUMS = ("requests", "unpriced", "input_tokens", "output_tokens")
#: One token of an answer.
_TOKEN = DOLLAR // 1000


def show(measured: str) -> None:
    """Print what was measured."""
    print(f"\n      {measured}")  # noqa: T201 - a bound that holds says less than by how much


def _says(gateway: RunningGateway, since: int, words: str) -> bool:
    return words in gateway.log[since:]


class TogetherCase(NodesCase):
    """What three nodes have to hold together."""

    def questions(self, number: int, *keys: str, max_tokens: int = 4) -> list[Question]:
        """Return questions of all sorts: to all nodes, as all keys, in both dialects; some clients leave."""
        ways = [*product(self.gateways, keys, PATHS, (False, True), (False,) * 4 + (True,))]
        Random(self.asked).shuffle(ways)
        return [
            Question(
                gateway=gateway,
                key=key,
                path=path,
                model="slow",
                stream=stream,
                leaves=leaves,
                max_tokens=max_tokens,
                # One in eight is no question of its own, and the cache may answer it.
                text=f"this is number {self.asked + index if index % 8 else 0}",
            )
            for index, (gateway, key, path, stream, leaves) in enumerate(islice(cycle(ways), number))
        ]

    def spend(self) -> list[Answer]:
        """Ask until the budget is spent."""
        answers = self.ask_at_once(self.questions(45, "spender"))
        while not {each.error for each in answers[-45:] if each.status} <= _SPENT:
            answers += self.ask_at_once(self.questions(45, "spender"))
        return answers

    def use_up(self) -> list[Answer]:
        """Ask until the limit is used up."""
        answers: list[Answer] = []

        def is_used_up() -> bool:
            answers.extend(self.ask_at_once(self.questions(60, "limited")))
            self.until_delivered()
            return self.let_through() >= LIMIT

        until(is_used_up, "the limit is used up")
        return answers

    def let_through(self) -> int:
        """Return how many requests of `limited` were let through, in the minute that had most of them."""
        records = [each for each in self.records("limited") if each.attempts or each.cache_hit]
        times = sorted(each.accepted_at for each in records)
        return max(bisect_left(times, each + 60 * MICROSECONDS) - first for first, each in enumerate(times))

    def assert_held(self) -> None:
        """Check that limit and budget are used, and not exceeded by more than the page says."""
        self.until_delivered()
        through = self.let_through()
        spent = sum(each.cost or 0 for each in self.records("spender"))
        charged = BUDGET - self.agreed(self.left)
        show(f"{through} of {LIMIT} requests (at most {MOST_REQUESTS})")
        show(f"{in_dollars(spent)} of {in_dollars(BUDGET)} spent, {in_dollars(charged)} charged")
        self.assertTrue(LIMIT <= through <= MOST_REQUESTS, through)
        self.assertTrue(spent <= charged <= MOST_SPENT, (spent, charged))
        self.assertGreater(charged, BUDGET - 5 * _TOKEN)

    def agreed(self, told: Callable[[RunningGateway], int | None]) -> int:
        """Return what all nodes tell, as soon as it is the same."""
        amounts: set[int | None] = set()

        def is_agreed() -> bool:
            amounts.clear()
            amounts.update(map(told, self.gateways))
            return len(amounts) == 1 and None not in amounts

        until(is_agreed, "all nodes say the same")
        return amounts.pop() or 0

    def assert_totals(self) -> None:
        """Check that every node shows the totals that the ledger has."""
        columns = ", ".join((*_NAMES, *_SUMS, "cost"))
        which = f"grouping_by = '{','.join(_NAMES)}' AND days = 1"
        rows = self.sql(f"SELECT {columns} FROM crabtwist_total WHERE {which}")
        kept = sorted((*map(str, row[:-1]), in_dollars(int(row[-1]))[1:]) for row in rows)
        for gateway in self.gateways:
            until(partial(self.shows, gateway, kept), "the totals are the ledger's")

    def shows(self, gateway: RunningGateway, totals: list[tuple[str, ...]]) -> bool:
        """Say whether these are the totals that a node shows."""
        path = f"/v1/admin/extensions/usage/totals?by={','.join(_NAMES)}"
        shown = json.loads(self.shown(gateway, path))["totals"]
        names = (*_NAMES, *_SUMS, "cost_dollars")
        return totals == sorted(tuple(str(each[name]) for name in names) for each in shown)

    def hold(self, gateway: RunningGateway, key: str) -> http.client.HTTPResponse | None:
        """Begin a stream that lasts; None if it is refused."""
        self.asked += 1
        text = f"{LONG} {self.asked}"
        question = Question(gateway=gateway, key=key, model="slow", stream=True, text=text)
        connection = question.open()
        self.addCleanup(connection.close)
        question.send(connection)
        response = connection.getresponse()
        if response.status != 200:
            return None
        response.read1(1)
        return response

    def assert_given_back(self) -> None:
        """Check that `crowd` may have what is left of its budget, to the last token, and all its places."""
        until(self.takes_the_rest, "all that is left may be reserved")
        gateways, held = cycle(self.gateways), []

        def is_full() -> bool:
            held.append(self.hold(next(gateways), "crowd"))
            return sum(map(bool, held)) == CROWD

        until(is_full, "all places are free")

    def takes_the_rest(self) -> bool:
        """Ask for as long an answer as `crowd` has enough left for, and say whether it may have it."""
        much = Question(gateway=self.gateways[0], key="crowd", max_tokens=10**9)
        found = _COST.search(self.ask(much).text)
        assert found is not None
        prompt = picodollars(found[1]) - much.max_tokens * _TOKEN
        tokens = (self.left(much.gateway, "crowd") - prompt) // _TOKEN
        self.assertGreater(tokens, 300)
        return self.ask(attrs.evolve(much, max_tokens=tokens)).status == 200


class RedisTests(TogetherCase):
    """Limits and budgets in Redis, the ledger in PostgreSQL."""

    def test_together(self) -> None:
        """Hundreds at once, of all sorts, use one limit and one budget, and are all counted once."""
        first = self.ask_at_once(self.questions(360, "limited", "spender", "spender", "crowd", max_tokens=4))
        answers = [*first, *self.use_up(), *self.spend()]
        self.assert_held()
        self.assert_given_back()
        self.assert_recorded(answers)
        self.assert_totals()


class PostgresTests(TogetherCase):
    """Everything in PostgreSQL."""

    storage_kind = "postgres"

    def test_together(self) -> None:
        """The limit and the budget are held, and everything is counted once."""
        answers = [*self.use_up(), *self.spend()]
        self.assert_held()
        self.assert_recorded(answers)
        self.assert_totals()


class ServerTests(TogetherCase):
    """What befalls the servers."""

    def test_away(self) -> None:
        """Servers that are slow, hang, or die, Redis with all that it had, make nothing slow or wrong."""
        load = Load(self.gateways)
        self.addCleanup(load.end)
        answers = self.use()
        answers += self.away(load, lambda: self.delay(SLOW_SECONDS), lambda: self.delay(0))
        answers += self.away(load, self.hang, self.go_on)
        answers += self.away(load, self.die, self.come_back)
        answers += load.end()
        self.asked += len(load.answers)
        answers += [*self.use_up(), *self.spend()]
        self.assert_held()
        self.assert_recorded(answers)
        self.assert_totals()

    def use(self) -> list[Answer]:
        """Use some of the limit and of the budget."""
        return self.ask_at_once(self.questions(30, "limited", "spender"))

    def away(self, load: Load, go: Callable[[], None], return_: Callable[[], None]) -> list[Answer]:
        """Have both servers out of reach for a while; each request is answered promptly, without error."""
        load.more(60)
        since = len(load.answers)
        with self.all_say("out of touch with the store"):
            go()
        answers = self.use()
        with self.all_say("the store answers again"):
            return_()
        load.more(60)
        meanwhile = load.answers[since:]
        longest = max(each.seconds for each in meanwhile)
        show(f"{len(meanwhile)} requests, the longest took {longest:.3f} s")
        self.assertEqual([], [each for each in meanwhile if each.status != 200])
        self.assertLess(longest, PROMPT_SECONDS)
        return answers

    @contextlib.contextmanager
    def all_say(self, words: str) -> Iterator[None]:
        """Wait until all gateways have said something new of what they share."""
        since = [len(gateway.log) for gateway in self.gateways]
        yield
        for (gateway, begin), what in product(
            zip(self.gateways, since, strict=True), ("rate_limit", "budget")
        ):
            until(partial(_says, gateway, begin, f"{what}: {words}"), f"{what}: {words}")

    def delay(self, seconds: float) -> None:
        """Have replies take so long."""
        for road in self.roads:
            road.delay_seconds = seconds

    def hang(self) -> None:
        """Stop both in their tracks."""
        for server in (self.redis, self.postgres):
            server.pause()
            self.addCleanup(server.resume)

    def go_on(self) -> None:
        """Let both go on."""
        for server in (self.redis, self.postgres):
            server.resume()

    def die(self) -> None:
        """Kill both, and take from Redis what it had."""
        for server in (self.redis, self.postgres):
            server.kill()
        shutil.rmtree(self.redis.directory / "appendonlydir")

    def come_back(self) -> None:
        """Start both."""
        for server in (self.redis, self.postgres):
            server.start()


class RefuseTests(NodesCase):
    """A budget that is not to be used without the store."""

    nodes = 1

    def configuration(self) -> str:
        """Return one with a budget that refuses, and limits that do not."""
        begin, end = super().configuration().split("[extensions.budget]", 1)
        return f"{begin}[extensions.budget]{end.replace('local', 'refuse', 1)}"

    def test_refused(self) -> None:
        """Without Redis requests are refused with a 503 that says when to ask again, and only then."""
        asking = [Question(gateway=self.gateways[0], key="many", path=path) for path in PATHS]
        self.assertEqual([200, 200], [each.answer().status for each in asking])
        self.redis.kill()
        until(lambda: "budget: out of touch with the store" in self.gateways[0].log, "it is noticed")
        for answer in [each.answer() for each in asking]:
            self.assertEqual(
                (503, "5", "store_unreachable"), (answer.status, answer.retry_after, answer.error)
            )
            self.assertIn("cannot reach its store", answer.text)
            self.assertLess(answer.seconds, PROMPT_SECONDS)
        self.redis.start()
        until(lambda: "budget: the store answers again" in self.gateways[0].log, "it is noticed")
        self.assertEqual([200, 200], [each.answer().status for each in asking])


class CrashTests(TogetherCase):
    """What befalls a node."""

    def test_killed(self) -> None:
        """What a node spent and reserved before it was killed stays spent, and is recorded once."""
        load = Load(self.gateways)
        self.addCleanup(load.end)
        answers = self.ask_at_once(self.questions(30, "spender"))
        for _ in range(HELD):
            until(lambda: self.hold(self.gateways[0], "spender"), "a stream begins")
        reserved, left = self.agreed(self.reserved), self.agreed(self.left)
        self.restart_first()
        more = Load(self.gateways[:1])
        self.addCleanup(more.end)
        more.more(60)
        answers += [*load.end(), *more.end(), *self.use_up()]
        self.asked += len(load.answers) + len(more.answers)
        expected = {left - reserved}
        until(lambda: {*map(self.left, self.gateways)} == expected, "what was reserved is spent")
        answers += self.spend()
        self.assert_held()
        # The two callers of the node that was killed.
        self.assert_recorded(answers, lost=2)
        held = [each for each in self.records("spender") if each.reason == INTERRUPTED]
        self.assertEqual((HELD, reserved), (len(held), sum(each.cost or 0 for each in held)))

    def restart_first(self) -> None:
        """Kill the first node, and start it again in its folder."""
        self.gateways[0].send(signal.SIGKILL)
        self.gateways[0].wait()
        self.gateways[0] = self.start(self.directories[0])
        self.until_known()

    def reserved(self, gateway: RunningGateway) -> int | None:
        """Return what `spender` has reserved, if a gateway tells that to who asks for nearly all."""
        tokens = self.left(gateway) // _TOKEN - 5
        told = self.ask(Question(gateway=gateway, key="spender", max_tokens=tokens)).text
        match = _RESERVED.search(told)
        return picodollars(match[1]) if match else None
