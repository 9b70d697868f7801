"""
One request's life, top to bottom.

Read, guard, look in the cache, ask the deployments, relay, settle: `run` tells it in that order, and
whatever happens on the way, `_settle` is its last line.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from crabtwist import body as bodies
from crabtwist import values
from crabtwist.attempt import Attempt, Reply
from crabtwist.dialects.operations import Operation
from crabtwist.downstream import FIDELITY, Downstream, refusal_answer
from crabtwist.errors import ConnectionBroken, Refusal, ShuttingDown, UpstreamError, internal_error
from crabtwist.headers import upward
from crabtwist.keys import VirtualKey, allows
from crabtwist.plain_relay import PlainRelay
from crabtwist.relay import CLIENT_LEFT, End
from crabtwist.retry import delay_before_retry
from crabtwist.routing import Deployment, Registry, order
from crabtwist.surroundings import Surroundings
from crabtwist.values import Answer, Call, Context, EndedBy, Outcome, Usage

_log = Logger()

#: A stop lasts seconds; another node, or the next process, will answer by then.
STOPPING_RETRY_AFTER_SECONDS = 1


class Exchange:
    """
    One request, its attempts, its answer and its outcome.

    `request` is the client's (`crabtwist.gateway_request.GatewayRequest`), its body read; `key` is
    who asks.  `registry` is read once, by whoever makes this, so a reload in the middle changes nothing
    for it.
    """

    def __init__(
        self,
        gateway: Surroundings,
        registry: Registry,
        operation: Operation,
        request: Any,
        key: VirtualKey | None,
        request_id: str,
    ) -> None:
        self.context = Context(
            request_id=request_id,
            operation=operation.name,
            dialect=operation.dialect.name,
            model_asked="",
            model="",
            principal=key.name if key else None,
            stream=False,
            started_at=gateway.clock.seconds(),
            body_bytes=len(request.body),
        )
        self.outcome: Outcome | None = None
        self.model_known = False
        self._gateway = gateway
        self.registry = registry
        self._operation = operation
        self._request = request
        self._key = key
        self._client = Downstream(request, gateway.clock, request_id, self.context.answer_headers)
        self._attempts: list[values.Attempt] = []
        self._reply: Reply | None = None
        self._usage: Usage | None = None
        self._model_answered: str | None = None
        self._cache_hit = False
        self._fidelity = b"verbatim"
        self._vendor = ""
        self._interrupted: ShuttingDown | None = None
        self._running: Deferred[None] | None = None

    def start(self) -> Deferred[None]:
        """
        Run it.

        The Deferred fires when it has ended, and never fails; cancelling it is the client leaving.
        """
        self._running = Deferred.fromCoroutine(self.run())
        return self._running

    def interrupt(self, message: str) -> None:
        """End it now, telling the client why."""
        self._interrupted = ShuttingDown(message)
        if self._reply is not None:
            self._reply.relay.interrupt(self._interrupted)
        elif self._running is not None:
            self._running.cancel()

    async def run(self) -> None:
        """Tell the whole story."""
        ended_by: EndedBy = "gateway"
        reason, message = "internal_error", None
        try:
            ended_by, reason, message = await self._answer()
        except CancelledError:
            ended_by, reason, message = self._cancelled()
        except Exception as error:
            _log.failure("request {request_id} failed", request_id=self.context.request_id)
            message = type(error).__name__
            self._crashed()
        finally:
            self._settle(ended_by, reason, message)

    async def _answer(self) -> tuple[EndedBy, str, str | None]:
        """Answer, with whatever there is to be said, and return how that ended."""
        try:
            candidates = self._read()
            await self._gateway.hooks.request(self.context)
            answer = await self._gateway.hooks.cached(self.context, self._request.body)
            if answer is None:
                return await self._ask_and_relay(candidates)
            self._cache_hit = True
            self._client.answer(answer)
        except Refusal as refusal:
            self._refuse(refusal)
            return "gateway", refusal.slug, refusal.message
        except UpstreamError as error:
            self._give_up(error)
            return "upstream", error.slug, error.message
        return "gateway", "complete", None

    # Reading.

    def _read(self) -> list[Deployment]:
        """Learn what is asked for, and who could answer; raises `Refusal`."""
        self._body = bodies.read(self._request.body, self._gateway.max_json_depth)
        context = self.context
        context.model_asked = self._body.model
        context.model = self.registry.resolve(self._body.model)
        context.stream = self._body.stream and self._operation.streams
        context.max_tokens = self._body.max_tokens
        self.model_known = context.model in self.registry.models
        candidates = self.registry.candidates(context.model_asked, self._operation)
        if self._key is not None and not allows(self._key, context.model_asked, context.model):
            raise Refusal(
                403,
                "model_not_allowed",
                f"key {self._key.name!r} may not use model {context.model_asked!r}",
            )
        find = self.registry.prices.find
        context.prices = tuple(find(d.provider.kind, d.upstream_model, context.model) for d in candidates)
        return candidates

    # Asking.

    async def _ask_and_relay(self, candidates: list[Deployment]) -> tuple[EndedBy, str, str | None]:
        gateway = self._gateway
        deployments = order(candidates, gateway.random, gateway.health, gateway.clock.seconds())
        best: UpstreamError | None = None
        for index, deployment in enumerate(deployments):
            try:
                return await self._relay(await self._ask(deployment))
            except UpstreamError as error:
                # The upstream's own answer tells a client more than the gateway's words about another.
                best = error if best is None or error.answer is not None or best.answer is None else best
                if error.final or index + 1 == len(deployments):
                    raise best from None
                gateway.metrics.fell_back(deployment.provider.name, error.slug)
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
                gateway.hooks.failed(self.context, error)
                delay = delay_before_retry(deployment, tries, now - first_asked_at, error, gateway.random)
                if delay is None or error.final:
                    raise
                gateway.metrics.retried(deployment.provider.name, error.slug)
                await deferLater(gateway.clock, delay)

    @property
    def _abandoned(self) -> bool:
        """Whether nobody waits any more; a guard or a provider may have swallowed the order to stop."""
        return self._interrupted is not None or not self._client.open

    async def _attempt(self, deployment: Deployment) -> Reply:
        if self._abandoned:
            raise CancelledError
        gateway, context = self._gateway, self.context
        context.provider, context.upstream_model = deployment.provider.name, deployment.upstream_model
        self._vendor = deployment.provider.kind
        asks_for_usage, call = self._call(deployment)
        if gateway.books is not None:
            gateway.books.reserve(context, self.registry.prices.find(self._vendor, call.model, context.model))
        attempt = Attempt(
            context,
            self._operation,
            deployment,
            gateway.clock,
            gateway.patience,
            gateway.hooks,
            hide_usage=asks_for_usage,
        )
        began_at, error = gateway.clock.seconds(), None
        try:
            reply = await attempt.reply(call)
        except UpstreamError as failure:
            error = failure.slug
            failure.fidelity = self._fidelity
            raise
        except CancelledError:
            error = "cancelled"
            if self._abandoned:
                raise
            raise ConnectionBroken("the provider gave up by itself") from None
        finally:
            self._note_attempt(attempt, began_at, error)
        self._deployment = deployment
        return reply

    def _call(self, deployment: Deployment) -> tuple[bool, Call]:
        """Return whether usage is asked for in the client's place, and what to send."""
        edits = self._body.renaming(deployment.upstream_model)
        usage_edits: list[bodies.Edit] = []
        if self.context.stream and self._gateway.inject_stream_usage:
            usage_edits = self._operation.dialect.ask_for_usage(self._body)
        data = bodies.splice(self._body.data, [*edits, *usage_edits])
        self._fidelity = b"verbatim" if data is self._body.data else b"spliced"
        call = Call(
            operation=self._operation.name,
            dialect=self._operation.dialect.name,
            model=deployment.upstream_model,
            stream=self.context.stream,
            query=self._request.query,
            headers=upward(self._request.fields),
            body=data,
        )
        return bool(usage_edits), call

    def _note_attempt(self, attempt: Attempt, began_at: float, error: str | None) -> None:
        now = self._gateway.clock.seconds()
        self._attempts.append(
            values.Attempt(
                provider=self.context.provider,
                model=self.context.upstream_model,
                status=attempt.status,
                error=error,
                started_after_seconds=began_at - self.context.started_at,
                duration_seconds=now - began_at,
            )
        )
        self._usage = attempt.reader.usage

    # Relaying.

    async def _relay(self, reply: Reply) -> tuple[EndedBy, str, str | None]:
        relay = reply.relay
        if self._abandoned:
            relay.stop()
            raise CancelledError
        self._reply = reply
        length = relay.length if isinstance(relay, PlainRelay) else None
        self._client.start(reply.status, (*reply.headers, (FIDELITY, self._fidelity)), length)
        self._client.flush_head()
        relay.flow(self._client)
        if reply.streamed:
            self._gateway.metrics.open_streams.inc()
        try:
            end = relay.end or await relay.done
        except CancelledError:
            relay.stop()
            end = CLIENT_LEFT
        finally:
            if reply.streamed:
                self._gateway.metrics.open_streams.dec()
        return self._relayed(reply, end)

    def _relayed(self, reply: Reply, end: End) -> tuple[EndedBy, str, str | None]:
        self._model_answered = reply.reader.model
        self._usage = reply.reader.usage
        self._note_health(end)
        if end.error is not None:
            self._gateway.hooks.failed(self.context, end.error)
            return end.ended_by, end.reason, end.error.message
        if end.reason == "complete" and reply.status >= 400:
            return "upstream", "upstream_status", None
        if end.reason == "complete":
            self._show_answer(reply)
        return end.ended_by, end.reason, None

    def _show_answer(self, reply: Reply) -> None:
        gateway = self._gateway
        copy = reply.relay.copy if isinstance(reply.relay, PlainRelay) else None
        if copy is None or not gateway.hooks.want_answers:
            return
        # The relay has copied a small answer whatever the limit is.
        if len(copy) <= gateway.patience.max_answer_copy_bytes:
            gateway.hooks.responded(
                self.context, self._request.body, Answer(reply.status, reply.headers, copy)
            )

    def _note_health(self, end: End) -> None:
        """
        A deployment that breaks what it begins is no healthier than one that does not begin.

        An answer that its client or a stop of the gateway cut short says nothing of it.
        """
        health, name = self._gateway.health, self._deployment.name
        if end.reason == "complete":
            health.succeeded(name)
        elif end.error is not None and end.error is not self._interrupted:
            health.failed(name, self._gateway.clock.seconds())

    # Ending otherwise.

    def _refuse(self, refusal: Refusal) -> None:
        self._gateway.metrics.refused(refusal.slug)
        self._client.answer(refusal_answer(refusal, self._operation.dialect, self.context.request_id))

    def _give_up(self, error: UpstreamError) -> None:
        if error.answer is not None:
            headers = (*error.answer.headers, (FIDELITY, error.fidelity))
            self._client.answer(evolve(error.answer, headers=headers))
        else:
            refusal = Refusal(error.status, error.slug, error.message)
            self._client.answer(refusal_answer(refusal, self._operation.dialect, self.context.request_id))

    def _cancelled(self) -> tuple[EndedBy, str, str | None]:
        if self._interrupted is None and self._client.open:
            # An extension or a provider gave up by itself; the client still waits for an answer.
            _log.failure("request {request_id} was cancelled", request_id=self.context.request_id)
            self._crashed()
            return "gateway", "internal_error", "CancelledError"
        if self._interrupted is None:
            return "client", "client_left", None
        why = self._interrupted
        headers = {"retry-after": str(STOPPING_RETRY_AFTER_SECONDS)}
        refusal = Refusal(why.status, why.slug, why.message, headers=headers)
        self._refuse(refusal)
        return "gateway", refusal.slug, refusal.message

    def _crashed(self) -> None:
        """Say that the fault is the gateway's own: properly if nothing was said yet, else by a cut."""
        if self._reply is not None:
            self._reply.relay.stop()
        if self._client.status is None:
            self._refuse(internal_error())
        else:
            self._client.abort()

    # Settling.

    def _settle(self, ended_by: EndedBy, reason: str, message: str | None) -> None:
        usage = None if self._cache_hit else self._usage
        context = self.context
        # Of what was asked and never counted nobody can tell what it costs; what was never asked is free.
        price, cost = None, None if self._attempts else 0
        if usage is not None:
            model = self._model_answered or context.upstream_model
            price, cost = self.registry.prices.cost(usage, self._vendor, model, context.model)
        started_at, now = self.context.started_at, self._gateway.clock.seconds()
        first_byte_at = self._client.first_byte_at
        self.outcome = Outcome(
            status=self._status(reason),
            ended_by=ended_by,
            reason=reason,
            message=message,
            usage=usage,
            attempts=tuple(self._attempts),
            model_answered=self._model_answered,
            first_byte_seconds=None if first_byte_at is None else first_byte_at - started_at,
            duration_seconds=now - started_at,
            bytes_in=len(self._request.body),
            bytes_out=self._client.bytes_out,
            cache_hit=self._cache_hit,
            cost=cost,
            price=price,
        )

    def _status(self, reason: str) -> int:
        if reason == "client_left" or self._client.status is None:
            return 499
        relay = self._reply.relay if self._reply is not None else None
        whole = relay is None or (relay.end is not None and relay.end.reason == "complete")
        return self._client.status if whole else 0
