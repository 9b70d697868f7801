"""
Real servers for the tests: Redis and PostgreSQL from Debian's packages, on loopback, on free ports.

Each lives in a temporary directory and is ended by the ids of its processes, at the latest when this
process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

START_SECONDS = 30.0

_POSTGRES_USER = "postgres"


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def redis_program() -> str | None:
    """Return the path of Redis, None where the package is missing."""
    return shutil.which("redis-server")


def postgres_programs() -> Path | None:
    """Return the folder of PostgreSQL's newest programs, which Debian keeps off the path."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    on_path = shutil.which("initdb")
    newest = max(found, key=lambda path: float(path.parts[-3]), default=None)
    return newest.parent if newest else Path(on_path).parent if on_path else None


class Server:
    """A server process with its children: `start`, then what a test does to it, `kill` at last."""

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="crabtwist-server-"))
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)

    @property
    def command(self) -> list[str]:
        """What runs it in the foreground."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """Whom it runs as, for `subprocess`."""
        return {}

    def answers(self) -> bool:
        """Say whether it can be used."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it, on the same port and data as before, and wait until it can be used."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/", **self.identity
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no server:\n{(self.directory / 'log').read_text()}")
            time.sleep(0.02)

    def pause(self) -> None:
        """Stop it in its tracks: it keeps its connections and says nothing any more."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a power cut would, children and all."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Leave nothing behind."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "not started"
        # The parent first: it would replace the children, or mourn them.
        for pid in (self._process.pid, *_children(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in text.split()]


class RedisServer(Server):
    """Redis, with a password, keeping what it has when it is killed."""

    password = "p@ss:w/rd?"
    quoted_password = "p%40ss:w%2Frd%3F"

    @property
    def url(self) -> str:
        """How to reach its first database."""
        return f"redis://:{self.quoted_password}@127.0.0.1:{self.port}/0"

    @property
    def command(self) -> list[str]:
        """What runs it in the foreground."""
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.directory),
            "requirepass": self.password,
            "appendonly": "yes",
            "save": "",
        }
        return [str(redis_program()), *(word for name in options for word in (f"--{name}", options[name]))]

    def answers(self) -> bool:
        """Say whether it can be used."""
        return b"PONG" in self.say(b"PING")

    def say(self, *commands: bytes) -> bytes:
        """Send commands as a person would type them, and return what comes back; "" if nobody is there."""
        lines = b"\r\n".join([b"AUTH " + self.password.encode(), *commands, b"QUIT", b""])
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(lines)
                return b"".join(iter(lambda: connection.recv(65536), b""))
        except OSError:
            return b""


class PostgresServer(Server):
    """PostgreSQL, with a password; it refuses to run as root, and becomes Debian's `postgres` then."""

    password = "p@ss:w/rd?"
    quoted_password = "p%40ss%3Aw%2Frd%3F"

    def __init__(self) -> None:
        super().__init__()
        programs = postgres_programs()
        assert programs is not None, "no PostgreSQL here"
        self._programs = programs
        password_file = self.directory / "password"
        password_file.write_text(self.password)
        if os.geteuid() == 0:
            for path in (self.directory, password_file):
                shutil.chown(path, _POSTGRES_USER, _POSTGRES_USER)
        self._initialise(password_file)

    def _initialise(self, password_file: Path) -> None:
        subprocess.run(
            [
                *(str(self._programs / "initdb"), "--pgdata", str(self._data), "--username=gateway"),
                *("--auth=scram-sha-256", f"--pwfile={password_file}", "--no-sync", "--encoding=UTF8"),
                *("--locale=C", "--no-instructions"),
            ],
            check=True,
            capture_output=True,
            cwd="/",
            **self.identity,
        )

    @property
    def dsn(self) -> str:
        """How to reach it."""
        return f"postgresql://gateway:{self.quoted_password}@127.0.0.1:{self.port}/postgres"

    @property
    def identity(self) -> dict[str, Any]:
        """Whom it runs as."""
        as_postgres = {"user": _POSTGRES_USER, "group": _POSTGRES_USER, "extra_groups": []}
        return as_postgres if os.geteuid() == 0 else {}

    @property
    def command(self) -> list[str]:
        """What runs it in the foreground."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            # Its processes die in these tests, the machine does not.
            "fsync": "off",
        }
        settings = [word for name in options for word in ("-c", f"{name}={options[name]}")]
        return [str(self._programs / "postgres"), "-D", str(self._data), *settings]

    def answers(self) -> bool:
        """Say whether it can be used."""
        command = [str(self._programs / "pg_isready"), "--quiet", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0

    @property
    def _data(self) -> Path:
        return self.directory / "data"


@cache
def redis() -> RedisServer:
    """Return the Redis of this process, started at the first call."""
    server = RedisServer()
    server.start()
    return server


@cache
def postgres() -> PostgresServer:
    """Return the PostgreSQL of this process, started at the first call."""
    server = PostgresServer()
    server.start()
    return server
