"""What one reading of the configuration makes: providers, and who may ask them for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.application.service import IService
from twisted.internet.defer import DeferredList, maybeDeferred
from zope.interface import implementer

from crabtwist.config import Config, ConfiguredProvider
from crabtwist.connection_pool import ConnectionLimits
from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import IServices
from crabtwist.keys import KeyRing
from crabtwist.metrics import Metrics
from crabtwist.pricing import PriceBook, published
from crabtwist.routing import Deployment, Registry
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
    agents: list[UpstreamAgent] = attrs.field(factory=list)

    def agent(self, *, ca_file: str | None = None) -> UpstreamAgent:
        """Return a new agent with the bounds of the configuration."""
        trusted = None if ca_file is None else str(self.directory / ca_file)
        agent = UpstreamAgent(self.clock, self.limits, ca_file=trusted, on_stale_retry=self.on_stale_retry)
        self.agents.append(agent)
        return agent


class Generation:
    """
    One configuration's providers, registry and keys; `directory` is the configuration's folder.

    Made without side effects; `start` and `stop` do for those providers that are services.  Raises
    `ConfigurationError` with why each of the providers that cannot be made cannot.
    """

    def __init__(self, config: Config, reactor: Any, metrics: Metrics, directory: Path) -> None:
        self._directory = directory
        self._services: list[Services] = []
        self._providers: list[Any] = []
        deployments: list[Deployment] = []
        complaints: list[str] = []
        for configured in config.providers:
            try:
                provider = self._make(configured, reactor, metrics)
            except ConfigurationError as error:
                complaints += error.complaints
            else:
                self._providers.append(provider)
                deployments += _deployments(provider, configured.common)
        if complaints:
            raise ConfigurationError(complaints)
        own_prices = {name: settings.row(name) for name, settings in config.models.items()}
        self.registry = Registry(deployments, config.aliases, PriceBook(published(), own_prices))
        self.keys = None if config.allow_anonymous else KeyRing(config.keys)

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
        for provider in self._providers:
            if IService.providedBy(provider):
                provider.startService()

    async def stop(self) -> None:
        """Stop them, and close every kept connection."""
        stopping = [
            maybeDeferred(provider.stopService)
            for provider in self._providers
            if IService.providedBy(provider)
        ]
        closing = [agent.close() for services in self._services for agent in services.agents]
        await DeferredList([*stopping, *closing], consumeErrors=True)


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
