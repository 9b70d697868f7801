"""Asking the deployments, one after the other and again where that may help, until one answers."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater

from crabtwist import body as bodies
from crabtwist import values
from crabtwist.attempt import Attempt, Reply
from crabtwist.dialects.operations import Operation
from crabtwist.errors import ConnectionBroken, ShuttingDown, UpstreamError
from crabtwist.relay import End
from crabtwist.retry import delay_before_retry
from crabtwist.routing import Deployment, Registry, order
from crabtwist.surroundings import Surroundings
from crabtwist.values import Call, Context, Usage


class Dispatch:
    """
    One request's attempts.

    `abandoned` says whether nobody waits for the answer any more: a guard or a provider may have swallowed
    the order to stop.  `patience` may be replaced before anything is asked.  `attempts`, `usage` (the last
    attempt's), `vendor` and `fidelity` tell how it went.
    """

    def __init__(
        self,
        gateway: Surroundings,
        registry: Registry,
        operation: Operation,
        context: Context,
        body: bodies.RequestBody,
        abandoned: Callable[[], bool],
    ) -> None:
        self.attempts: list[values.Attempt] = []
        self.usage: Usage | None = None
        self.vendor = ""
        self.fidelity = b"verbatim"
        self.patience = gateway.patience
        self._gateway = gateway
        self._registry = registry
        self._operation = operation
        self._context = context
        self._body: bodies.RequestBody | None = body
        self._abandoned = abandoned
        self._deployment: Deployment | None = None

    async def reply(self, candidates: list[Deployment]) -> Reply:
        """Return the first answer that is worth passing on, or raise the `UpstreamError` that tells most."""
        gateway = self._gateway
        deployments = order(candidates, gateway.random, gateway.health, gateway.clock.seconds())
        best: UpstreamError | None = None
        for index, deployment in enumerate(deployments):
            try:
                reply = await self._ask(deployment)
            except UpstreamError as error:
                # The upstream's own answer tells a client more than the gateway's words about another.
                best = error if best is None or error.answer is not None or best.answer is None else best
                if error.final or index + 1 == len(deployments):
                    raise best from None
                gateway.metrics.fell_back(deployment.provider.name, error.slug)
            else:
                # Nobody is asked again: a stream may last for hours, and the body may have megabytes.
                self._body = None
                return reply
        raise AssertionError("the registry gave no candidates")

    async def _ask(self, deployment: Deployment) -> Reply:
        """Ask one deployment, again where that may help."""
        gateway, first_asked_at, tries = self._gateway, self._gateway.clock.seconds(), 0
        while True:
            tries += 1
            try:
                return await self._attempt(deployment)
            except UpstreamError as error:
                now = gateway.clock.seconds()
                gateway.health.failed(deployment.name, now, error.retry_after_seconds)
                gateway.hooks.failed(self._context, error)
                delay = delay_before_retry(deployment, tries, now - first_asked_at, error, gateway.random)
                if delay is None or error.final:
                    raise
                gateway.metrics.retried(deployment.provider.name, error.slug)
                await deferLater(gateway.clock, delay)

    async def _attempt(self, deployment: Deployment) -> Reply:
        if self._abandoned():
            raise CancelledError
        gateway, context = self._gateway, self._context
        context.provider, context.upstream_model = deployment.provider.name, deployment.upstream_model
        self.vendor = deployment.provider.kind
        asks_for_usage, call = self._call(deployment)
        if gateway.books is not None:
            gateway.books.reserve(context, self._registry.prices.find(self.vendor, call.model, context.model))
        attempt = Attempt(
            context,
            self._operation,
            deployment,
            gateway.clock,
            self.patience,
            gateway.hooks,
            hide_usage=asks_for_usage,
        )
        began_at, error = gateway.clock.seconds(), None
        try:
            reply = await attempt.reply(call)
        except UpstreamError as failure:
            error = failure.slug
            failure.fidelity = self.fidelity
            raise
        except CancelledError:
            error = "cancelled"
            if self._abandoned():
                raise
            raise ConnectionBroken("the provider gave up by itself") from None
        finally:
            self._note_attempt(attempt, began_at, error)
        self._deployment = deployment
        return reply

    def _call(self, deployment: Deployment) -> tuple[bool, Call]:
        """Return whether usage is asked for in the client's place, and what to send."""
        body = self._body
        assert body is not None, "it is needed until somebody has answered"
        edits = body.renaming(deployment.upstream_model)
        usage_edits: list[bodies.Edit] = []
        if self._context.stream and self._gateway.inject_stream_usage:
            usage_edits = self._operation.dialect.ask_for_usage(body)
        data = bodies.splice(body.data, [*edits, *usage_edits])
        self.fidelity = b"verbatim" if data is body.data else b"spliced"
        call = Call(
            operation=self._operation.name,
            dialect=self._operation.dialect.name,
            model=deployment.upstream_model,
            stream=self._context.stream,
            query=self._context.query,
            headers=self._context.headers,
            body=data,
        )
        return bool(usage_edits), call

    def _note_attempt(self, attempt: Attempt, began_at: float, error: str | None) -> None:
        now = self._gateway.clock.seconds()
        self.attempts.append(
            values.Attempt(
                provider=self._context.provider,
                model=self._context.upstream_model,
                status=attempt.status,
                error=error,
                started_after_seconds=began_at - self._context.started_at,
                duration_seconds=now - began_at,
            )
        )
        self.usage = attempt.reader.usage

    def ended(self, reply: Reply, end: End) -> None:
        """
        Note how the answer ended.

        A deployment that breaks what it begins is no healthier than one that does not begin.  An answer that
        its client or a stop of the gateway cut short says nothing of it.
        """
        self.usage = reply.reader.usage
        assert self._deployment is not None, "what replied was asked"
        health, name = self._gateway.health, self._deployment.name
        if end.reason == "complete":
            health.succeeded(name)
        elif end.error is not None and not isinstance(end.error, ShuttingDown):
            health.failed(name, self._gateway.clock.seconds())
