"""A way to a server of the tests that can be made slow."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable


class SlowRoad:
    """Carries bytes to a port of this machine; those that come back wait for `delay_seconds`."""

    def __init__(self, port: int) -> None:
        self.delay_seconds = 0.0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def leads(self, url: str) -> str:
        """Return a server's URL as it is by this road."""
        return url.replace(f":{self._target}/", f":{self.port}/")

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=run, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._connect(self._listener.accept()[0])

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        self._start(self._carry, client, server, False)
        self._start(self._carry, server, client, True)

    def _carry(self, source: socket.socket, target: socket.socket, is_slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay_seconds if is_slow else 0)
                target.sendall(data)
        for end in (source, target):
            # The other thread may wait in it: closing alone would not wake that.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
