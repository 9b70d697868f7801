"""The two C programs: compiled into a folder, and spoken with."""

from __future__ import annotations

import json
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from bench.behavior import Behavior, Load
from bench.processes import Tree, pinned

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")
_READY_SECONDS = 5.0
#: Between two looks at what a candidate takes while it is measured.
_LOOK_SECONDS = 0.25


def compiled(directory: Path) -> dict[str, Path]:
    """Compile both programs; raises `CalledProcessError`, or `FileNotFoundError` without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc); Debian's package is build-essential")
    programs = {name: directory / name for name in ("upstream", "load")}
    for name, program in programs.items():
        subprocess.run([compiler, *_FLAGS, "-o", str(program), str(_SOURCES / f"{name}.c")], check=True)
    return programs


class Upstream:
    """The mock upstream, running."""

    def __init__(self, program: Path, port: int, core: int, directory: Path) -> None:
        self.port = port
        with (directory / "upstream.log").open("wb") as log:
            self.tree = Tree([str(program), str(port)], core, directory, {}, log)
        self._until_ready()

    def _until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                self.counters()
            except OSError:
                if self.tree.ended or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def behave(self, behavior: Behavior) -> None:
        """Let it answer like that from now on."""
        self._get(f"/control?{behavior.query()}")

    def counters(self) -> dict[str, int]:
        """Return what it has done so far."""
        counted: dict[str, int] = self._get("/counters")
        return counted

    def _get(self, path: str) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_READY_SECONDS)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


class Generator:
    """The load generator, to be run as often as wanted."""

    def __init__(self, program: Path, core: int) -> None:
        self.program = program
        self.core = core

    def run(
        self,
        request: Path,
        port: int,
        load: Load,
        warm_up_seconds: float,
        seconds: float,
        on_word: Callable[[str], None],
        look: Callable[[], None],
    ) -> dict[str, Any]:
        """Return its result; `on_word` is told "measuring" and "measured", `look` called in between."""
        command = [str(self.program), f"port={port}", f"request={request}", *load.words()]
        command += [f"warm_up_ms={warm_up_seconds * 1000:.0f}", f"milliseconds={seconds * 1000:.0f}"]
        with subprocess.Popen(pinned(command, self.core), stdout=subprocess.PIPE) as process:
            try:
                result = self._listen(process, on_word, look)
            finally:
                process.kill()
        return result

    def _listen(
        self, process: subprocess.Popen[bytes], on_word: Callable[[str], None], look: Callable[[], None]
    ) -> dict[str, Any]:
        assert process.stdout is not None
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(_LOOK_SECONDS):
                    look()
                    continue
                data = process.stdout.read1(65536)  # type: ignore[attr-defined] # typeshed says IO, it is a BufferedReader
                if not data:
                    raise RuntimeError("the load generator ended early")
                *lines, said = (said + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"{"):
                        result: dict[str, Any] = json.loads(line)
                        return result
                    on_word(line.decode())
