"""What an exchange needs of the gateway that it runs in."""

from __future__ import annotations

from random import Random
from typing import Protocol

from twisted.internet.interfaces import IReactorTime

from crabtwist.attempt import Patience
from crabtwist.bookkeeping import Bookkeeping
from crabtwist.health import Health
from crabtwist.hooks import Hooks
from crabtwist.metrics import Metrics


class Surroundings(Protocol):
    """The gateway, as one of its exchanges sees it."""

    clock: IReactorTime
    random: Random
    hooks: Hooks
    health: Health
    metrics: Metrics
    patience: Patience
    max_json_depth: int
    inject_stream_usage: bool
    books: Bookkeeping | None
