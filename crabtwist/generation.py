"""What one reading of the configuration makes: providers, and who may ask them for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.application.service import IService
from twisted.internet.defer import DeferredList, maybeDeferred
from twisted.logger import Logger
from zope.interface import implementer

from crabtwist.config import Config, ConfiguredProvider
from crabtwist.connection_pool import ConnectionLimits
from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import IServices
from crabtwist.keys import KeyRing
from crabtwist.metrics import Metrics
from crabtwist.pricing import PriceBook, published
from crabtwist.routing import Deployment, Registry
from crabtwist.stored_keys import StoredKey
from crabtwist.tables import ProviderSettings
from crabtwist.upstream import UpstreamAgent


@implementer(IServices)
@attrs.define
class Services:
    """What the gateway lends to one plugin; remembers the agents, so as to close them."""

    clock: Any
    directory: Path
    storage: Any = None
    limits: ConnectionLimits = attrs.field(factory=ConnectionLimits)
    on_stale_retry: Callable[[], object] | None = None
    metrics: Metrics | None = None
    agents: list[UpstreamAgent] = attrs.field(factory=list)

    def show(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Have the metrics show a gauge; a provider's are not shown, for a reload would make them twice."""
        if self.metrics is not None:
            self.metrics.show(name, what, read)

    def agent(self, *, ca_file: str | None = None) -> UpstreamAgent:
        """Return a new agent with the bounds of the configuration."""
        trusted = None if ca_file is None else str(self.directory / ca_file)
        agent = UpstreamAgent(self.clock, self.limits, ca_file=trusted, on_stale_retry=self.on_stale_retry)
        self.agents.append(agent)
        return agent


@attrs.frozen
class Made:
    """
    What was made through the admin API, as far as it can be read.

    What the configuration has of the same name comes first.
    """

    keys: tuple[StoredKey, ...] = ()
    providers: tuple[ConfiguredProvider, ...] = ()
    digest_key: bytes = b""


class Generation:
    """
    One configuration's providers, registry and keys; `directory` is the configuration's folder.

    Made without side effects; `start` and `stop` do for those providers that are services.  Raises
    `ConfigurationError` with why each of the configuration's providers that cannot be made cannot; what was
    made beside it and cannot be had is logged and left out.
    """

    _log = Logger()

    def __init__(
        self, config: Config, reactor: Any, metrics: Metrics, directory: Path, made: Made | None = None
    ) -> None:
        self._directory = directory
        self._services: list[Services] = []
        self.providers: list[Any] = []
        deployments: list[Deployment] = []
        complaints: list[str] = []
        made = made or Made()
        written = {configured.name for configured in config.providers}
        others = [configured for configured in made.providers if configured.name not in written]
        for configured in (*config.providers, *others):
            try:
                provider = self._make(configured, reactor, metrics)
            except ConfigurationError as error:
                if configured in others:
                    self._log.error(
                        "the stored provider {name!r}: {error}", name=configured.name, error=error
                    )
                else:
                    complaints += error.complaints
            else:
                self.providers.append(provider)
                deployments += _deployments(provider, configured.common)
        if complaints:
            raise ConfigurationError(complaints)
        own_prices = {name: settings.row(name) for name, settings in config.models.items()}
        self.registry = Registry(deployments, config.aliases, PriceBook(published(), own_prices))
        self.keys = None if config.allow_anonymous else key_ring(config, made)

    def _make(self, configured: ConfiguredProvider, reactor: Any, metrics: Metrics) -> Any:
        services = Services(
            clock=reactor,
            directory=self._directory,
            limits=ConnectionLimits(
                connect_timeout_seconds=configured.common.connect_timeout,
                max_connections=configured.common.max_connections,
                connection_wait_seconds=configured.common.connection_wait,
            ),
            on_stale_retry=metrics.stale_counter(configured.name),
        )
        self._services.append(services)
        return configured.maker.make(configured.name, configured.settings, services)

    def start(self) -> None:
        """Start the providers that are services."""
        for provider in self.providers:
            if IService.providedBy(provider):
                provider.startService()

    async def stop(self) -> None:
        """Stop them, and close every kept connection."""
        stopping = [
            maybeDeferred(provider.stopService)
            for provider in self.providers
            if IService.providedBy(provider)
        ]
        closing = [agent.close() for services in self._services for agent in services.agents]
        await DeferredList([*stopping, *closing], consumeErrors=True)


def key_ring(config: Config, made: Made) -> KeyRing:
    """Return the keys of a configuration, and those that were made beside it."""
    written = {key.name for key in config.keys}
    others = [(key.virtual, key.digests) for key in made.keys if key.name not in written]
    return KeyRing(config.keys, made.digest_key, others)


def _deployments(provider: Any, common: ProviderSettings) -> list[Deployment]:
    return [
        Deployment(
            provider=provider,
            served=model.name,
            upstream_model=model.upstream,
            weight=common.weight,
            max_retries=common.max_retries,
            retry_deadline_seconds=common.retry_deadline,
            head_timeout_seconds=common.timeout,
            idle_timeout_seconds=common.idle_timeout,
        )
        for model in common.models
    ]
