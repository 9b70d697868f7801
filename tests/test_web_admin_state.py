"""The doors that show the gateway itself, and nothing that is secret in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, succeed

from crabtwist.admin_providers import MASK
from crabtwist.config import Config, load
from crabtwist.discovery import Makers, discover
from crabtwist.extension import Extension
from crabtwist.settings import Secret
from crabtwist.values import AdminAction
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admin.state import PATIENCE_SECONDS, config_shown, masked, own_version
from tests.test_web_admin_requests import InsideTestCase

SECRETS = (
    *(
        "secret-admin-token",
        "secret-key-of-32-letters-and-more",
        "sk-ct-secret-virtual",
        "sk-secret-upstream",
    ),
    *("secret-redis-password", "secret-in-a-url"),
)
CONFIGURATION = f"""
admin_token = "{SECRETS[0]}"
secret_key = "{SECRETS[1]}"

[[keys]]
name = "ann"
key = "{SECRETS[2]}"

[providers.openai]
api_key = "{SECRETS[3]}"
base_url = "https://user:{SECRETS[5]}@example.com/v1"
models = ["gpt", {{ name = "own", upstream = "theirs" }}]

[aliases]
fast = "gpt"

[models.gpt]
input = 1
output = 2

[extensions.cache]
max_entries = 5

[storage]
kind = "redis"
url = "redis://:{SECRETS[4]}@127.0.0.1/0"
"""


class Kept(Extension):
    """A cache of three."""

    name = "cache"

    def __init__(self) -> None:
        self.number = 3
        self.actions: list[AdminAction] = []

    def __len__(self) -> int:
        return self.number

    def clear(self) -> None:
        """Have none."""
        self.number = 0

    def on_admin_action(self, action: AdminAction) -> None:
        self.actions.append(action)


class Store:
    """A store that answers as the test says."""

    def __init__(self) -> None:
        self.answer: Any = succeed(None)

    def get(self, _namespace: str, _key: bytes) -> Any:
        """Give the answer."""
        return self.answer


class StateTestCase(InsideTestCase):
    """A gateway with a configuration, whose store answers as the test says."""

    def make_inside(self) -> Inside:
        self.store = Store()
        path = Path(self.mktemp())
        path.write_text(CONFIGURATION)
        self.config: Config = load(path, {}, discover())
        return attrs.evolve(
            super().make_inside(),
            config=lambda: self.config,
            storage=self.store,
            makers=Makers(failed=MappingProxyType({"twisted.plugins.bad": "SyntaxError: no"})),
            listening=lambda: ["http://127.0.0.1:5632"],
            nodes=lambda: 3,
        )


class ConfigTests(StateTestCase):
    """The configuration as it runs."""

    def test_shown(self) -> None:
        """It is as the file has it, with the defaults."""
        shown = self.admin("config").json
        self.assertEqual(["127.0.0.1:5632"], shown["listen"])
        self.assertEqual(
            ("openai", MASK, 1, [{"name": "gpt", "upstream": "gpt"}, {"name": "own", "upstream": "theirs"}]),
            tuple(shown["providers"]["openai"][name] for name in ("kind", "api_key", "weight", "models")),
        )
        self.assertEqual(("ann", MASK), (shown["keys"][0]["name"], shown["keys"][0]["key"]))
        self.assertEqual({"fast": "gpt"}, shown["aliases"])
        self.assertEqual(
            (2.0, 5), (shown["models"]["gpt"]["output"], shown["extensions"]["cache"]["max_entries"])
        )
        self.assertEqual(("redis", MASK), (shown["storage"]["kind"], shown["storage"]["url"]))
        self.assertEqual(("sqlite", 400), (shown["ledger"]["kind"], shown["ledger"]["keep_days"]))

    def test_no_secret(self) -> None:
        """Nothing shows a secret, not even one that is in the wrong place."""
        for path in ("config", "models", "plugins", "health"):
            said = self.admin(path)
            self.assertEqual(200, said.status)
            for secret in SECRETS:
                self.assertNotIn(secret, said.body.decode(), path)
        self.assertIn(
            f"https://{MASK}@example.com/v1", self.admin("config").json["providers"]["openai"]["base_url"]
        )

    def test_no_ledger(self) -> None:
        """A ledger that is none is shown as in the file."""
        self.assertEqual({"kind": "none"}, config_shown(attrs.evolve(self.config, ledger=None))["ledger"])

    def test_strangers_settings(self) -> None:
        """Whatever settings a drop-in has can be shown."""

        @attrs.frozen
        class Odd:
            folder: Path = Path("a")
            many: frozenset[str] = frozenset({"b"})
            inner: tuple[dict[str, Secret], ...] = ({"x": Secret("hushed")},)

        shown = masked(Odd())
        self.assertEqual({"folder": "a", "many": ["b"], "inner": [{"x": MASK}]}, shown)
        self.assertNotIn("hushed", json.dumps(shown))


class ThereTests(StateTestCase):
    """What there is."""

    def test_models(self) -> None:
        """Models have their deployments, with how long each is left alone."""
        self.gateway.health.failed("up/claude", self.clock.seconds())
        shown = self.admin("models").json
        by_name = {model["name"]: model["deployments"] for model in shown["models"]}
        self.assertEqual(
            ("up", "claude", 1, "1970-01-01T00:00:30Z"),
            tuple(
                by_name["claude"][0][name]
                for name in ("provider", "upstream_model", "weight", "cooling_until")
            ),
        )
        self.assertIsNone(by_name["gpt"][0]["cooling_until"])
        self.assertEqual("claude", shown["aliases"]["fast"])

    def test_plugins(self) -> None:
        """Plugins are shown with the drop-in that each is from, and those that failed with why."""
        shown = self.admin("plugins").json
        self.assertEqual({"twisted.plugins.bad": "SyntaxError: no"}, shown["failed"])
        self.inside = attrs.evolve(self.inside, makers=discover())
        found = discover()
        self.assertEqual("twisted.plugins.crabtwist_dropin", found.modules["providers.echo"])
        self.assertEqual(
            set(found.providers),
            {name.removeprefix("providers.") for name in found.modules if name.startswith("providers.")},
        )


class HealthTests(StateTestCase):
    """How a node is."""

    def test_well(self) -> None:
        """A node that is well says so."""
        self.clock.advance(5)
        shown = self.admin("health").json
        self.assertEqual(
            (own_version(), 5.0, 3), tuple(shown[name] for name in ("version", "uptime_seconds", "nodes"))
        )
        self.assertEqual(["http://127.0.0.1:5632"], shown["listening"])
        self.assertEqual({"kind": "redis", "answers": True}, shown["storage"])
        self.assertEqual({"kind": "sqlite", "undelivered": 0, "dropped": 0}, shown["ledger"])

    def test_store_away(self) -> None:
        """A store that fails, or says nothing for long, does not answer."""
        self.store.answer = fail(OSError("gone"))
        self.assertFalse(self.admin("health").json["storage"]["answers"])
        self.store.answer = Deferred()
        self.assertEqual(
            0, self.send("GET", "/v1/admin/health", {"authorization": "Bearer ct-admin-secret"}).status
        )
        self.clock.advance(PATIENCE_SECONDS)
        wire: Any = self.channel.transport
        self.assertIn(b'"answers":false', wire.value())


class CacheTests(StateTestCase):
    """The cache."""

    def test_cleared(self) -> None:
        """It is emptied, and whoever watches administrators is told."""
        self.assertEqual((404, "no_cache"), self.admin("cache/clear", "POST").refusal)
        kept = Kept()
        self.extensions = (kept,)
        super().setUp()
        for number in (3, 0):
            self.assertEqual({"cleared": number}, self.admin("cache/clear", "POST").json)
        self.assertEqual(["cache.clear"] * 2, [action.action for action in kept.actions])
