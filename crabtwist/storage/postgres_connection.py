"""What a connection of psycopg's cannot do by itself: notice its end, be woken, complain in one line."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from typing import Any

import psycopg

Connection = psycopg.Connection[tuple[Any, ...]]


def is_stale(connection: Connection) -> bool:
    """Say whether the server has hung up, or was about to, while nobody used the connection."""
    # A server that was asked nothing says nothing, but for its last words and the end.
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def hang_up(connection: Connection) -> None:
    """Wake the thread that waits on the connection; closing it from here would not."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)


def words(error: psycopg.Error) -> str:
    """Return what an error says."""
    return " ".join(str(error).split()) or type(error).__name__
