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
from crabtwist.recording_reader import Reader
from crabtwist.relay import CLIENT_LEFT, COMPLETE, End, Relay, RelayLimits
from crabtwist.routing import Deployment
from crabtwist.stream_relay import StreamRelay
from crabtwist.surroundings import Surroundings
from crabtwist.values import Answer, Context, Headers

_log = Logger()


class Lead:
    """
    Asks for all who follow a recording, until the answer has ended or everybody has left.

    It asks within the coroutine of the request that it began for, which may `leave` as long as it `asks`.
    What comes in pieces is poured into the recording beside that one, and goes on when it has left.  `heard`
    is called once, with the upstream's answer and how it ended, if there was one; `deserted` when everybody
    has left while it asks.
    """

    def __init__(
        self,
        recording: Recording,
        dispatch: Dispatch,
        heard: Callable[[Reply, End], None],
        deserted: Callable[[], None],
    ) -> None:
        self.recording = recording
        self.asks = True
        self._has_left = False
        self._dispatch = dispatch
        self._heard = heard
        self._pouring: Deferred[None] | None = None
        self._awaited: Deferred[None] | None = None
        # Each reader's own relay minds that it reads, and leaves if it does not.
        dispatch.patience = _without_stall(dispatch.patience)
        recording.lead(deserted)
        recording.hold()

    def leave(self) -> None:
        """Go on for the others, if there are any."""
        self._has_left = True
        self.recording.let_go()

    async def ask(self, candidates: list[Deployment]) -> Answer | Deferred[Reader | Answer] | None:
        """
        Return the answer if it is here and whole, else what following it gives; None to one who has left.

        Raises what asking raises, of which the others are told too.
        """
        recording = self.recording
        try:
            reply = await self._dispatch.reply(candidates)
            headers = (*reply.headers, (FIDELITY, self._dispatch.fidelity))
            if reply.whole is not None:
                answer = Answer(reply.status, headers, reply.whole)
                recording.take(answer)
                self._heard(reply, COMPLETE)
                recording.settle(complete=reply.status == 200)
                return answer
        except CancelledError:
            recording.fail(ConnectionBroken("nobody waited for the answer any more"))
            raise
        except Exception as error:
            recording.fail(error)
            raise
        finally:
            self.asks = False
        following = None if self._has_left else recording.follow()
        recording.lead(self._stop_pouring)
        recording.let_go()
        self._pouring = Deferred.fromCoroutine(self._pour(reply, headers))
        self._pouring.addBoth(self._poured)
        return following

    async def ended(self) -> None:
        """Wait until it has ended, whatever cancels the waiting."""
        while self._pouring is not None:
            self._awaited = Deferred()
            with suppress(CancelledError):
                await self._awaited

    def _poured(self, _result: object) -> None:
        self._pouring = None
        if self._awaited is not None:
            self._awaited.callback(None)

    def _stop_pouring(self) -> None:
        if self._pouring is not None:
            self._pouring.cancel()

    async def _pour(self, reply: Reply, headers: Headers) -> None:
        """Pour an answer into the recording, as it comes."""
        relay, recording = reply.relay, self.recording
        try:
            recording.begin(reply.status, headers, reply.length, streamed=reply.streamed)
            relay.flow(recording)
            with suppress(CancelledError):
                # Those who left while this ran found nothing to cancel.
                if relay.end is None and not recording.deserted:
                    await relay.done
            # After its last event a stream is whole, though its upstream has not ended it.
            whole = reply.reader.finished and reply.reader.error is None
            relay.stop(COMPLETE if whole else CLIENT_LEFT)
            assert relay.end is not None, "it has just been stopped"
            self._heard(reply, relay.end)
        except Exception as error:
            _log.failure("an answer that is shared failed")
            recording.fail(error)
        else:
            recording.settle(complete=relay.end is COMPLETE and reply.status == 200)


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
