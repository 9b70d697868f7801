"""What a running gateway shows of itself: over a socket, with real requests."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.running import CHECKOUT, RunningGateway

TOKEN = "ct-admin-of-this-test"
SECRET_KEY = "of-no-less-than-thirty-two-letters"
SECRETS = (TOKEN, SECRET_KEY, "sk-ct-ann", "sk-ct-bob", "sk-of-the-upstream")
CONFIGURATION = f"""
admin_token = "{TOKEN}"
secret_key = "{SECRET_KEY}"
ping_seconds = 0.3
shutdown_timeout = 20

[[keys]]
name = "ann"
key = "sk-ct-ann"
budget = {{ dollars = 0.01 }}

[[keys]]
name = "bob"
key = "sk-ct-bob"

[providers.echo]
models = ["echo", "dear"]

[providers.openai]
api_key = "sk-of-the-upstream"
base_url = "http://127.0.0.1:9"
models = ["gpt"]

[models.echo]
input = 1
output = 2

[models.dear]
input = 1000
output = 2000.5
cache_read = 100

[extensions.cache]
[extensions.budget]
"""
WORDS = "one two three four"
WAIT_SECONDS = 15.0
#: For what the pages say to type.
ENVIRON = {"PATH": "/usr/bin:/bin", "CRABTWIST_ADMIN_TOKEN": TOKEN, "CRABTWIST_KEY": "sk-ct-ann"}


class AdminReadsTestCase(SynchronousTestCase):
    """A gateway, and clients of it."""

    def setUp(self) -> None:
        """Start it."""
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()
        self.start(CONFIGURATION)

    def start(self, configuration: str) -> None:
        """Start a gateway in the folder of this test."""
        (self.directory / "crabtwist.toml").write_text(configuration)
        self.gateway = RunningGateway(self.directory, "-l", "127.0.0.1:0")
        self.addCleanup(self.gateway.kill)

    def call(self, method: str, path: str, token: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
        """Return status, document and fields of an answer."""
        with closing(http.client.HTTPConnection(self.gateway.host, self.gateway.port, timeout=30)) as wire:
            data = None if body is None else json.dumps(body)
            wire.request(method, path, data, {"authorization": f"Bearer {token}"})
            answer = wire.getresponse()
            text = answer.read()
            document = json.loads(text) if text.startswith((b"{", b"[")) else text
            return answer.status, document, {name.lower(): value for name, value in answer.getheaders()}

    def admin(self, path: str, method: str = "GET") -> Any:
        """Return what an administrator is shown."""
        status, document, _ = self.call(method, f"/v1/admin/{path}", TOKEN)
        self.assertEqual(200, status, document)
        return document

    def ask(self, key: str = "ann", model: str = "echo", words: str = WORDS, *, stream: bool = False) -> str:
        """Send a request; returns its id."""
        messages = [{"role": "user", "content": words}]
        body = {"model": model, "max_tokens": 50, "messages": messages, "stream": stream}
        _, _, fields = self.call("POST", "/v1/messages", f"sk-ct-{key}", body)
        return fields["x-crabtwist-request-id"]

    def until(self, is_so: Callable[[], Any]) -> Any:
        """Return what is so, when it is."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            found = is_so()
            if found or time.monotonic() > deadline:
                self.assertTrue(found)
                return found
            time.sleep(0.05)

    def listed(self, number: int, query: str = "") -> list[Any]:
        """Return the list of requests when the ledger has so many of them."""

        def enough() -> list[Any]:
            found: list[Any] = self.admin(f"requests?limit=1000{query}")["requests"]
            return found if len(found) >= number else []

        found: list[Any] = self.until(enough)
        self.assertEqual(number, len(found))
        return found


class RecordsTests(AdminReadsTestCase):
    """Requests after they have ended."""

    def test_pages(self) -> None:
        """All requests are listed, newest first, also page by page, and by every filter."""
        ids = [self.ask(("ann", "bob")[number % 2], words=f"word {number}") for number in range(7)]
        ids.append(self.ask(model="made-up"))
        self.assertEqual(ids[::-1], [each["id"] for each in self.listed(8)])
        found, query = [], "requests?limit=3"
        while query:
            page = self.admin(query)
            found += page["requests"]
            query = page["next"] and f"requests?limit=3&before={page['next']}"
        self.assertEqual(ids[::-1], [each["id"] for each in found])
        self.assertEqual(3, len(self.listed(3, "&principal=bob")))
        [refused] = self.listed(1, "&reason=model_not_found")
        self.assertEqual(
            (404, "made-up", "0.00"), (refused["status"], refused["model"], refused["cost_dollars"])
        )
        middle = found[4]["accepted_at"]
        after, before = self.listed(5, f"&since={middle}"), self.listed(3, f"&until={middle}")
        self.assertEqual(ids[::-1], [each["id"] for each in [*after, *before]])

    def test_receipts(self) -> None:
        """Each receipt adds up to the cost, line by line, at once after the request and later."""
        for model, stream in (("echo", False), ("dear", True), ("echo", True), ("dear", False)):
            request_id = self.ask("bob", model, words=f"{model} {stream} " + WORDS, stream=stream)
            shown = self.admin(f"requests/{request_id}")
            receipt = shown["receipt"]
            self.assertEqual([], receipt["unpriced"])
            for line in receipt["lines"]:
                amount = line["count"] * Decimal(line["price_dollars"])
                self.assertEqual(amount, Decimal(line["amount_dollars"]))
            total = sum(Decimal(line["amount_dollars"]) for line in receipt["lines"])
            self.assertEqual({total}, {Decimal(receipt["total_dollars"]), Decimal(shown["cost_dollars"])})
            usage = {"input": shown["usage"]["input_tokens"], "output": shown["usage"]["output_tokens"]}
            self.assertEqual(usage, {line["what"]: line["count"] for line in receipt["lines"]})
            self.until(lambda: self.admin("health")["ledger"]["undelivered"] == 0)
            self.assertEqual(shown, self.admin(f"requests/{request_id}"))

    def test_restart(self) -> None:
        """A receipt is the same after a restart with other prices."""
        request_id = self.ask("bob")
        shown = self.admin(f"requests/{request_id}")
        self.assertEqual("0.000012", shown["receipt"]["total_dollars"])
        self.gateway.stop()
        self.start(CONFIGURATION.replace("input = 1\n", "input = 7\n"))
        self.assertEqual(shown, self.admin(f"requests/{request_id}"))
        self.assertNotEqual("0.000012", self.admin(f"requests/{self.ask('bob')}")["cost_dollars"])


class SumsTests(AdminReadsTestCase):
    """What was used, in sums."""

    def test_by_key_model_and_day(self) -> None:
        """Sums are exact by whatever they are asked by."""
        for number in range(4):
            self.ask("ann", "echo", f"{WORDS} {number}")
        self.ask("bob", "dear")
        self.listed(5)
        today = time.strftime("%Y-%m-%d", time.gmtime())
        shown = self.admin("usage?by=principal,model,day")
        found = {
            (total["principal"], total["model"]): (total["requests"], total["cost_dollars"], total["day"])
            for total in shown["totals"]
        }
        self.assertEqual(
            {
                ("ann", "echo"): (4, "0.00006", today),
                ("bob", "dear"): (1, "0.012002", today),
            },
            found,
        )
        [total] = self.admin("usage")["totals"]
        self.assertEqual((5, "0.012062"), (total["requests"], total["cost_dollars"]))
        self.assertEqual([], self.admin("usage?until=2020-01-01")["totals"])

    def test_own(self) -> None:
        """Each of two keys sees its own sums and its own budget, and nothing of the other."""
        self.ask("ann")
        self.ask("bob", "dear")
        self.listed(2)
        _, ann, _ = self.call("GET", "/v1/usage?by=model", "sk-ct-ann")
        _, bob, _ = self.call("GET", "/v1/usage?by=day", "sk-ct-bob")
        self.assertEqual([("echo", "0.000012")], [(t["model"], t["cost_dollars"]) for t in ann["totals"]])
        self.assertEqual(
            ("0.01", "0.000012", "0.009988"),
            tuple(ann["budget"][f"{name}_dollars"] for name in ("budget", "spent", "left")),
        )
        self.assertEqual([("bob", "0.012002")], [(t["principal"], t["cost_dollars"]) for t in bob["totals"]])
        self.assertIsNone(bob["budget"])
        self.assertEqual([ann["budget"]], self.admin("budgets")["budgets"])
        self.assertEqual(400, self.call("GET", "/v1/usage?principal=bob", "sk-ct-ann")[0])
        self.assertEqual(401, self.call("GET", "/v1/admin/usage", "sk-ct-ann")[0])


class FollowTests(AdminReadsTestCase):
    """The live tail."""

    def follow(self, query: str = "") -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Begin to follow; returns when the gateway has begun to tell."""
        wire = http.client.HTTPConnection(self.gateway.host, self.gateway.port, timeout=WAIT_SECONDS)
        self.addCleanup(wire.close)
        wire.request("GET", f"/v1/admin/requests/follow{query}", headers={"x-api-key": TOKEN})
        answer = wire.getresponse()
        self.assertEqual((200, "text/event-stream"), (answer.status, answer.getheader("content-type")))
        self.assertEqual(b": following\n", answer.readline())
        return wire, answer

    def events(self, answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
        """Yield the events as they come, ("", comment) for comments."""
        name = ""
        for line in answer:
            word, _, rest = line.decode().rstrip("\n").partition(": ")
            if word == "event":
                name = rest
            elif word == "data":
                yield name, json.loads(rest)
            elif rest:
                yield "", rest

    def test_live(self) -> None:
        """Requests come as they end, plain and streamed, as the list has them; then there are comments."""
        _, answer = self.follow()
        _, only_bob = self.follow("?principal=bob")
        ids = [
            self.ask(("ann", "bob")[number % 2], words=f"w {number}", stream=number > 2)
            for number in range(6)
        ]
        events = self.events(answer)
        told = [next(event[1] for event in events if event[0]) for _ in ids]
        self.assertEqual(ids, [each["id"] for each in told])
        of_bob = (event["id"] for name, event in self.events(only_bob) if name)
        bobs = list(islice(of_bob, 3))
        self.assertEqual(ids[1::2], bobs)
        self.assertEqual(told, self.listed(6)[::-1])
        self.assertEqual(("", "still here"), next(events))

    def test_stop(self) -> None:
        """A gateway that is stopped does not wait for those who follow: they are told."""
        _, answer = self.follow()
        began = time.monotonic()
        self.gateway.stop()
        self.assertLess(time.monotonic() - began, 10)
        *_, (name, said) = self.events(answer)
        self.assertEqual(("end", "stopping"), (name, said["reason"]))


class StateTests(AdminReadsTestCase):
    """The gateway itself."""

    def test_cache(self) -> None:
        """A cleared cache has to ask again."""
        for expected in ("miss", "hit"):
            body = {"model": "echo", "max_tokens": 5, "messages": [{"role": "user", "content": "again"}]}
            _, _, fields = self.call("POST", "/v1/messages", "sk-ct-ann", body)
            self.assertEqual(expected, fields["x-crabtwist-cache"])
        self.assertEqual({"cleared": 1}, self.admin("cache/clear", "POST"))
        _, _, fields = self.call("POST", "/v1/messages", "sk-ct-ann", body)
        self.assertEqual("miss", fields["x-crabtwist-cache"])

    def test_no_secret(self) -> None:
        """No secret is in anything that is shown, nor in the log."""
        self.ask()
        shown = [
            self.admin(path)
            for path in (
                "config",
                "models",
                "plugins",
                "health",
                "keys",
                "providers",
                "budgets",
                "usage",
                "requests",
            )
        ]
        self.gateway.stop()
        for secret in SECRETS:
            for each in [*map(json.dumps, shown), self.gateway.log]:
                self.assertNotIn(secret, each)
        self.assertEqual("********", shown[0]["providers"]["openai"]["api_key"])

    def test_health(self) -> None:
        """It says where it listens, and that its store answers."""
        shown = self.admin("health")
        self.assertEqual(([self.gateway.url], 1), (shown["listening"], shown["nodes"]))
        self.assertEqual({"kind": "sqlite", "answers": True}, shown["storage"])
        self.assertGreater(shown["uptime_seconds"], 0)

    def test_plugins(self) -> None:
        """Plugins say where they are from."""
        [echo] = [each for each in self.admin("plugins")["providers"] if each["name"] == "echo"]
        self.assertEqual("twisted.plugins.crabtwist_dropin", echo["module"])


def shape(document: Any) -> Any:
    """Return a document without its values: the names of its members, in their order, however deep."""
    if isinstance(document, dict):
        return [(name, shape(each)) for name, each in document.items()]
    return [shape(each) for each in document[:1]] if isinstance(document, list) else None


class PageTests(AdminReadsTestCase):
    """What the pages say to type."""

    def setUp(self) -> None:
        """Make a request, to look at."""
        super().setUp()
        self.request_id = self.ask()
        self.listed(1)

    def typed(self, command: str) -> list[str]:
        """Return a command of a page as it has to be typed here."""
        here = command.replace("http://127.0.0.1:5632", self.gateway.url)
        return ["sh", "-c", re.sub(r"req_ct_\w+", self.request_id, here)]

    def printed(self, command: str) -> Any:
        """Return what a command prints."""
        done = subprocess.run(self.typed(command), env=ENVIRON, capture_output=True, check=True)
        return json.loads(done.stdout)

    def test_records(self) -> None:
        """The commands work, and answer with the members that the page shows."""
        page = (CHECKOUT / "docs" / "records.md").read_text()
        commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        listed, one, totals = [self.printed(each) for each in commands if "follow" not in each]
        examples = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
        shown = [listed, one["receipt"], totals]
        self.assertEqual(list(map(shape, examples)), list(map(shape, shown)))

    def test_follow(self) -> None:
        """So does the one that follows."""
        page = (CHECKOUT / "docs" / "records.md").read_text()
        [command] = re.findall(r"```sh\n([^`]*follow[^`]*)```", page)
        with subprocess.Popen(self.typed(command), env=ENVIRON, stdout=subprocess.PIPE) as following:
            self.addCleanup(following.kill)
            assert following.stdout is not None
            self.assertEqual(b": following\n", following.stdout.readline())
            request_id = self.ask(words="while somebody looks")
            told = next(line for line in following.stdout if line.startswith(b"data: "))
            self.assertEqual(request_id, json.loads(told.removeprefix(b"data: "))["id"])
            following.kill()

    def test_own_usage(self) -> None:
        """So does that for keys."""
        page = (CHECKOUT / "docs" / "usage.md").read_text()
        [command] = re.findall(r"```console\n\$ (.*?)```", page, re.DOTALL)
        shown = self.printed(command)
        self.assertEqual(("ann", 1), (shown["principal"], shown["totals"][0]["requests"]))
