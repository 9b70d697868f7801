"""What the mock upstream is told to do, and the load generator; both are C programs, options and all."""

from __future__ import annotations

from urllib.parse import urlencode

import attrs


@attrs.frozen(kw_only=True)
class Behavior:
    """
    How the upstream answers everybody; see the head of upstream.c.

    `interval_us` 0 sends events back to back, one write each.  `fail_status` 0 fails nothing; otherwise each
    request is answered with that status the first time, and as usual the second.
    """

    stream: bool = False
    events: int = 10
    interval_us: int = 0
    text_bytes: int = 20
    delay_us: int = 0
    fail_status: int = 0

    def query(self) -> str:
        """Return it as the upstream's control path takes it."""
        return urlencode({name: int(value) for name, value in attrs.asdict(self).items()})


@attrs.frozen(kw_only=True)
class Load:
    """
    What clients do; see the head of load.c.

    `period_us` 0 is a closed loop: each connection asks again when it was answered.  Otherwise each asks once
    a period, and what is late counts from when it was to be sent.  `read_bytes` at a time, each
    `read_every_us`, is what a slow reader reads; 0: all, at once.  `events` is what a whole stream has.
    """

    connections: int = 1
    period_us: int = 0
    spread_us: int = 0
    read_bytes: int = 0
    read_every_us: int = 0
    receive_buffer: int = 0
    events: int = 0

    def words(self) -> list[str]:
        """Return it as the load generator's command line takes it."""
        return [f"{name}={value}" for name, value in attrs.asdict(self).items()]
