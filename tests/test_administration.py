"""Everything that was made, on one node and on several."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.defer import Deferred

from crabtwist.administration import PROBE_SECONDS, Administration
from crabtwist.directory import POLL_SECONDS
from crabtwist.discovery import discover
from crabtwist.errors import ConfigurationError, Refusal
from tests.administering import CONFIGURATION, SECRET_KEY, AdministrationTestCase


class TellingTests(AdministrationTestCase):
    """Who is told of changes."""

    def setUp(self) -> None:
        """Have two nodes, and listen to the second."""
        super().setUp()
        self.there = self.node(self.configuration)
        self.told: list[str] = []
        self.there.keys_changed = lambda: self.told.append("keys")
        self.there.providers_changed = lambda: self.told.append("providers")

    def test_keys(self) -> None:
        """A key that is made here is known there within a second, and said to have changed."""
        self.do(self.here.keys.create({"name": "ann"}))
        self.clock.advance(POLL_SECONDS)
        self.assertEqual(["keys"], self.told)
        self.assertEqual(["ann"], [key.name for key in self.there.made().keys])
        self.assertEqual(self.here.made().digest_key, self.there.made().digest_key)

    def test_providers(self) -> None:
        """So is a provider, and with it what it serves, which keys may be for."""
        self.do(self.here.providers.create({"name": "second", "kind": "echo"}, probe=False))
        self.clock.advance(POLL_SECONDS)
        self.assertEqual(["providers"], self.told)
        [made] = self.there.made().providers
        self.assertEqual("second", made.name)
        self.do(self.there.keys.create({"name": "bob", "models": ["echo"]}))

    def test_stopped(self) -> None:
        """A node that was stopped hears of nothing."""
        self.there.stop()
        self.do(self.here.keys.create({"name": "ann"}))
        self.clock.advance(5)
        self.assertEqual([], self.told)


class SealTests(AdministrationTestCase):
    """The store and its `secret_key`."""

    def start(self, configuration: str) -> Deferred[None]:
        """Start another node."""
        node = Administration(self.read(configuration), discover(), self.storage, self.clock, Path())
        self.addCleanup(node.stop)
        return Deferred.fromCoroutine(node.start())

    def test_other(self) -> None:
        """A node with another key does not start: it would take all keys away."""
        starting = self.start(f'secret_key = "{"t" * 64}"\n{CONFIGURATION}')
        self.assertIn("secret_key", self.failureResultOf(starting, ConfigurationError).getErrorMessage())

    def test_same(self) -> None:
        """One with the same key does."""
        self.successResultOf(self.start(SECRET_KEY + CONFIGURATION))

    def test_none(self) -> None:
        """One without starts, and knows of nothing that was made."""
        self.do(self.here.keys.create({"name": "ann"}))
        without = self.node(CONFIGURATION)
        self.assertEqual((), without.made().keys)
        self.assertEqual(["file"], [key.name for key in without.keys.all()])


class ProbeTests(AdministrationTestCase):
    """How an upstream is asked."""

    def test_asked(self) -> None:
        """A provider of its own asks, and is gone afterwards."""
        known = self.do(self.here.providers.create({"name": "second", "kind": "echo"}, probe=True))
        self.assertEqual(["echo"], [model["name"] for model in known.settings["models"]])
        self.assertEqual(["echo"], self.do(self.here.providers.models("echo")))

    def test_unmakeable(self) -> None:
        """What cannot be made is refused with the key that is at fault."""
        table = {"name": "up", "kind": "openai", "base_url": "gopher://x"}
        for more in ({}, {"models": ["m"]}):
            status, _, message = self.refused(self.here.providers.create({**table, **more}, probe=False))
            self.assertEqual((400, True), (status, message.startswith("base_url: ")), message)

    def test_patience(self) -> None:
        """An upstream that does not answer is not waited for longer than was said."""
        table = {"name": "up", "kind": "openai", "base_url": "http://127.0.0.1:9/v1", "connect_timeout": 99}
        making = Deferred.fromCoroutine(self.here.providers.create(table, probe=False))
        self.clock.advance(PROBE_SECONDS - 1)
        self.assertNoResult(making)
        self.clock.advance(1)
        refusal = self.failureResultOf(making, Refusal).value
        self.assertIn("no answer within 15 seconds", str(refusal))
