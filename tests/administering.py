"""One node's administration over a store in memory, with the real makers and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.administration import Administration
from crabtwist.config import Config, load
from crabtwist.discovery import discover
from crabtwist.errors import Refusal
from crabtwist.storage.memory import MemoryStorage
from crabtwist.testing import FakeServices

SECRET_KEY = f'secret_key = "{"s" * 64}"\n'
CONFIGURATION = """
[[keys]]
name = "file"
key = "sk-file"

[providers.echo]
models = ["echo"]

[aliases]
alias = "echo"

[extensions.rate_limit]
"""


class SharedStorage(MemoryStorage):
    """A store that other nodes see too."""

    between_nodes = True


class AdministrationTestCase(SynchronousTestCase):
    """An administration that has been started."""

    configuration = SECRET_KEY + CONFIGURATION

    def setUp(self) -> None:
        """Start it."""
        self.clock = MemoryReactorClock()
        self.clock.advance(1_800_000_000)
        self.storage = SharedStorage(None, FakeServices(self.clock))
        self.here = self.node(self.configuration)

    def node(self, configuration: str) -> Administration:
        """Return a node on the store, started."""
        node = Administration(self.read(configuration), discover(), self.storage, self.clock, Path())
        self.do(node.start())
        self.addCleanup(node.stop)
        return node

    def read(self, configuration: str) -> Config:
        """Return a configuration."""
        path = Path(self.mktemp())
        path.write_text(configuration)
        return load(path, {}, discover())

    def do(self, work: Any) -> Any:
        """Return what a coroutine comes to."""
        return self.successResultOf(Deferred.fromCoroutine(work))

    def refused(self, work: Any) -> tuple[int, str, str]:
        """Return how a coroutine is refused: status, slug, message."""
        refusal = self.failureResultOf(Deferred.fromCoroutine(work), Refusal).value
        assert isinstance(refusal, Refusal)
        return refusal.status, refusal.slug, refusal.message
