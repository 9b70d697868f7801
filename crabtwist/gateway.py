"""What all exchanges share: who serves what, who may ask, and who is told how it went."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from crabtwist.attempt import Patience
from crabtwist.body import MAX_JSON_DEPTH
from crabtwist.bookkeeping import Bookkeeping
from crabtwist.dialects.operations import Operation
from crabtwist.exchange import Exchange
from crabtwist.health import Health
from crabtwist.hooks import Hooks
from crabtwist.keys import KeyRing, VirtualKey
from crabtwist.metrics import Metrics
from crabtwist.routing import Registry
from crabtwist.values import Context, Outcome, Usage, UsageEvent

_log = Logger()

#: Told of every request's usage, once.
UsageSubscriber = Callable[[UsageEvent], None]
#: Told of every request's end.
Watcher = Callable[[Context, Outcome], None]


class _Serving(Deferred[None]):
    """Fires when an exchange has ended; others may wait for what it asks, so leaving need not end it."""

    def __init__(self, leave: Callable[[], None]) -> None:
        super().__init__()
        self._leave: Callable[[], None] | None = leave

    def cancel(self) -> None:
        if self._leave is not None:
            self._leave()

    def end(self) -> None:
        # Whoever keeps this keeps no exchange by it.
        self._leave = None
        self.callback(None)


class Gateway:
    """
    The gateway itself, without sockets.

    `registry` and `keys` may be replaced at any time; an exchange keeps those that it began with.
    `keys` None means that anybody may ask, `books` None that no ledger is kept.  `watchers` are told how each
    request ended; what one of them raises is logged.
    """

    def __init__(
        self,
        *,
        clock: IReactorTime,
        registry: Registry,
        keys: KeyRing | None,
        hooks: Hooks,
        health: Health | None = None,
        metrics: Metrics | None = None,
        random: Random | None = None,
        patience: Patience | None = None,
        max_json_depth: int = MAX_JSON_DEPTH,
        inject_stream_usage: bool = True,
        books: Bookkeeping | None = None,
    ) -> None:
        self.clock = clock
        self.registry = registry
        self.keys = keys
        self.hooks = hooks
        self.health = health or Health()
        self.metrics = metrics or Metrics()
        self.random = random or Random()  # noqa: S311 - it spreads load, it guards nothing
        self.patience = patience or Patience()
        self.max_json_depth = max_json_depth
        self.inject_stream_usage = inject_stream_usage
        self.books = books
        self.draining = False
        self.watchers: list[Watcher] = []
        self._running: set[Exchange] = set()
        self._subscribers: list[UsageSubscriber] = []
        self._waiting: list[tuple[Registry, Deferred[None]]] = []

    def subscribe(self, subscriber: UsageSubscriber) -> None:
        """Tell `subscriber` of every request's usage; what it raises is logged."""
        self._subscribers.append(subscriber)

    def serve(self, operation: Operation, request: Any, key: VirtualKey | None) -> Deferred[None]:
        """
        Answer a request whose body has been read.

        The Deferred fires when it has ended.  Cancelling it means that the client left.
        """
        exchange = Exchange(self, self.registry, operation, request, key, new_request_id())
        self._running.add(exchange)
        self.metrics.active.inc()
        serving = _Serving(exchange.leave)
        exchange.start().addBoth(self._ended, exchange, serving)
        return serving

    def when_unused(self, registry: Registry) -> Deferred[None]:
        """Return a Deferred that fires when no exchange uses a registry that was replaced."""
        unused: Deferred[None] = Deferred()
        self._waiting.append((registry, unused))
        self._tell_unused()
        return unused

    def _tell_unused(self) -> None:
        used = {exchange.registry for exchange in self._running}
        waiting, self._waiting = self._waiting, []
        for registry, unused in waiting:
            if registry in used:
                self._waiting.append((registry, unused))
            else:
                unused.callback(None)

    def interrupt_all(self, message: str) -> None:
        """End everything that still runs, telling each client why."""
        for exchange in list(self._running):
            exchange.interrupt(message)

    @property
    def usable(self) -> bool:
        """Whether some deployment is there that is not cooling down."""
        now = self.clock.seconds()
        return any(
            not self.health.cool_until(deployment.name, now)
            for deployments in self.registry.models.values()
            for deployment in deployments
        )

    def _ended(self, _result: None, exchange: Exchange, serving: _Serving) -> None:
        self._running.discard(exchange)
        self.metrics.active.dec()
        context, outcome = exchange.context, exchange.outcome
        assert outcome is not None, "an exchange cannot end without having been settled"
        if self.books is not None:
            self.books.settle(context, outcome)
        self.metrics.settled(context, outcome, known_model=exchange.model_known)
        self._publish(exchange)
        self._tell_watchers(context, outcome)
        self.hooks.ended(context, outcome)
        if self._waiting:
            self._tell_unused()
        serving.end()

    def _publish(self, exchange: Exchange) -> None:
        if not self._subscribers:
            return
        context, outcome = exchange.context, exchange.outcome
        assert outcome is not None
        event = UsageEvent(
            timestamp=context.started_at,
            request_id=context.request_id,
            principal=context.principal,
            model=context.model,
            provider=context.provider,
            endpoint=context.operation,
            usage=outcome.usage or Usage(),
            duration_ms=round(outcome.duration_seconds * 1000),
            status=outcome.status,
            error=None if outcome.reason == "complete" else outcome.message or outcome.reason,
        )
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                _log.failure("{request_id}: a subscriber to usage events failed", request_id=event.request_id)

    def _tell_watchers(self, context: Context, outcome: Outcome) -> None:
        for watcher in tuple(self.watchers):
            try:
                watcher(context, outcome)
            except Exception:
                _log.failure("{request_id}: a watcher failed", request_id=context.request_id)


def new_request_id() -> str:
    """Return an id that no other request has."""
    return "req_ct_" + os.urandom(12).hex()
