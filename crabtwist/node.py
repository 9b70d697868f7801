"""
One running gateway: what is started, in which order, reloaded, and brought to an end.

Starting: storage, ledger, extensions, providers, and only then the ports.  Stopping: `/ready` turns red
and new work is refused, what runs may finish within `shutdown_timeout`, what then still runs is told so
and ended, and last the connections, the ports and the rest are closed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from twisted.application.service import IService, Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure

from crabtwist import heap
from crabtwist.administration import Administration
from crabtwist.attempt import Patience
from crabtwist.bookkeeping import Bookkeeping
from crabtwist.config import Config
from crabtwist.discovery import Makers
from crabtwist.errors import ConfigurationError, Refusal
from crabtwist.gateway import Gateway
from crabtwist.generation import Generation, Services, key_ring
from crabtwist.health import Health
from crabtwist.hooks import Hooks
from crabtwist.http_reader import HTTPLimits
from crabtwist.leases import Leases
from crabtwist.listener import GatewayFactory, Listener
from crabtwist.metrics import Metrics
from crabtwist.tables import GatewaySettings
from crabtwist.values import Headers
from crabtwist.web.admin.follow import Tail
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admission import Admission
from crabtwist.web.answers import refuse_unread
from crabtwist.web.app import make_app, shortcuts

#: How long the last words to those that were interrupted may take.
LAST_WORDS_SECONDS = 2.0

#: What a reload replaces.
_RELOADED = ("providers", "keys", "aliases", "models", "allow_anonymous")


class Node(Service):
    """
    The service that twistd runs.

    `directory` is the configuration's folder; `load` reads it anew, for SIGHUP.  `start_failed` is called
    when the start failed after the reactor began, so that the process can end with a status that says so.
    `started` fires with the ports, or with why there are none.
    """

    name = "crabtwist"
    _log = Logger()

    def __init__(
        self,
        config: Config,
        reactor: Any,
        endpoints: Sequence[IStreamServerEndpoint],
        *,
        directory: Path,
        load: Callable[[], Config],
        makers: Makers,
        start_failed: Callable[[], object],
    ) -> None:
        self.started: Deferred[list[IListeningPort]] = Deferred()
        self._config = config
        self._reactor = reactor
        self._load = load
        self._start_failed = start_failed
        metrics = Metrics()
        self._generation = Generation(config, reactor, metrics, directory)
        self._services = Services(clock=reactor, directory=directory, metrics=metrics)
        self._storage = config.storage.maker.make(config.storage.settings, self._services)
        self._services.storage = self._storage
        self._administration = Administration(config, makers, self._storage, reactor, directory)
        self._storage_is_open = self._books_are_open = False
        self._books = self._make_books(config, metrics)
        self._extensions = [each.maker.make(each.settings, self._services) for each in config.extensions]
        self.gateway = Gateway(
            clock=reactor,
            registry=self._generation.registry,
            keys=self._generation.keys,
            hooks=Hooks(self._extensions, reactor, config.hook_timeout),
            health=Health(failures=config.cooldown_failures, seconds=config.cooldown_seconds),
            metrics=metrics,
            patience=_patience(config),
            max_json_depth=config.max_json_depth,
            inject_stream_usage=config.inject_stream_usage,
            books=self._books,
        )
        self._tail = Tail(self.gateway)
        #: Which nodes are alive on the same store.
        self._roll = Leases(self._storage, "nodes", reactor)
        self._listening: list[str] = []
        self._listener = Listener(endpoints, self._factory(makers))

    def _make_books(self, config: Config, metrics: Metrics) -> Bookkeeping | None:
        if config.ledger is None:
            return None
        ledger = config.ledger.maker.make(config.ledger.settings, self._services)
        common = config.ledger.common
        books = Bookkeeping(
            ledger,
            self._reactor,
            self._services.directory / common.journal,
            journal_max_bytes=common.journal_max_bytes,
            keep_days=common.keep_days,
            keep_records=common.keep_records,
        )
        books.show_in(metrics)
        return books

    def _factory(self, makers: Makers) -> GatewayFactory:
        inside = Inside(
            gateway=self.gateway,
            config=self._running_config,
            makers=makers,
            storage=self._storage,
            tail=self._tail,
            started_at=self._reactor.seconds(),
            extensions=self._extensions,
            listening=lambda: self._listening,
            nodes=lambda: self._roll.nodes,
        )
        admission = Admission(self.gateway, self._config.admin_token)
        app = make_app(self.gateway, self._extensions, self._administration, inside)
        return GatewayFactory(
            app.resource(),
            reactor=self._reactor,
            limits=_http_limits(self._config),
            admit=admission,
            render_refusal=admission.refuse,
            refuse=self._refuse_bad_http,
            shortcuts=shortcuts(app),
        )

    def _refuse_bad_http(self, status: int, slug: str, message: str, path: bytes) -> tuple[Headers, bytes]:
        self.gateway.metrics.refused(slug)
        return refuse_unread(Refusal(status, slug, message), path)

    # Starting.

    def startService(self) -> None:
        """Start; what fails is logged, and ends the process."""
        super().startService()
        # A signal is met between any two steps of the reactor's; only `callFromThread` also wakes it.
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self.reload))
        starting = Deferred.fromCoroutine(self._start())
        starting.addErrback(self._not_started)
        starting.chainDeferred(self.started)

    async def _start(self) -> list[IListeningPort]:
        await self._storage.open()
        self._storage_is_open = True
        await self._administration.start()
        if self._storage.between_nodes:
            await self._roll.start()
        self._serve(self._generate(self._config))
        self._administration.keys_changed = self._apply_keys
        self._administration.providers_changed = self._apply_providers
        if self._books is not None:
            await self._books.start()
            self._books_are_open = True
        for extension in self._extensions:
            if IService.providedBy(extension):
                await maybeDeferred(extension.startService)
        self._generation.start()
        heap.settle()
        self._listener.startService()
        ports: list[IListeningPort] = await self._listener.listening
        self._listening = [_where(port.getHost()) for port in ports]
        for where in self._listening:
            self._log.info("serving on {where}", where=where)
        return ports

    def _not_started(self, failure: Failure) -> Failure:
        self._log.critical("not started: {why}", why=failure.getErrorMessage())
        self._start_failed()
        return failure

    # Reloading.

    def reload(self) -> None:
        """Read the configuration again: swap models, keys and aliases at once, or keep the old ones."""
        try:
            config = self._load()
            generation = self._generate(config)
        except ConfigurationError as error:
            self._log.error(
                "the configuration was not reloaded; the old one stays: {complaints}",
                complaints=error.complaints,
            )
            return
        self._tell_what_stays(config)
        self._administration.config = config
        self._replace(generation)
        self._log.info("reloaded: {models}", models=generation.registry.names())

    def _apply_keys(self) -> None:
        """Admit by the keys as they are now, made here or on another node."""
        config = self._administration.config
        self.gateway.keys = None if config.allow_anonymous else key_ring(config, self._administration.made())
        self._log.info("keys changed")

    def _apply_providers(self) -> None:
        """Serve what the providers as they are now serve, made here or on another node."""
        try:
            generation = self._generate(self._administration.config)
        except ConfigurationError as error:
            self._log.error(
                "providers changed, and are not served: {complaints}", complaints=error.complaints
            )
            return
        self._replace(generation)
        self._log.info("providers changed; serving {models}", models=generation.registry.names())

    def _generate(self, config: Config) -> Generation:
        made = self._administration.made()
        return Generation(config, self._reactor, self.gateway.metrics, self._services.directory, made)

    def _serve(self, generation: Generation) -> None:
        self._generation = generation
        self.gateway.registry, self.gateway.keys = generation.registry, generation.keys

    def _replace(self, generation: Generation) -> None:
        generation.start()
        old = self._generation
        self._serve(generation)
        retiring = self.gateway.when_unused(old.registry)
        retiring.addCallback(lambda _: Deferred.fromCoroutine(old.stop()))
        retiring.addErrback(lambda failure: self._log.failure("retiring providers failed", failure))

    def _running_config(self) -> Config:
        """Return the configuration as it runs: what was reloaded, and what takes a restart."""
        latest = self._administration.config
        return attrs.evolve(self._config, **{name: getattr(latest, name) for name in _RELOADED})

    def _tell_what_stays(self, config: Config) -> None:
        """Name what the file says anew and only a restart brings about."""
        names = [*(field.name for field in attrs.fields(GatewaySettings)), "extensions", "storage", "ledger"]
        changed = {name for name in names if getattr(config, name) != getattr(self._config, name)}
        if changed - {"allow_anonymous"}:
            self._log.warn(
                "these take a restart to change: {keys}", keys=sorted(changed - {"allow_anonymous"})
            )

    # Stopping.

    def stopService(self) -> Deferred[None]:
        """Stop, in order; fires when it is done."""
        super().stopService()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._reactor.callFromThread(self._hurry))
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self.gateway.draining = True
        self._tail.end()
        busy = await self._listener.drain(self._config.shutdown_timeout)
        if busy:
            self._log.warn("{busy} connections still busy; ending them", busy=busy)
            self.gateway.interrupt_all("the gateway is being stopped")
            await self._listener.drain(LAST_WORDS_SECONDS)
        self._listener.abort_all()
        await self._listener.stopService()
        self._administration.stop()
        if self._storage_is_open and self._storage.between_nodes:
            await self._roll.stop()
        await self._generation.stop()
        stopping = [
            maybeDeferred(extension.stopService)
            for extension in self._extensions
            if IService.providedBy(extension)
        ]
        closing = [agent.close() for agent in self._services.agents]
        await DeferredList([*stopping, *closing], consumeErrors=True)
        if self._books is not None and self._books_are_open:
            await self._books.stop()
        if self._storage_is_open:
            await self._storage.close()

    def _hurry(self) -> None:
        """End everything now: somebody asked twice."""
        self._log.warn("stopping at once")
        self.gateway.interrupt_all("the gateway is being stopped")
        self._listener.abort_all()


def _where(address: Any) -> str:
    if isinstance(address, IPv6Address):
        return f"http://[{address.host}]:{address.port}"
    return f"http://{address.host}:{address.port}" if isinstance(address, IPv4Address) else str(address)


def _patience(config: Config) -> Patience:
    return Patience(
        commit_seconds=config.commit_seconds,
        ping_seconds=config.ping_seconds,
        client_stall_seconds=config.client_stall_timeout,
        max_event_bytes=config.max_event_bytes,
        max_answer_copy_bytes=config.max_answer_copy_bytes,
    )


def _http_limits(config: Config) -> HTTPLimits:
    return HTTPLimits(
        max_body_bytes=config.max_body_bytes,
        max_head_bytes=config.max_head_bytes,
        head_timeout_seconds=config.head_timeout,
        body_timeout_seconds=config.body_timeout,
        keep_alive_timeout_seconds=config.keep_alive_timeout,
    )
