"""Everything that was made through the admin API, and what it takes to make more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from crabtwist.admin_keys import KEYS, AdminKeys
from crabtwist.admin_providers import PROVIDERS, AdminProviders
from crabtwist.config import Config, ConfiguredProvider
from crabtwist.directory import Directory
from crabtwist.discovery import Makers
from crabtwist.errors import ConfigurationError, HeadTimedOut
from crabtwist.generation import Generation, Made
from crabtwist.metrics import Metrics
from crabtwist.seal import Seal
from crabtwist.settings import Secret

#: How long an upstream may take to list its models.
PROBE_SECONDS = 15.0

_NAMESPACE, _MARK = "admin.seal", b"mark"


class Administration:
    """
    The keys and providers of one node, those of its configuration and those that were made.

    `config` is the configuration as it runs now; whoever reloads it sets it.  `keys_changed` or
    `providers_changed` is called after what was made has changed, here or on another node.
    """

    _log = Logger()

    def __init__(
        self, config: Config, makers: Makers, storage: Any, clock: IReactorTime, folder: Path
    ) -> None:
        self.config = config
        self.keys_changed: Callable[[], object] = lambda: None
        self.providers_changed: Callable[[], object] = lambda: None
        self._storage = storage
        self._clock = clock
        self._folder = folder
        self._seal = None if config.secret_key is None else Seal(config.secret_key)
        self._directory = Directory(storage, clock, (KEYS, PROVIDERS))
        self._directory.changed = self._changed
        self.providers = AdminProviders(
            self._directory, self._seal, makers, lambda: self.config, self._probe, self._alone
        )
        self.keys = AdminKeys(self._directory, self._seal, clock, lambda: self.config, self._models)

    async def start(self) -> None:
        """Read what was made; fails if the store does, or was written with another `secret_key`."""
        await self._check_seal()
        await self._directory.start()

    def stop(self) -> None:
        """Hear no more of changes."""
        self._directory.stop()

    def made(self) -> Made:
        """Return what there is beside the configuration."""
        if self._seal is None:
            return Made()
        return Made(self.keys.stored(), self.providers.stored(), self._seal.digest_key)

    def _changed(self, sorts: frozenset[str]) -> None:
        # New providers come with the keys as they are now.
        if PROVIDERS in sorts:
            self.providers_changed()
        else:
            self.keys_changed()

    async def _check_seal(self) -> None:
        mark = await self._storage.get(_NAMESPACE, _MARK)
        if self._seal is None:
            if mark is not None:
                self._log.warn("without a secret_key nothing that was made through the admin API is there")
        elif mark is None:
            await self._storage.set(_NAMESPACE, _MARK, self._seal.mark)
        elif mark != self._seal.mark:
            raise ConfigurationError(
                ["secret_key: is not the one that the store was written with; all nodes on it need the same"]
            )

    def _models(self) -> set[str]:
        served = [*self.config.providers, *self.providers.stored()]
        names = {model.name for each in served for model in each.common.models}
        return names | self.config.aliases.keys()

    def _alone(self, configured: ConfiguredProvider) -> Generation:
        """Return a generation of one provider; raises `ConfigurationError` if it cannot be made."""
        alone = attrs.evolve(self.config, providers=(configured,))
        return Generation(alone, self._clock, Metrics(), self._folder)

    async def _probe(self, configured: ConfiguredProvider) -> list[str]:
        """Ask an upstream for its models, by a provider of its own."""
        generation = self._alone(configured)
        generation.start()
        try:
            asking: Awaitable[list[str]] = generation.providers[0].list_models()
            listing = Deferred.fromCoroutine(_awaited(asking))
            return await listing.addTimeout(PROBE_SECONDS, self._clock, _too_late)
        finally:
            await generation.stop()


async def has_other_mark(storage: Any, secret_key: Secret) -> bool:
    """Tell whether an open store was written with another `secret_key`: no gateway starts with this one."""
    mark = await storage.get(_NAMESPACE, _MARK)
    return mark is not None and mark != Seal(secret_key).mark


async def _awaited(asking: Awaitable[list[str]]) -> list[str]:
    return list(await asking)


def _too_late(_result: object, seconds: float) -> Any:
    raise HeadTimedOut(f"no answer within {seconds:g} seconds")
