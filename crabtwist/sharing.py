"""One answer for all who ask the same: the first of them leads, and every one follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from attrs import evolve
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.web.iweb import IResponse

from crabtwist.attempt import Patience, Reply
from crabtwist.dialects.operations import Operation
from crabtwist.dispatch import Dispatch
from crabtwist.downstream import FIDELITY
from crabtwist.errors import ConnectionBroken
from crabtwist.plain_relay import PlainRelay
from crabtwist.recording import Recording
from crabtwist.relay import CLIENT_LEFT, COMPLETE, End, Relay, RelayLimits
from crabtwist.routing import Deployment
from crabtwist.stream_relay import StreamRelay
from crabtwist.surroundings import Surroundings
from crabtwist.values import Answer, Context

_log = Logger()


class Lead:
    """
    Asks for all who follow a recording, until the answer has ended or everybody has left.

    It goes on when the request that it began for has left.  `heard` is called once, with the upstream's
    answer and how it ended, if there was one.
    """

    def __init__(self, recording: Recording, dispatch: Dispatch, heard: Callable[[Reply, End], None]) -> None:
        self.recording = recording
        self._dispatch = dispatch
        self._heard = heard
        self._running: Deferred[None] | None = None
        self._awaited: Deferred[None] | None = None
        # Each reader's own relay minds that it reads, and leaves if it does not.
        dispatch.patience = _without_stall(dispatch.patience)

    def begin(self, candidates: list[Deployment]) -> None:
        """Ask; whoever does so follows the recording already."""
        self.recording.lead(self._deserted)
        self._running = Deferred.fromCoroutine(self._lead(candidates))
        self._running.addBoth(self._ended)

    async def ended(self) -> None:
        """Wait until it has ended, whatever cancels the waiting."""
        while self._running is not None:
            self._awaited = Deferred()
            with suppress(CancelledError):
                await self._awaited

    def _ended(self, _result: object) -> None:
        self._running = None
        if self._awaited is not None:
            self._awaited.callback(None)

    def _deserted(self) -> None:
        if self._running is not None:
            self._running.cancel()

    async def _lead(self, candidates: list[Deployment]) -> None:
        recording = self.recording
        try:
            reply = await self._dispatch.reply(candidates)
            end = await self._pour(reply)
            self._heard(reply, end)
        except CancelledError:
            recording.fail(ConnectionBroken("nobody waited for the answer any more"))
        except Exception as error:
            # Before the head every follower says so of itself.
            if recording.status:
                _log.failure("an answer that is shared failed")
            recording.fail(error)
        else:
            # Whoever is told the answer by this has nothing more to wait for.
            self._running = None
            recording.settle(complete=end is COMPLETE and reply.status == 200)

    async def _pour(self, reply: Reply) -> End:
        """Pour an answer into the recording; returns how it ended."""
        relay, recording = reply.relay, self.recording
        headers, body = (*reply.headers, (FIDELITY, self._dispatch.fidelity)), reply.whole
        if body is not None:
            recording.take(Answer(reply.status, headers, body))
            return COMPLETE
        recording.begin(reply.status, headers, reply.length, streamed=reply.streamed)
        relay.flow(recording)
        try:
            # Those who left while this ran found nothing to cancel.
            if relay.end is None and not recording.deserted:
                await relay.done
        except CancelledError:
            pass
        # After its last event a stream is whole, though its upstream has not ended it.
        whole = reply.reader.finished and reply.reader.error is None
        relay.stop(COMPLETE if whole else CLIENT_LEFT)
        assert relay.end is not None, "it has just been stopped"
        return relay.end


@lru_cache(maxsize=8)
def _without_stall(patience: Patience) -> Patience:
    return evolve(patience, client_stall_seconds=math.inf)


def share(
    recording: Recording,
    response: IResponse,
    gateway: Surroundings,
    operation: Operation,
    context: Context,
) -> Reply:
    """Return what is recorded as one request's own answer; `response` is what following it gave."""
    patience, reader = gateway.patience, operation.dialect.reader(hide_usage=False)
    # Whoever leads minds the upstream's silence.
    limits = RelayLimits(math.inf, patience.client_stall_seconds, patience.ping_seconds)
    relay: Relay
    if recording.streamed:
        relay = StreamRelay(
            response,
            gateway.clock,
            limits,
            dialect=operation.dialect,
            reader=reader,
            request_id=context.request_id,
            max_event_bytes=patience.max_event_bytes,
        )
    else:
        relay = PlainRelay(response, gateway.clock, limits, reader=reader if operation.counts else None)
    relay.open()
    return Reply(recording.status, recording.headers, relay, reader)
