"""What the documentation says is so."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist import settings, tables
from crabtwist.attempt import Patience
from crabtwist.body import MAX_JSON_DEPTH
from crabtwist.config import EMBEDDED
from crabtwist.errors import Refused
from crabtwist.extensions.audit import AdminLine, AuditSettings, BodiesLine, RequestLine, TokensLine
from crabtwist.extensions.budget import BudgetSettings
from crabtwist.extensions.cache import CacheSettings
from crabtwist.extensions.rate_limit import RateLimitSettings
from crabtwist.extensions.usage import UsageSettings
from crabtwist.extensions.usage_rows import SUMS
from crabtwist.hooks import HOOK_TIMEOUT_SECONDS
from crabtwist.http_reader import HTTPLimits
from crabtwist.interfaces import IExtension, IExtensionMaker, IProvider, IProviderMaker
from crabtwist.journal import MAX_BYTES
from crabtwist.keys import KeySettings
from crabtwist.ledger.postgres import PostgresLedgerSettings
from crabtwist.ledger.sqlite import SQLiteLedgerSettings
from crabtwist.pricing import ModelSettings
from crabtwist.providers.anthropic import AnthropicSettings
from crabtwist.routing import Deployment
from crabtwist.storage.postgres_lane import PostgresSettings
from crabtwist.storage.redis import RedisSettings
from crabtwist.storage.sqlite import SQLiteSettings
from crabtwist.terms import KeyBudgetSettings, LimitSettings
from crabtwist.testing import FakeServices, make_context
from crabtwist.upstream import ConnectionLimits
from crabtwist.values import Call, Outcome, Usage

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"

_FILE = re.compile(r"^`([^`]+)`[^\n]*:\n\n```(?:python|toml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| `(\w+)` \| (.+?) \|", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#:]+)\)")


def rows_of(page: str) -> list[tuple[str, str]]:
    """Return the keys that a page's tables list, with what stands beside them."""
    return _ROW.findall((DOCS / page).read_text())


def example_of(page: str) -> dict[str, Any]:
    """Return the one example of a configuration on a page."""
    [example] = re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return tomllib.loads(example)


def files_in(page: str) -> dict[str, str]:
    """Return the files that a page shows, by name."""
    return dict(_FILE.findall((DOCS / page).read_text()))


class PluginPagesTests(SynchronousTestCase):
    """The pages on writing plugins: their code, as it stands there."""

    def module(self, name: str, source: str) -> Any:
        """Import the source of a page as a module."""
        directory = Path(self.mktemp())
        directory.mkdir()
        (directory / f"{name}.py").write_text(source)
        self.patch(sys, "path", [str(directory), *sys.path])
        self.addCleanup(sys.modules.pop, name, None)
        return importlib.import_module(name)

    def maker(self, source: str, name: str) -> Any:
        """Return what a page's drop-in makes."""
        scope: dict[str, Any] = {}
        exec(source, scope)
        return scope[name]

    def test_provider(self) -> None:
        """The provider keeps its contract, reads its settings and answers."""
        files = files_in("write-a-provider.md")
        self.module("shout", files["shout.py"])
        maker = self.maker(files["twisted/plugins/shout_dropin.py"], "shout")
        verifyObject(IProviderMaker, maker)
        table = tomllib.loads(files["crabtwist.toml"])["providers"]["loud"]
        complaints: list[str] = []
        own = settings.read(maker.settings_class(), {"ending": table["ending"]}, "providers.loud", complaints)
        self.assertEqual([], complaints)
        provider = maker.make("loud", own, FakeServices())
        verifyObject(IProvider, provider)
        self.assertEqual("HI!!!", self.answer_of(provider)["choices"][0]["message"]["content"])

    def answer_of(self, provider: Any) -> Any:
        """Return what a provider answers to "hi"."""
        body = json.dumps({"model": "shout", "messages": [{"role": "user", "content": "hi"}]}).encode()
        call = Call("chat.completions", "openai", "shout", False, b"", (), body)
        response = self.successResultOf(provider.open(call))
        return json.loads(self.successResultOf(read_body(response, provider.clock)))

    def test_extension(self) -> None:
        """The extension keeps its contract, refuses what its page says, and counts."""
        files = files_in("write-an-extension.md")
        self.module("trial", files["trial.py"])
        maker = self.maker(files["twisted/plugins/trial_dropin.py"], "trial")
        verifyObject(IExtensionMaker, maker)
        table = tomllib.loads(files["crabtwist.toml"])["extensions"]["trial"]
        extension = maker.make(maker.settings_class()(**table), FakeServices())
        verifyObject(IExtension, extension)
        extension.on_request(make_context(principal="visitor", max_tokens=50))
        with self.assertRaises(Refused):
            extension.on_request(make_context(principal="visitor", max_tokens=51))
        ended = Outcome(200, "upstream", "complete", None, Usage(1, output_tokens=2), (), None, None, 1, 1, 1)
        extension.on_end(make_context(principal="visitor"), ended)
        self.assertEqual({"visitor": 3}, extension.admin_routes()["used"]({}))

    def test_pages_are_short(self) -> None:
        """Each file shown is about forty lines at most."""
        for page in ("write-a-provider.md", "write-an-extension.md"):
            for name, source in files_in(page).items():
                self.assertLessEqual(len(source.splitlines()), 45, f"{page}: {name}")


def read_body(response: Any, clock: Clock) -> Deferred[bytes]:
    """Return a Deferred of a response's body, letting its clock run."""
    import treq

    body: Deferred[bytes] = treq.content(response)
    clock.pump([0, 0, 0])
    return body


class ConfigurationPageTests(SynchronousTestCase):
    """The configuration page: every key, with its default."""

    def rows(self) -> dict[str, str]:
        """Return the keys that the page lists, with what stands beside them."""
        return dict(rows_of("configuration.md"))

    def test_every_key_is_there(self) -> None:
        """Each key of each table has a row, with its real default."""
        rows = self.rows()
        for cls in (tables.GatewaySettings, tables.ProviderSettings, AnthropicSettings, KeySettings):
            for field in attrs.fields(cls):
                self.assertIn(field.name, rows)
                if isinstance(field.default, bool | int | float):
                    self.assertEqual(f"`{json.dumps(field.default)}`".replace(".0`", "`"), rows[field.name])

    def test_no_other_key_is_there(self) -> None:
        """The page names no key that does not exist."""
        known: set[str] = set()
        for cls in (tables.GatewaySettings, tables.ProviderSettings, AnthropicSettings, KeySettings):
            known |= {field.name for field in attrs.fields(cls)}
        self.assertEqual(set(), self.rows().keys() - known)


class PricesPageTests(SynchronousTestCase):
    """The page on prices."""

    def test_every_key_is_there(self) -> None:
        """Each key of `[models.NAME]` has a row, and no other."""
        rows = dict(rows_of("prices.md"))
        self.assertEqual({field.name for field in attrs.fields(ModelSettings)}, set(rows))

    def test_example(self) -> None:
        """The example is read without complaint."""
        complaints: list[str] = []
        settings.read(ModelSettings, example_of("prices.md")["models"]["my-model"], "models", complaints)
        self.assertEqual([], complaints)


class LimitsPageTests(SynchronousTestCase):
    """The page on limits."""

    def test_every_key_is_there(self) -> None:
        """Each limit has a row, and no other."""
        rows = dict(rows_of("limits.md"))
        names = {field.name for field in attrs.fields(LimitSettings)}
        self.assertEqual({*names, "without_store"}, set(rows))
        self.assertEqual(f'`"{RateLimitSettings().without_store}"`', rows["without_store"])

    def test_example(self) -> None:
        """The example is read without complaint."""
        complaints: list[str] = []
        table = example_of("limits.md")["extensions"]["rate_limit"]
        settings.read(RateLimitSettings, table, "extensions.rate_limit", complaints)
        self.assertEqual([], complaints)


class CachePageTests(SynchronousTestCase):
    """The page on the cache."""

    def test_every_key_is_there(self) -> None:
        """Each key has a row with its default, and no other; and so has each word of its header."""
        expected = [(field.name, f"`{json.dumps(field.default)}`") for field in attrs.fields(CacheSettings)]
        rows = rows_of("cache.md")
        self.assertEqual(expected, rows[: len(expected)])
        self.assertEqual(["hit", "miss", "bypass"], [name for name, _ in rows[len(expected) :]])

    def test_example(self) -> None:
        """The example is read without complaint."""
        complaints: list[str] = []
        table = example_of("cache.md")["extensions"]["cache"]
        settings.read(CacheSettings, table, "extensions.cache", complaints)
        self.assertEqual([], complaints)


class UsagePageTests(SynchronousTestCase):
    """The page on usage."""

    def test_every_key_is_there(self) -> None:
        """Each key has a row with its default, and no other."""
        expected = [(field.name, f"`{json.dumps(field.default)}`") for field in attrs.fields(UsageSettings)]
        self.assertEqual(expected, rows_of("usage.md"))

    def test_example(self) -> None:
        """The example is read without complaint."""
        complaints: list[str] = []
        table = example_of("usage.md")["extensions"]["usage"]
        settings.read(UsageSettings, table, "extensions.usage", complaints)
        self.assertEqual([], complaints)

    def test_answer(self) -> None:
        """The answer that it shows has the members of a real one."""
        [shown] = re.findall(r"```json\n(.*?)```", (DOCS / "usage.md").read_text(), re.DOTALL)
        members = {"principal", "day", *SUMS, "cost_dollars"} - {"cost"}
        self.assertEqual(members, set(json.loads(shown)["totals"][0]))


class AuditPageTests(SynchronousTestCase):
    """The page on the audit."""

    def test_every_key_is_there(self) -> None:
        """Each key has a row with its default, and no other."""
        expected = [(field.name, f"`{json.dumps(field.default)}`") for field in attrs.fields(AuditSettings)]
        self.assertEqual(expected, [row for row in rows_of("audit.md") if row[1].startswith("`")])

    def test_example(self) -> None:
        """The example is read without complaint."""
        complaints: list[str] = []
        table = example_of("audit.md")["extensions"]["audit"]
        settings.read(AuditSettings, table, "extensions.audit", complaints)
        self.assertEqual([], complaints)

    def test_every_member_is_there(self) -> None:
        """The page names every member of a line."""
        page = (DOCS / "audit.md").read_text()
        for line in (RequestLine, TokensLine, BodiesLine, AdminLine):
            for name in line.__struct_fields__:
                self.assertIn(f"`{name}`", page)


class BudgetsPageTests(SynchronousTestCase):
    """The page on budgets."""

    def test_every_key_is_there(self) -> None:
        """Each key that is no table has a row with its default; those of a key are among them."""
        rows = dict(rows_of("budgets.md"))
        fields = {field.name: field.default for field in attrs.fields(BudgetSettings)}
        listed = {name for name in rows if name in fields}
        self.assertEqual({*fields} - {"fallback", "keys"}, listed)
        for name in listed:
            said = "none" if fields[name] is None else f"`{json.dumps(fields[name])}`"
            self.assertEqual(said, rows[name])
        self.assertLess({field.name for field in attrs.fields(KeyBudgetSettings)}, listed)

    def test_example(self) -> None:
        """The example is read without complaint."""
        complaints: list[str] = []
        table = example_of("budgets.md")["extensions"]["budget"]
        settings.read(BudgetSettings, table, "extensions.budget", complaints)
        self.assertEqual([], complaints)


class StoragePageTests(SynchronousTestCase):
    """The page on storage."""

    def test_every_key_is_there(self) -> None:
        """Each key of each store has a row with its default, and no other."""
        stores = (SQLiteSettings, RedisSettings, PostgresSettings)
        known = {field.name for cls in stores for field in attrs.fields(cls)}
        rows = rows_of("storage.md")
        self.assertEqual(known, {name for name, _ in rows} - {"memory", "sqlite", "redis", "postgres"})
        for cls in stores:
            for field in attrs.fields(cls):
                if isinstance(field.default, int | float):
                    self.assertIn((field.name, f"`{field.default:g}`"), rows)


class LedgerPageTests(SynchronousTestCase):
    """The page on the ledger."""

    def test_every_common_key_is_there(self) -> None:
        """Each key that all ledgers have has a row with its default."""
        rows = rows_of("ledger.md")
        for field in attrs.fields(tables.LedgerSettings):
            self.assertIn((field.name, f"`{json.dumps(field.default)}`"), rows)

    def test_every_own_key_is_there(self) -> None:
        """Each key of a kind of ledger has a row, with its default where it has one."""
        rows = rows_of("ledger.md")
        for cls in (SQLiteLedgerSettings, PostgresLedgerSettings):
            for field in attrs.fields(cls):
                default = json.dumps(field.default) if field.default is not attrs.NOTHING else "required"
                said = dict(rows)[field.name].strip("`")
                self.assertEqual(default.replace(".0", ""), said)

    def test_example(self) -> None:
        """The example, and that of the storage, say what is without them."""
        for section, page, path in (
            ("ledger", "ledger.md", SQLiteLedgerSettings().path),
            ("storage", "storage.md", SQLiteSettings().path),
        ):
            self.assertEqual({section: {"kind": EMBEDDED, "path": path}}, example_of(page))


class LinksTests(SynchronousTestCase):
    """Links between pages."""

    def test_targets_exist(self) -> None:
        """Every relative link leads to a file."""
        for page in [CHECKOUT / "README.md", *DOCS.glob("**/*.md")]:
            for target in _LINK.findall(page.read_text()):
                if not target.startswith("http"):
                    self.assertTrue((page.parent / target).exists(), f"{page.name}: {target}")

    def test_files_of_the_tour_exist(self) -> None:
        """The tour names files that are there."""
        for name in re.findall(r"`((?:\w+/)?\w+\.py)`", (DOCS / "tour.md").read_text()):
            found = (CHECKOUT / "crabtwist" / name).exists() or (CHECKOUT / name).exists()
            self.assertTrue(found, name)


class DefaultsTests(SynchronousTestCase):
    """Defaults that stand in the configuration and in the rooms."""

    def test_agree(self) -> None:
        """What a room does by default is what the configuration says it does."""
        gateway, provider = (
            tables.GatewaySettings(),
            tables.ProviderSettings(kind="k", models=(tables.ServedModel(name="m"),)),
        )
        http, patience, links = HTTPLimits(), Patience(), ConnectionLimits()
        deployment = Deployment(None, "m", "m")
        for said, done in (
            (gateway.max_body_bytes, http.max_body_bytes),
            (gateway.max_head_bytes, http.max_head_bytes),
            (gateway.head_timeout, http.head_timeout_seconds),
            (gateway.body_timeout, http.body_timeout_seconds),
            (gateway.keep_alive_timeout, http.keep_alive_timeout_seconds),
            (gateway.commit_seconds, patience.commit_seconds),
            (gateway.ping_seconds, patience.ping_seconds),
            (gateway.client_stall_timeout, patience.client_stall_seconds),
            (gateway.max_event_bytes, patience.max_event_bytes),
            (gateway.max_answer_copy_bytes, patience.max_answer_copy_bytes),
            (gateway.hook_timeout, HOOK_TIMEOUT_SECONDS),
            (gateway.max_json_depth, MAX_JSON_DEPTH),
            (tables.LedgerSettings().journal_max_bytes, MAX_BYTES),
            (provider.weight, deployment.weight),
            (provider.max_retries, deployment.max_retries),
            (provider.retry_deadline, deployment.retry_deadline_seconds),
            (provider.timeout, deployment.head_timeout_seconds),
            (provider.idle_timeout, deployment.idle_timeout_seconds),
            (provider.connect_timeout, links.connect_timeout_seconds),
            (provider.max_connections, links.max_connections),
            (provider.connection_wait, links.connection_wait_seconds),
        ):
            self.assertEqual(said, done)
