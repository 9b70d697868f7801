"""
Writing to a socket at once, where nothing waits to be written before.

Twisted's transports keep what is written, ask the reactor to tell when the socket takes more, and send at
its next turn.  That gathers writes which follow each other closely, and costs a single one two system calls
and a turn's delay.  Here the socket is asked first; what it does not take goes the transport's own way, with
its back-pressure, and so does all that follows until that has left.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.internet.tcp import Connection

#: A write that comes so soon after another waits for the reactor's turn, to leave together with what follows.
PEACE_SECONDS = 0.005


def send_now(transport: Any, pieces: list[bytes]) -> list[bytes]:
    """
    Send what the socket takes now, and return the rest, which is the transport's to write.

    Nothing is sent where something waits already, where the transport has begun to end, or over TLS and
    what is no socket: those have ways of their own.  An error of the socket is left to the transport to find.
    """
    if not (isinstance(transport, Connection) and _may_send(transport)):
        return pieces
    try:
        sent_bytes = transport.socket.sendmsg(pieces)
    except OSError:
        return pieces
    unsent = []
    for piece in pieces:
        if sent_bytes < len(piece):
            unsent.append(piece[sent_bytes:])
        sent_bytes = max(0, sent_bytes - len(piece))
    return unsent


def _may_send(wire: Any) -> bool:
    # Twisted has no public word for some of this.
    is_empty = not (wire.dataBuffer or wire._tempDataBuffer)  # noqa: SLF001
    is_ending = wire.disconnecting or wire._writeDisconnecting or wire._aborting  # noqa: SLF001
    return bool(wire.connected and is_empty and not is_ending and not wire.TLS)


class DirectWriter:
    """
    What is written to one connection; `clock` tells which writes follow each other closely.

    Those, and what cannot be sent at once, go the transport's own way.
    """

    def __init__(self, transport: Any, clock: IReactorTime) -> None:
        self._transport = transport
        self._clock = clock
        self._written_at = float("-inf")
        self._held = b""

    def hold(self, data: bytes) -> None:
        """Keep something back that leaves with whatever is written next; `write_now` has it leave alone."""
        self._held += data

    def write(self, data: bytes) -> None:
        """Write some of what goes on: at once, or closely after another at the reactor's next turn."""
        now = self._clock.seconds()
        is_in_peace = now - self._written_at >= PEACE_SECONDS
        self._written_at = now
        if is_in_peace:
            self.write_now(data)
        else:
            self._transport.write(self._with_held(data))

    def write_now(self, data: bytes) -> None:
        """Write what somebody waits for, and nothing follows; b"" for what is held alone."""
        data = self._with_held(data)
        for rest in send_now(self._transport, [data]) if data else ():
            self._transport.write(rest)

    def _with_held(self, data: bytes) -> bytes:
        if self._held:
            data, self._held = self._held + data, b""
        return data
