"""
One request's life, top to bottom.

Read, guard, look in the cache, ask the deployments, relay, settle: `run` tells it in that order, and
whatever happens on the way, `_settle` is its last line.  Where a cache has several share an answer, the
first of them leads: it asks for all, and stays until there is nobody left to ask for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from attrs import evolve
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from crabtwist import body as bodies
from crabtwist.attempt import Reply
from crabtwist.charges import may_be_billed
from crabtwist.dialects.operations import Operation
from crabtwist.dispatch import Dispatch
from crabtwist.downstream import FIDELITY, Downstream, refusal_answer
from crabtwist.errors import Refusal, ShuttingDown, UpstreamError, internal_error
from crabtwist.headers import upward
from crabtwist.keys import VirtualKey, allows
from crabtwist.money import PriceRow
from crabtwist.plain_relay import PlainRelay
from crabtwist.recording import Recording
from crabtwist.relay import CLIENT_LEFT, COMPLETE, End
from crabtwist.routing import Deployment, Registry
from crabtwist.sharing import Lead, share
from crabtwist.surroundings import Surroundings
from crabtwist.values import Answer, Context, EndedBy, Headers, Outcome

_log = Logger()

#: A stop lasts seconds; another node, or the next process, will answer by then.
STOPPING_RETRY_AFTER_SECONDS = 1

#: Who ended it, why, and what was said of it.
_Ending = tuple[EndedBy, str, str | None]


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
            limits=key.limits if key else None,
            budget=key.budget if key else None,
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
        self._dispatch: Dispatch | None = None
        self._lead: Lead | None = None
        self._reply: Reply | None = None
        self._model_answered: str | None = None
        self._cache_hit = False
        self._interrupted: ShuttingDown | None = None
        #: How it ended for the client, where it goes on for others.
        self._told: _Ending | None = None
        self._running: Deferred[None] | None = None

    def start(self) -> Deferred[None]:
        """Run it; the Deferred fires when it has ended, and never fails."""
        running = Deferred.fromCoroutine(self.run())
        if self.outcome is None:
            self._running = running
        return running

    def leave(self) -> None:
        """End it for a client that has left: at once, unless others wait for the same answer."""
        if self._lead is not None and self._lead.asks:
            self._told = self._told or ("client", "client_left", None)
            self._lead.leave()
        else:
            self._cancel()

    def interrupt(self, message: str) -> None:
        """End it now, telling the client why."""
        self._interrupted = ShuttingDown(message)
        if self._reply is not None:
            self._reply.relay.interrupt(self._interrupted)
        elif self._lead is not None and self._lead.asks:
            self._told = self._told or self._cancelled()
            self._lead.leave()
        else:
            self._cancel()

    def _cancel(self) -> None:
        if self._running is not None:
            self._running.cancel()

    async def run(self) -> None:
        """Tell the whole story."""
        ended_by: EndedBy = "gateway"
        reason, message = "internal_error", None
        try:
            ended_by, reason, message = await self._answer()
        except CancelledError:
            ended_by, reason, message = self._told or self._cancelled()
        except Exception as error:
            _log.failure("request {request_id} failed", request_id=self.context.request_id)
            message = type(error).__name__
            self._crashed()
        finally:
            if self._lead is not None:
                # Whoever asked pays, and how much is known at the end.
                await self._lead.ended()
            self._settle(ended_by, reason, message)
            # These refer back, and would be there until Python looks for such garbage.
            self._dispatch = self._lead = self._running = None

    async def _answer(self) -> _Ending:
        """Answer, with whatever there is to be said, and return how that ended."""
        try:
            candidates, dispatch = self._read()
            await self._gateway.hooks.request(self.context)
            found = await self._gateway.hooks.cached(self.context, self._request.body)
            if isinstance(found, Recording) and (found.open or not found.led):
                return await self._share(found, candidates, dispatch)
            if isinstance(found, Answer):
                self._cache_hit = True
                return self._give(found)
            return await self._relay(await dispatch.reply(candidates), dispatch)
        except Refusal as refusal:
            self._refuse(refusal)
            return "gateway", refusal.slug, refusal.message
        except UpstreamError as error:
            self._give_up(error)
            return "upstream", error.slug, error.message

    # Reading.

    def _read(self) -> tuple[list[Deployment], Dispatch]:
        """Learn what is asked for, and who could answer; raises `Refusal`."""
        body = bodies.read(self._request.body, self._gateway.max_json_depth)
        context = self.context
        context.model_asked = body.model
        context.model = self.registry.resolve(body.model)
        context.stream = body.stream and self._operation.streams
        context.max_tokens, context.choices = body.max_tokens, body.choices
        context.query = self._request.query
        context.headers = upward(self._request.fields)
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
        self._dispatch = Dispatch(
            self._gateway, self.registry, self._operation, context, body, self._nobody_waits
        )
        return candidates, self._dispatch

    @property
    def _abandoned(self) -> bool:
        """Whether this client waits no more."""
        return self._interrupted is not None or not self._client.open

    def _nobody_waits(self) -> bool:
        return self._abandoned if self._lead is None else self._lead.recording.deserted

    # Relaying.

    async def _relay(self, reply: Reply, dispatch: Dispatch) -> _Ending:
        headers, whole = (*reply.headers, (FIDELITY, dispatch.fidelity)), reply.whole
        if whole is not None:
            told = self._give(Answer(reply.status, headers, whole))
            self._heard(dispatch, reply, COMPLETE)
            return told
        end = await self._pour(reply, headers)
        self._heard(dispatch, reply, end)
        return _told(reply, end)

    async def _pour(self, reply: Reply, headers: Headers) -> End:
        """Relay an answer to the client; returns how it ended."""
        relay = reply.relay
        if self._abandoned:
            relay.stop()
            raise CancelledError
        self._reply = reply
        self._client.start(reply.status, headers, reply.length)
        relay.flow(self._client)
        self._client.flush()
        if reply.streamed:
            self._gateway.metrics.open_streams.inc()
            # What was asked has been sent; see `Dispatch`.
            self._request.body = b""
        try:
            return relay.end or await relay.done
        except CancelledError:
            relay.stop()
            return CLIENT_LEFT
        finally:
            if reply.streamed:
                self._gateway.metrics.open_streams.dec()

    def _heard(self, dispatch: Dispatch, reply: Reply, end: End) -> None:
        """Take down what an upstream's answer says, whoever it is for, and show it to the watchers."""
        self._model_answered = reply.reader.model
        dispatch.ended(reply, end)
        gateway = self._gateway
        if end.error is not None:
            gateway.hooks.failed(self.context, end.error)
            return
        copy = reply.relay.copy if isinstance(reply.relay, PlainRelay) else None
        if end.reason != "complete" or reply.status >= 400 or copy is None or not gateway.hooks.want_answers:
            return
        # The relay has copied a small answer whatever the limit is.
        if len(copy) <= gateway.patience.max_answer_copy_bytes:
            gateway.hooks.responded(
                self.context, self._request.body, Answer(reply.status, reply.headers, copy)
            )

    async def _share(self, recording: Recording, candidates: list[Deployment], dispatch: Dispatch) -> _Ending:
        """Give an answer that others are given too; the first has to ask for it."""
        if self._abandoned:
            raise CancelledError
        if recording.led:
            self._cache_hit = True
            found = await recording.follow()
        else:
            self._lead = Lead(recording, dispatch, partial(self._heard, dispatch), self._cancel)
            try:
                asked = await self._lead.ask(candidates)
            except UpstreamError:
                if self._told is None:
                    raise
                return self._told
            if self._told is not None:
                return self._told
            assert asked is not None, "it has not left"
            found = asked if isinstance(asked, Answer) else await asked
        if isinstance(found, Answer):
            return self._give(found)
        try:
            reply = share(recording, found, self._gateway, self._operation, self.context)
            end = await self._pour(reply, reply.headers)
        finally:
            # Whatever went wrong, the others do not wait for who reads no more.
            found.stopProducing()
        self._model_answered = self._model_answered or reply.reader.model
        return _told(reply, end)

    def _give(self, answer: Answer) -> _Ending:
        """Give a plain answer that is whole: nothing of it has to be waited for."""
        if self._abandoned:
            raise CancelledError
        self._client.answer(answer)
        if self._cache_hit and self._operation.counts:
            reader = self._operation.dialect.reader(hide_usage=False)
            reader.body(answer.body)
            self._model_answered = reader.model
        return "upstream", "upstream_status" if answer.status >= 400 else "complete", None

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

    def _cancelled(self) -> _Ending:
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
        context, dispatch = self.context, self._dispatch
        attempts = () if dispatch is None else tuple(dispatch.attempts)
        usage = None if dispatch is None else dispatch.usage
        # Of what was answered and never counted nobody can tell what it costs; the rest is free.
        billable = self._operation.counts and any(map(may_be_billed, attempts))
        price, cost = None, None if billable else 0
        others: dict[str, PriceRow] = {}
        if dispatch is not None and usage is not None:
            model = self._model_answered or context.upstream_model
            prices = self.registry.prices
            price, cost = prices.cost(usage, dispatch.vendor, model, context.model)
            others = prices.named_in(usage, dispatch.vendor)
        started_at, now = self.context.started_at, self._gateway.clock.seconds()
        first_byte_at = self._client.first_byte_at
        self.outcome = Outcome(
            status=self._status(reason),
            ended_by=ended_by,
            reason=reason,
            message=message,
            usage=usage,
            attempts=attempts,
            model_answered=self._model_answered,
            first_byte_seconds=None if first_byte_at is None else first_byte_at - started_at,
            duration_seconds=now - started_at,
            bytes_in=self.context.body_bytes,
            bytes_out=self._client.bytes_out,
            cache_hit=self._cache_hit,
            cost=cost,
            price=price,
            other_prices=others,
        )

    def _status(self, reason: str) -> int:
        if reason == "client_left" or self._client.status is None:
            return 499
        relay = self._reply.relay if self._reply is not None else None
        whole = relay is None or (relay.end is not None and relay.end.reason == "complete")
        return self._client.status if whole else 0


def _told(reply: Reply, end: End) -> _Ending:
    """Return how an answer ended for the client that it was relayed to."""
    if end.error is not None:
        return end.ended_by, end.reason, end.error.message
    if end.reason == "complete" and reply.status >= 400:
        return "upstream", "upstream_status", None
    return end.ended_by, end.reason, None
