"""The command line, against a server of the test's own that speaks as the admin API does."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.cli.client import Client
from crabtwist.cli.environment import SHELLS, claude_code
from crabtwist.cli.faults import Fault, Misused, NotAllowed
from crabtwist.cli.folder_checks import STORE_SECONDS, look_at_folder, look_at_stores
from crabtwist.cli.gateway_checks import look_at_gateway
from crabtwist.cli.keys import budget_text, limits_text
from crabtwist.cli.place import LocalFile, Place, checked_url, find_place, listening_url
from crabtwist.cli.plugin_checks import look_at_plugins
from crabtwist.cli.root import main
from crabtwist.cli.shown import plain, when
from crabtwist.cli.words import joined, nulls, span_seconds, value_of
from crabtwist.config import load
from crabtwist.discovery import discover
from crabtwist.seal import Seal
from crabtwist.settings import Secret
from tests.fake_admin import TOKEN, FakeAdmin, event, refusal
from tests.test_discovery import ACME
from tests.test_discovery import Scratch as _Scratch

CHECKOUT = Path(__file__).parents[1]
SECRET = "sk-ct-" + "5" * 64
KEY = {
    "name": "alice",
    "source": "api",
    "models": ["*"],
    "expires_at": "2027-01-31T18:00:00Z",
    "disabled": False,
    "limits": {"requests_per_minute": 10, "concurrent_requests": None},
    "budget": {"dollars": 1.0, "per": "month", "time_zone": None},
    "metadata": {"team": "a"},
    "created_at": "2026-11-23T17:00:00.25Z",
    "secrets": [{"hint": "5555", "until": None}, {"hint": "4444", "until": "2026-11-24T17:00:00Z"}],
}
REQUEST = {
    "id": "req_ct_1",
    "accepted_at": "2026-11-23T17:00:00.000000Z",
    "ended_at": "2026-11-23T17:00:01.250000Z",
    "principal": "alice",
    "operation": "messages",
    "model_asked": "fast",
    "model": "echo",
    "model_answered": "echo",
    "provider": "echo",
    "status": 200,
    "reason": "complete",
    "message": None,
    "usage": {"input_tokens": 5, "cache_read_tokens": 2, "output_tokens": 3, "reasoning_tokens": 1},
    "cost_dollars": "0.0000125",
    "cache_hit": False,
    "bytes_in": 10,
    "bytes_out": 20,
    "estimated": False,
    "attempts": [
        {"provider": "echo", "model": "echo", "status": 200, "error": None, "duration_seconds": 0.5}
    ],
}
LINE = {
    "model": "echo",
    "what": "input",
    "count": 5,
    "price_dollars": "0.0000025",
    "amount_dollars": "0.0000125",
}
CONFIGURATION = """
admin_token = "ct-admin-of-the-tests"
secret_key = "0123456789012345678901234567890123456789"
[[keys]]
name = "first"
key = "sk-ct-first"
[providers.echo]
kind = "echo"
models = ["echo"]
"""


def local_file(case: SynchronousTestCase, text: str, environ: dict[str, str] | None = None) -> LocalFile:
    """Return a configuration file that somebody named."""
    path = Path(case.mktemp())
    path.write_text(text)
    return LocalFile(str(path), environ or {})


class PlaceTests(SynchronousTestCase):
    """Where the gateway is, and what opens it."""

    def nowhere(self) -> LocalFile:
        """Return a file that is not there."""
        file = LocalFile(None, {})
        file.path = Path(self.mktemp())
        return file

    def test_order(self) -> None:
        """An option comes before the environment, and that before the file."""
        file = local_file(self, 'listen = "127.0.0.1:1"\nadmin_token = "of-the-file"')
        environ = {"CRABTWIST_URL": "http://b:2", "CRABTWIST_ADMIN_TOKEN": "of-the-environment"}
        found = [
            find_place("http://a:3/", "given", file, environ),
            find_place(None, None, file, environ),
            find_place(None, None, file, {}),
        ]
        self.assertEqual(["http://a:3", "http://b:2", "http://127.0.0.1:1"], [each.url for each in found])
        self.assertEqual(["given", "of-the-environment", "of-the-file"], [each.token for each in found])
        self.assertEqual("--token", found[0].token_from)

    def test_nothing_said(self) -> None:
        """Without anything it is the usual address, and no token, which is told when one is needed."""
        place = find_place(None, None, self.nowhere(), {})
        self.assertEqual("http://127.0.0.1:5632", place.url)
        self.assertIn(
            "CRABTWIST_ADMIN_TOKEN", str(self.assertRaises(NotAllowed, lambda: place.required_token))
        )

    def test_variables_of_the_file(self) -> None:
        """The file's `${VAR}` are replaced; one that is not set is told, other faults are not."""
        text = 'admin_token = "${T}"\nproviders = 3\nother = "${GONE}"'
        self.assertEqual("set", find_place(None, None, local_file(self, text, {"T": "set"}), {}).token)
        fault = self.assertRaises(Misused, find_place, None, None, local_file(self, text), {})
        self.assertIn("environment variable T is not set", fault.message)

    def test_file_that_cannot_be_used(self) -> None:
        """A named file that is missing or no TOML is a fault, unless nothing of it is needed."""
        for file in (local_file(self, "= ="), LocalFile(self.mktemp(), {})):
            self.assertRaises(Misused, find_place, None, None, file, {})
            self.assertEqual("t", find_place("http://a", "t", file, {}).token)

    def test_token_stays_here(self) -> None:
        """The token of a file that nobody named is not sent to another machine."""
        file = self.nowhere()
        file.path.write_text('admin_token = "held"')
        self.assertIsNone(find_place("http://elsewhere:5632", None, file, {}).token)
        self.assertEqual("held", find_place("http://127.0.0.1:99", None, file, {}).token)
        named = LocalFile(str(file.path), {})
        self.assertEqual("held", find_place("http://elsewhere:5632", None, named, {}).token)

    def test_listening(self) -> None:
        """Addresses, ports and Twisted's endpoint strings are understood."""
        for listen, url in (
            ("127.0.0.1:5632", "http://127.0.0.1:5632"),
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::]:80", "http://[::1]:80"),
            (["unix:/run/x.sock", "localhost:81"], "http://localhost:81"),
            ("tcp:8080:interface=127.0.0.1", "http://127.0.0.1:8080"),
            (r"tcp6:port=82:interface=\:\:1", "http://[::1]:82"),
            ("ssl:443:privateKey=k.pem", "https://127.0.0.1:443"),
        ):
            self.assertEqual(url, listening_url(listen, "file"))
        for wrong in ("unix:/run/x.sock", "127.0.0.1:0", 5, [5]):
            self.assertRaises(Misused, listening_url, wrong, "file")

    def test_urls(self) -> None:
        """What is no address, or has a password in it, is refused without being repeated."""
        self.assertEqual("https://a.b:1/x", checked_url("https://a.b:1/x/v1/", "--url"))
        for url in (
            "a:5",
            "ftp://a",
            "http://",
            "http://u:hidden@a",
            "http://a?q",
            "http://a:x",
            "http://a b",
        ):
            self.assertNotIn("hidden", str(self.assertRaises(Misused, checked_url, url, "--url")))

    def test_token_that_no_header_carries(self) -> None:
        """A token with a newline is refused, and not repeated."""
        fault = self.assertRaises(Misused, find_place, "http://a", "hidden\n", self.nowhere(), {})
        self.assertNotIn("hidden", fault.message)


class WordsTests(SynchronousTestCase):
    """Words that mean something."""

    def test_spans(self) -> None:
        """Spans are seconds, minutes, hours, days or weeks."""
        texts = ["45s", "1.5m", "12h", "30d", "1w", "30", "d", "-1d"]
        expected = [45, 90, 43200, 2592000, 604800, None, None, None]
        self.assertEqual(expected, [span_seconds(text) for text in texts])

    def test_values(self) -> None:
        """A setting's value is JSON where it can be, and a text else."""
        texts = ["2", "true", '["a"]', "a b", "null", "1.5"]
        self.assertEqual([2, True, ["a"], "a b", "null", 1.5], [value_of(text) for text in texts])

    def test_patches(self) -> None:
        """What is removed and what is set make one patch."""
        removed = nulls(("limits.requests_per_minute", "budget", "metadata.a", "budget.per"))
        self.assertEqual(
            {"limits": {"requests_per_minute": None}, "budget": None, "metadata": {"a": None}}, removed
        )
        self.assertEqual(
            {"a": {"b": None, "c": 1}, "d": 2}, joined({"a": {"b": None}}, {"a": {"c": 1}, "d": 2})
        )

    def test_terms_in_short(self) -> None:
        """Limits and budgets are told in a few words."""
        self.assertEqual(
            "10 requests/min, 2 at once", limits_text({"requests_per_minute": 10, "concurrent_requests": 2})
        )
        self.assertEqual("$1/month", budget_text({"dollars": 1.0, "per": "month"}))
        self.assertEqual("$0.5 (Europe/Berlin)", budget_text({"dollars": 0.5, "time_zone": "Europe/Berlin"}))

    def test_edges_of_time(self) -> None:
        """A moment whose day in UTC does not exist is shown as it is written."""
        self.assertEqual("2026-11-30 17:00:00Z", when("2026-11-30T18:00:00+01:00"))
        self.assertEqual("0001-01-01T00:00:00+14:00", when("0001-01-01T00:00:00+14:00"))

    def test_nothing_steers_the_terminal(self) -> None:
        """Escapes, newlines and marks that turn text around are shown for what they are."""
        self.assertEqual("a\\x1b[31m\\n\\u202eb ü", plain("a\x1b[31m\n\u202eb ü"))


class CommandTestCase(SynchronousTestCase):
    """Runs commands against a fake."""

    def setUp(self) -> None:
        """Start the fake."""
        self.fake = FakeAdmin()
        self.addCleanup(self.fake.close)

    def run_command(self, *words: str, token: str = TOKEN, **environ: str) -> Result:
        """Run the command; no token may be in what it prints."""
        variables = {"CRABTWIST_URL": self.fake.url, "CRABTWIST_ADMIN_TOKEN": token, **environ}
        for name in ("ANTHROPIC_API_KEY", "CRABTWIST_KEY"):
            variables.setdefault(name, "")
        result = CliRunner().invoke(main, list(words), prog_name="crabtwist", env=variables)
        self.assertNotIn(TOKEN, result.output)
        return result

    def said(self, *words: str, **environ: str) -> str:
        """Return what a command prints that goes well."""
        result = self.run_command(*words, **environ)
        self.assertEqual(0, result.exit_code, result.output)
        return result.stdout

    def answer(self, where: str, content: Any, status: int = 200) -> None:
        """Let the fake say this below /v1/admin/."""
        method, path = where.split()
        self.fake.answers[f"{method} /v1/admin/{path}"] = status, content


class KeysTests(CommandTestCase):
    """`crabtwist keys`."""

    def test_create(self) -> None:
        """The options become the terms, and the secret is shown once with lines for clients."""
        self.answer("POST keys", {**KEY, "secret": SECRET}, 201)
        words = "keys create alice -m echo --requests-per-minute 10 --dollars 0.50 --per month --disabled"
        said = self.said(*words.split(), "--metadata", "team=a=b", "--expires", "2027-01-31")
        asked = self.fake.asked[0]
        self.assertEqual(
            {
                "name": "alice",
                "models": ["echo"],
                "limits": {"requests_per_minute": 10},
                "budget": {"dollars": 0.5, "per": "month"},
                "disabled": True,
                "metadata": {"team": "a=b"},
                "expires_at": "2027-01-31T00:00:00Z",
            },
            asked.body,
        )
        self.assertIn(f"export ANTHROPIC_BASE_URL={self.fake.url}\n", said)
        self.assertIn(f"export ANTHROPIC_AUTH_TOKEN={SECRET}\n", said)
        self.assertIn(f"export OPENAI_BASE_URL={self.fake.url}/v1\n", said)

    def test_model_for_claude_code(self) -> None:
        """Where nothing is served that Claude Code asks for by itself, it is told what to ask for."""
        self.answer("POST keys", {**KEY, "secret": SECRET}, 201)
        for served, line in (("echo", "claude --model echo\n"), ("claude-opus-5-5", "claude\n")):
            self.answer("GET models", {"models": [{"name": served}]})
            self.assertIn(f"  {line}", self.said("keys", "create", "alice"))

    def test_create_without_terms(self) -> None:
        """What is not said is not sent, so that the gateway's own defaults hold."""
        self.answer("POST keys", {**KEY, "secret": SECRET}, 201)
        self.said("keys", "create", "alice")
        self.assertEqual({"name": "alice"}, self.fake.asked[0].body)

    def test_expires_in(self) -> None:
        """A span counts from now."""
        self.answer("POST keys", {**KEY, "secret": SECRET}, 201)
        self.said("keys", "create", "alice", "--expires", "30d")
        at = datetime.fromisoformat(self.fake.asked[0].body["expires_at"])
        self.assertLess(abs(at - datetime.now(UTC) - timedelta(days=30)), timedelta(minutes=1))

    def test_list(self) -> None:
        """The list is a table that says it in short, without a secret."""
        self.answer("GET keys", {"keys": [KEY]})
        head, row = self.said("keys", "list").splitlines()
        self.assertEqual(
            ["NAME", "SOURCE", "MODELS", "LIMITS", "BUDGET", "EXPIRES", "STATE", "SECRET"], head.split()
        )
        self.assertEqual(
            "alice  api     all     10 requests/min  $1/month  2027-01-31 18:00:00Z  enabled"
            "  ...5555, ...4444",
            row,
        )

    def test_get(self) -> None:
        """One key is shown in full."""
        self.answer("GET keys/al%2Fice", KEY)
        said = self.said("keys", "get", "al/ice")
        self.assertIn("metadata  team=a\n", said)
        self.assertIn("secrets   ...5555, ...4444 until 2026-11-24 17:00:00Z\n", said)

    def test_update(self) -> None:
        """What is said and what is to be removed go into one merge patch."""
        self.answer("PATCH keys/alice", KEY)
        words = (
            "keys update alice --dollars 2 --enabled --remove limits.requests_per_minute --remove expires_at"
        )
        self.said(*words.split())
        expected = {"budget": {"dollars": 2}, "disabled": False, "expires_at": None}
        self.assertEqual({**expected, "limits": {"requests_per_minute": None}}, self.fake.asked[-1].body)
        self.assertEqual(2, self.run_command("keys", "update", "alice").exit_code)

    def test_rotate(self) -> None:
        """The new secret is shown, and until when the old one goes on."""
        self.answer("POST keys/alice/rotate", {**KEY, "secret": SECRET})
        said = self.said("keys", "rotate", "alice", "--overlap", "1h")
        self.assertEqual({"overlap_seconds": 3600}, self.fake.asked[0].body)
        self.assertIn("goes on until 2026-11-24 17:00:00Z", said)
        self.assertIn(SECRET, said)

    def test_delete(self) -> None:
        """A key is deleted without a question where nobody sits at a terminal."""
        self.answer("DELETE keys/alice", None, 204)
        self.assertEqual("The key alice was deleted.\n", self.said("keys", "delete", "alice"))
        self.assertEqual({"deleted": "alice"}, json.loads(self.said("keys", "delete", "alice", "--json")))


class ProvidersTests(CommandTestCase):
    """`crabtwist providers`."""

    def test_create(self) -> None:
        """Settings come from the line and from the environment, models with their names there."""
        shown = {
            "name": "second",
            "source": "api",
            "kind": "openai",
            "settings": {"models": [], "api_key": "********"},
        }
        self.answer("POST providers", shown, 201)
        settings = ["-m", "a", "-m", "b=c", "--set", "weight=2", "--set-from", "api_key=HIDDEN", "--probe"]
        words = ["providers", "create", "second", "--kind", "openai", *settings]
        said = self.said(*words, HIDDEN="sk-hidden")
        asked = self.fake.asked[-1]
        self.assertEqual("/v1/admin/providers?probe=true", asked.target)
        expected = {"name": "second", "kind": "openai", "weight": 2, "api_key": "sk-hidden"}
        self.assertEqual({**expected, "models": ["a", {"name": "b", "upstream": "c"}]}, asked.body)
        self.assertNotIn("sk-hidden", said)
        self.assertEqual(2, self.run_command(*words, HIDDEN="").exit_code)

    def test_list(self) -> None:
        """Each provider is a row with its models."""
        settings = {"models": [{"name": "a", "upstream": "a"}, {"name": "b", "upstream": "c"}]}
        self.answer(
            "GET providers",
            {"providers": [{"name": "p", "source": "file", "kind": "echo", "settings": settings}]},
        )
        self.assertEqual("p     file    echo  a, b (c)", self.said("providers", "list").splitlines()[1])

    def test_update_models_delete(self) -> None:
        """The other commands ask what they should."""
        self.answer("PATCH providers/p", {"name": "p", "source": "api", "kind": "echo", "settings": {}})
        self.answer("GET providers/p/models", {"models": ["x", "y"]})
        self.answer("DELETE providers/p", None, 204)
        self.said(*["providers", "update", "p", "--set", "weight=0", "--remove", "base_url"])
        self.assertEqual({"weight": 0, "base_url": None}, self.fake.asked[-1].body)
        self.assertEqual("x\ny\n", self.said("providers", "models", "p"))
        self.said("providers", "delete", "p", "--yes")
        self.assertEqual("DELETE", self.fake.asked[-1].method)


class ShownTests(CommandTestCase):
    """Usage, budgets, logs, models, plugins, the cache."""

    def test_usage(self) -> None:
        """Totals are asked for by what the API calls it, and shown exact."""
        total = {"principal": "", "day": "2026-11-23", "requests": 2, "unpriced": 1, "input_tokens": 5}
        more = {
            "cache_read_tokens": 7,
            "output_tokens": 3,
            "reasoning_tokens": 1,
            "cost_dollars": "0.000000000001",
        }
        self.answer("GET usage", {"by": ["principal", "day"], "totals": [{**total, **more}]})
        said = self.said("usage", "--by", "key,day", "--since", "2026-11-01")
        self.assertEqual("/v1/admin/usage?by=principal%2Cday&since=2026-11-01", self.fake.asked[-1].target)
        row = ["(none)", "2026-11-23", "2", "5", "7", "4", "$0.000000000001", "1"]
        self.assertEqual(row, said.splitlines()[1].split())
        self.assertEqual(2, self.run_command("usage", "--by", "color").exit_code)

    def test_budget(self) -> None:
        """Budgets are shown, of all or of one."""
        state = {"principal": "alice", "per": "total", "label": "", "ends_at": None}
        amounts = {f"{name}_dollars": "1.00" for name in ("budget", "spent", "reserved", "left")}
        self.answer("GET budgets", {"budgets": [{**state, **amounts}]})
        for words in (["budget"], ["budget", "alice"]):
            row = self.said(*words).splitlines()[1].split()
            self.assertEqual(["alice", "total", *["$1.00"] * 4, "never"], row)
        self.assertEqual(1, self.run_command("budget", "bob").exit_code)

    def test_logs(self) -> None:
        """A request is a row with all that one looks for; filters go along."""
        self.answer("GET requests", {"requests": [REQUEST], "next": None})
        filters = "--key alice --model echo --since 2026-11-23T18:00:00+01:00 -n 5"
        said = self.said("logs", *filters.split())
        target = "requests?principal=alice&model=echo&since=2026-11-23T17%3A00%3A00Z&limit=5"
        self.assertEqual(f"/v1/admin/{target}", self.fake.asked[-1].target)
        row = "2026-11-23 17:00:00Z alice echo echo 200 7+4 $0.0000125 1.250 req_ct_1"
        self.assertEqual(row, " ".join(said.splitlines()[1].split()))

    def test_logs_in_pages(self) -> None:
        """More than a page holds is asked for page by page."""
        self.answer("GET requests", {"requests": [REQUEST] * 1000, "next": "cursor"})
        found = json.loads(self.said("logs", "--limit", "2500", "--json"))["requests"]
        self.assertEqual(3000, len(found))
        targets = [asked.target.partition("?")[2] for asked in self.fake.asked]
        self.assertEqual(["limit=1000", "before=cursor&limit=1000", "before=cursor&limit=500"], targets)

    def test_nothing_is_cut(self) -> None:
        """Piped, a row is one line, however long, and what a client made up cannot steer a terminal."""
        long = "m" * 500
        request = {**REQUEST, "model": long, "reason": "\x1b[2J"}
        self.answer("GET requests", {"requests": [request], "next": None})
        said = self.said("logs")
        self.assertIn(long, said)
        self.assertIn("\\x1b[2J", said)
        self.assertEqual(2, len(said.splitlines()))

    def test_receipt(self) -> None:
        """One request is shown with its attempts and the arithmetic of its cost."""
        receipt = {"lines": [LINE], "unpriced": ["web_search"], "total_dollars": "0.0000125"}
        self.answer("GET requests/req_ct_1", {**REQUEST, "receipt": receipt})
        for words in (["logs", "req_ct_1"], ["logs", "get", "req_ct_1"]):
            said = self.said(*words)
            self.assertIn("echo (asked as fast)", said)
            self.assertIn("$0.0000025  $0.0000125\n", said)
            self.assertTrue(
                said.endswith("Total: $0.0000125\nNot in it, for nobody knows the price: web_search\n")
            )

    def test_receipt_misused(self) -> None:
        """An id takes no filters, and there is one of them."""
        for words in ("logs a --follow", "logs get", "logs a b", "logs a --key k"):
            self.assertEqual(2, self.run_command(*words.split()).exit_code, words)

    def test_models_plugins_cache(self) -> None:
        """What is served, what was found and what was forgotten are told."""
        served = {"provider": "p", "upstream_model": "there", "weight": 1, "cooling_until": None}
        self.answer(
            "GET models", {"models": [{"name": "m", "deployments": [served]}], "aliases": {"fast": "m"}}
        )
        self.assertIn("fast   m\n", self.said("models"))
        plugin = {"name": "echo", "module": "twisted.plugins.x", "path": "a:B"}
        self.answer("GET plugins", {"providers": [plugin], "failed": {"twisted.plugins.y": "SyntaxError"}})
        said = self.said("plugins")
        self.assertIn("provider  echo  twisted.plugins.x  a:B\n", said)
        self.assertIn("twisted.plugins.y    SyntaxError\n", said)
        self.answer("POST cache/clear", {"cleared": 3})
        self.assertEqual("3 answers were forgotten.\n", self.said("cache", "clear"))

    def test_json(self) -> None:
        """`--json` prints the answer as it is, wherever it stands."""
        self.answer("GET keys", {"keys": [KEY]})
        for words in ("--json keys list", "keys --json list", "keys list --json"):
            self.assertEqual({"keys": [KEY]}, json.loads(self.said(*words.split())))


class FollowTests(CommandTestCase):
    """`crabtwist logs --follow`."""

    def follow(self, *events: bytes) -> None:
        """Let the fake send these events, and end."""
        self.answer("GET requests/follow", b": following\n\n" + b"".join(events))

    def test_follow(self) -> None:
        """Each request is a line below the heads; the end of the stream is told, with a status."""
        self.follow(event("request", REQUEST), event("end", {"reason": "too_slow", "message": "cut off"}))
        result = self.run_command("logs", "-f", "--key", "alice")
        self.assertEqual("/v1/admin/requests/follow?principal=alice", self.fake.asked[-1].target)
        head, line = result.stdout.splitlines()
        self.assertEqual("TIME KEY MODEL PROVIDER STATUS TOKENS COST SECONDS", " ".join(head.split()))
        self.assertEqual(line.index("echo"), head.index("MODEL"))
        self.assertTrue(line.endswith("req_ct_1"))
        self.assertEqual(3, result.exit_code)
        self.assertTrue(result.stderr.endswith("crabtwist: cut off\n"))

    def test_json(self) -> None:
        """As JSON there is one object in each line, and nothing else."""
        self.follow(event("request", REQUEST), event("request", REQUEST))
        result = self.run_command("logs", "--follow", "--json")
        self.assertEqual([REQUEST, REQUEST], [json.loads(line) for line in result.stdout.splitlines()])
        self.assertEqual("stream_ended", json.loads(result.stderr)["error"]["slug"])


class FaultsTests(CommandTestCase):
    """What goes wrong, in words and in a status."""

    def fails(self, *words: str, status: int, token: str = TOKEN, **environ: str) -> str:
        """Run what fails, in words and as JSON; return the words."""
        result = self.run_command(*words, token=token, **environ)
        self.assertEqual((status, ""), (result.exit_code, result.stdout))
        as_json = self.run_command(*words, "--json", token=token, **environ)
        error = json.loads(as_json.stderr)["error"]
        self.assertEqual((status, status, ""), (as_json.exit_code, error["exit_code"], as_json.stdout))
        return result.stderr

    def test_refused(self) -> None:
        """The gateway's own words are passed on."""
        self.answer("GET keys/bob", refusal("key_not_found", "there is no key 'bob'"), 404)
        self.assertEqual("crabtwist: there is no key 'bob'\n", self.fails("keys", "get", "bob", status=1))

    def test_wrong_token(self) -> None:
        """A wrong token is told by where it is from."""
        self.assertIn("from CRABTWIST_ADMIN_TOKEN", self.fails("keys", "list", status=4, token="wrong"))

    def test_no_token(self) -> None:
        """Without a token nothing is asked."""
        self.fails("keys", "list", "--config", os.devnull, status=4, token="")
        self.assertEqual([], self.fake.asked)

    def test_unreachable(self) -> None:
        """Where nobody answers, it says where that is and what to do."""
        self.fake.close()
        words = self.fails("keys", "list", status=3)
        self.assertIn(self.fake.url, words)
        self.assertIn("twistd -n crabtwist", words)

    def test_no_gateway(self) -> None:
        """Somebody else at that address is not taken for a gateway."""
        for said in (b"<html>", {"error": "no"}, b"[" * 100_000):
            self.fake.answers["GET /v1/admin/keys"] = 500, said
            self.assertIn("is no crabtwist", self.fails("keys", "list", status=3))

    def test_no_admin_api(self) -> None:
        """A gateway without an admin API is told as that."""
        self.assertIn("`admin_token`", self.fails("models", status=1))

    def test_not_understood(self) -> None:
        """An answer of another shape is a fault, and no traceback."""
        self.answer("GET keys", {"secrets": []})
        result = self.run_command("keys", "list")
        self.assertEqual((1, ""), (result.exit_code, result.stdout))
        self.assertIn("of another version", result.stderr)

    def test_usage(self) -> None:
        """What was not put together rightly is status 2."""
        for words in (
            "keys create",
            "keys create a --dollars nan",
            "keys create a --expires soon",
            "nonsense",
        ):
            self.fails(*words.split(), status=2)
        self.fails("keys", "list", "--url", "nonsense", status=2)


class EnvironmentTests(CommandTestCase):
    """`crabtwist env`."""

    def test_new_key(self) -> None:
        """A key is made, and its secret is in the lines."""
        self.answer("POST keys", {**KEY, "secret": SECRET}, 201)
        said = self.said("env", "--claude-code", "--new-key", "laptop")
        self.assertEqual({"name": "laptop"}, self.fake.asked[-1].body)
        lines = [f"export ANTHROPIC_BASE_URL={self.fake.url}", f"export ANTHROPIC_AUTH_TOKEN={SECRET}"]
        self.assertEqual(lines, said.splitlines()[:2])

    def test_shells(self) -> None:
        """Each shell has its own words; the key may come from the environment."""
        for shell, begin in (
            ("zsh", "export OPENAI_API_KEY="),
            ("fish", "set -gx OPENAI_API_KEY "),
            ("powershell", "$env:OPENAI_API_KEY = '"),
        ):
            said = self.said("env", "--openai", "--shell", shell, CRABTWIST_KEY=SECRET)
            self.assertIn(begin + SECRET, said)
            self.assertNotIn("ANTHROPIC", said)

    def test_json(self) -> None:
        """As JSON it is an object, for both kinds of clients if none is named."""
        variables = json.loads(self.said("env", "--json", "--key", SECRET))
        self.assertEqual((SECRET, SECRET), (variables["ANTHROPIC_AUTH_TOKEN"], variables["OPENAI_API_KEY"]))

    def test_second_key(self) -> None:
        """A key of Anthropic's own is taken away, for the gateway refuses two keys that differ."""
        self.assertIsNone(claude_code("u", "s", {"ANTHROPIC_API_KEY": "sk-ant"})["ANTHROPIC_API_KEY"])
        said = self.said("env", "--claude-code", "--key", SECRET, ANTHROPIC_API_KEY="sk-ant")
        self.assertIn("\nunset ANTHROPIC_API_KEY\n", said)

    def test_which_key(self) -> None:
        """Without a key, or with two, it is not put together rightly."""
        self.assertEqual(2, self.run_command("env").exit_code)
        self.assertEqual(2, self.run_command("env", "--key", "a", "--new-key", "b").exit_code)

    @given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=20))
    def test_quoting(self, text: str) -> None:
        """Whatever a value holds, a shell takes it as one word."""
        [posix] = SHELLS["bash"].lines({"A": text})
        self.assertEqual(["export", f"A={text}"], shlex.split(posix))
        [powershell] = SHELLS["powershell"].lines({"A": text})
        self.assertEqual(text, powershell.removeprefix("$env:A = ")[1:-1].replace("''", "'"))


class StartTests(SynchronousTestCase):
    """How fast the command is there."""

    def test_help_loads_little(self) -> None:
        """The help is shown without what only the commands themselves need."""
        heavy = ("rich", "twisted", "http.client", "attrs", "crabtwist.config", "crabtwist.settings")
        script = (
            "import sys\nfrom crabtwist.cli.root import main\n"
            "try: main(['keys', '--help'])\nexcept SystemExit: pass\n"
            f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        self.assertEqual("['attrs']\n", done.stderr)

    def test_completion(self) -> None:
        """click writes the completion of bash, zsh and fish, and completes commands."""
        for shell in ("zsh", "fish"):
            result = CliRunner().invoke(
                main, prog_name="crabtwist", env={"_CRABTWIST_COMPLETE": f"{shell}_source"}
            )
            self.assertIn("_CRABTWIST_COMPLETE", result.output)
        asked = {"_CRABTWIST_COMPLETE": "zsh_complete", "COMP_WORDS": "crabtwist keys ", "COMP_CWORD": "2"}
        self.assertIn("rotate", CliRunner().invoke(main, prog_name="crabtwist", env=asked).output)


class FolderChecksTests(SynchronousTestCase):
    """What a doctor finds without a gateway."""

    def look(self, text: str | None) -> list[tuple[str, str]]:
        """Look at a configuration; return levels and words."""
        folder = Path(self.mktemp())
        folder.mkdir()
        self.path = folder / "crabtwist.toml"
        if text is not None:
            self.path.write_text(text)
            self.path.chmod(0o600)
        looked = look_at_folder(self.path, {}, discover())
        return [(finding.level, finding.what) for finding in looked.findings]

    def test_fine(self) -> None:
        """A configuration that can be served is fine."""
        self.assertEqual(["fine"], [level for level, _ in self.look(CONFIGURATION)])

    def test_absent(self) -> None:
        """Without a configuration that is what is said."""
        [(level, what)] = self.look(None)
        self.assertEqual("warning", level)
        self.assertIn("is not there", what)

    def test_complaints(self) -> None:
        """Every complaint of a configuration is a problem."""
        found = self.look(CONFIGURATION + "nonsense = 1\n[extensions.nope]\n")
        self.assertEqual(["problem", "problem"], [level for level, _ in found])

    def test_open_doors(self) -> None:
        """Missing secrets, and everybody served on every address, are worth a warning."""
        found = self.look(
            'allow_anonymous = true\nlisten = "0.0.0.0:1"\n[providers.echo]\nmodels = ["echo"]\n'
        )
        said = " ".join(what for level, what in found if level == "warning")
        for words in ("admin_token", "secret_key", "everybody who can connect"):
            self.assertIn(words, said)

    def test_everybody_here(self) -> None:
        """Everybody on this machine is nobody else."""
        for listen in ("127.0.0.1:1", "unix:/run/x", "tcp:1:interface=127.0.0.1"):
            text = CONFIGURATION.replace("[[keys]]", "[providers.more]").replace(
                'name = "first"', 'kind = "echo"'
            )
            text = text.replace('key = "sk-ct-first"', 'models = ["more"]')
            found = self.look(f'allow_anonymous = true\nlisten = "{listen}"\n{text}')
            self.assertEqual(["fine"], [level for level, _ in found], found)

    def test_everybody_can_read(self) -> None:
        """A file that others can read is worth a warning."""
        self.look(CONFIGURATION)
        self.path.chmod(0o644)
        levels = [each.level for each in look_at_folder(self.path, {}, discover()).findings]
        self.assertEqual(["fine", "warning"], levels)


class BrokenStore:
    """A store that cannot be opened, or never answers."""

    kind = "broken"
    settings = None
    mark: bytes | None = None

    def __init__(self, opening: Any) -> None:
        self.maker = self
        self._opening = opening

    def make(self, _settings: object, _services: object) -> Any:
        """Return it."""
        return self

    def open(self) -> Any:
        """Fail, or wait for ever."""
        return self._opening()

    def get(self, _namespace: str, _key: bytes) -> Any:
        """Return the mark of a `secret_key`, which is all that is asked for."""
        return succeed(self.mark)

    def close(self) -> Any:
        """Close."""
        return succeed(None)


class StoreChecksTests(SynchronousTestCase):
    """Stores that a doctor opens."""

    def look(self, store: Any) -> Any:
        """Begin to look at a store in the place of the storage; there is no ledger."""
        path = Path(self.mktemp())
        path.write_text(CONFIGURATION + '[ledger]\nkind = "none"\n')
        config = load(path, {}, discover())
        object.__setattr__(config, "storage", store or config.storage)
        self.clock = Clock()
        return Deferred.fromCoroutine(look_at_stores(path.parent, config, self.clock))

    def test_opened(self) -> None:
        """A store that can be opened is fine."""
        [finding] = self.successResultOf(self.look(BrokenStore(lambda: succeed(None))))
        self.assertEqual(("fine", "the storage (broken) can be opened"), (finding.level, finding.what))

    def test_not_there_yet(self) -> None:
        """A file that is not there yet is not made."""
        [finding] = self.successResultOf(self.look(None))
        self.assertIn("not there yet", finding.what)
        self.assertFalse(Path("crabtwist.db").exists())

    def test_other_secret_key(self) -> None:
        """A store that was written with another `secret_key` keeps the gateway from starting."""
        for secret_key, level in (("0123456789" * 4, "fine"), ("t" * 40, "problem")):
            store = BrokenStore(lambda: succeed(None))
            store.mark = Seal(Secret(secret_key)).mark
            [finding] = self.successResultOf(self.look(store))
            self.assertEqual(level, finding.level, finding.what)

    def test_failing(self) -> None:
        """Why a store cannot be opened is told."""
        [finding] = self.successResultOf(self.look(BrokenStore(lambda: 1 / 0)))
        self.assertEqual("the storage (broken) cannot be opened: division by zero", finding.what)

    def test_hanging(self) -> None:
        """A store that does not answer is not waited for long."""
        looking = self.look(BrokenStore(Deferred))
        self.assertNoResult(looking)
        self.clock.advance(STORE_SECONDS)
        self.assertEqual("problem", self.successResultOf(looking)[0].level)


class PluginChecksTests(_Scratch):
    """What a doctor finds among drop-ins."""

    def look(self) -> list[str]:
        """Look at the drop-ins; return what is said."""
        return [f"{finding.level}: {finding.what}" for finding in look_at_plugins()[0]]

    def test_fine(self) -> None:
        """Drop-ins that can be loaded are fine, and their makers returned."""
        self.drop_in("scratch_a", ACME)
        self.assertEqual(["fine: plugins: all can be loaded, and the cache is up to date"], self.look())
        self.assertIn("acme", look_at_plugins()[1].providers)

    def test_stale(self) -> None:
        """A drop-in whose file is older than the cache and has other plugins is told, with the remedy."""
        self.drop_in("scratch_a", ACME)
        self.look()
        self.drop_in("scratch_a", ACME + 'zebra = ProviderMaker("zebra", "acme:Acme")\n')
        os.utime(self.directory / "scratch_a.py", (1e9, 1e9))
        [finding] = look_at_plugins()[0]
        cache = self.directory / "dropin.cache"
        self.assertEqual(f"{cache} is behind scratch_a.py: zebra", finding.what)
        self.assertEqual(f"rm {cache}", finding.do)

    def test_broken(self) -> None:
        """A drop-in that cannot be loaded is told with why."""
        self.drop_in("scratch_a", "broken = 1 / 0")
        expected = "problem: the drop-in twisted.plugins.scratch_a cannot be loaded: ZeroDivisionError"
        [said] = self.look()
        self.assertTrue(said.startswith(expected), said)
        self.flushLoggedErrors(ZeroDivisionError)

    def test_twice(self) -> None:
        """Two makers with one word are a problem."""
        self.drop_in("scratch_a", ACME)
        self.drop_in("scratch_b", ACME)
        [said] = self.look()
        self.assertIn('are called "acme"', said)


class GatewayChecksTests(CommandTestCase):
    """What a doctor finds where a gateway runs."""

    def setUp(self) -> None:
        """Let all be fine."""
        super().setUp()
        self.health = {
            "storage": {"kind": "sqlite", "answers": True},
            "ledger": {"kind": "sqlite", "undelivered": 0, "dropped": 0},
        }
        self.answer("GET health", self.health)
        self.answer("GET providers", {"providers": [{"name": "p"}]})
        self.answer("GET providers/p/models", {"models": ["m"]})
        self.deployment = {"provider": "p", "cooling_until": None}
        self.answer(
            "GET models", {"models": [{"name": "m", "deployments": [self.deployment]}], "aliases": {}}
        )

    def look(self, *, hours: float = 0, token: str = TOKEN) -> list[str]:
        """Look at the fake; return what is not fine."""
        client = Client(Place(self.fake.url, "--url", token, "--token"))
        now = datetime.now(UTC) + timedelta(hours=hours)
        return [f"{each.level}: {each.what}" for each in look_at_gateway(client, now) if each.level != "fine"]

    def test_fine(self) -> None:
        """Where all is well nothing is found."""
        self.assertEqual([], self.look())

    def test_clock(self) -> None:
        """Clocks that differ are worth a warning, either way."""
        [behind], [ahead] = self.look(hours=1), self.look(hours=-1)
        self.assertRegex(behind, "clock is 3[0-9]{3} s behind")
        self.assertRegex(ahead, "clock is 3[0-9]{3} s ahead of")

    def test_not_ready(self) -> None:
        """A gateway that is not ready is a problem."""
        self.fake.answers["GET /ready"] = 503, {"status": "draining"}
        self.assertEqual(["problem: it is not ready for requests: draining"], self.look())

    def test_stores(self) -> None:
        """A store that does not answer, and records that the ledger has not, are told."""
        self.health["storage"]["answers"] = False
        self.health["ledger"]["undelivered"] = 7
        storage, ledger = self.look()
        self.assertTrue(storage.startswith("problem: its storage (sqlite) does not answer"))
        self.assertTrue(ledger.startswith("warning: 7 records"))

    def test_upstreams(self) -> None:
        """An upstream that cannot be used is a problem, one that cools down a warning."""
        self.answer("GET providers/p/models", refusal("upstream_unusable", "the key was refused"), 422)
        self.deployment["cooling_until"] = "2026-11-23T17:00:00Z"
        upstream, cooling = self.look()
        self.assertEqual("problem: the provider p: the key was refused", upstream)
        self.assertTrue(cooling.startswith("warning: m at p has failed"))

    def test_wrong_token(self) -> None:
        """Without the right token the rest is not looked at."""
        [finding] = self.look(token="wrong")
        self.assertTrue(finding.startswith("problem: it cannot be looked into"))

    def test_somebody_else(self) -> None:
        """Who answers as no gateway does is none."""
        self.fake.answers["GET /health"] = 200, [1]
        self.assertRaises(Fault, self.look)

    def test_command(self) -> None:
        """The command says what it found, what to do, and by its status whether something is wrong."""
        words = ("doctor", "--config", str(Path(self.mktemp())))
        result = self.run_command(*words)
        self.assertEqual(0, result.exit_code, result.output)
        self.assertIn("ok      it is ready for requests\n", result.stdout)
        self.fake.answers["GET /ready"] = 503, {"status": "draining"}
        result = self.run_command(*words, "--json")
        content = json.loads(result.stdout)
        self.assertEqual((1, False), (result.exit_code, content["ok"]))
        wrong = [finding for finding in content["findings"] if finding["level"] == "problem"]
        self.assertTrue(wrong[0]["why"] and wrong[0]["do"])
