"""Clients of gateways of the tests: of both dialects, patient and impatient, many at once."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import attrs

from tests.integration.running import RunningGateway

#: Longer than anything takes that is waited for.
PATIENCE_SECONDS = 30.0
PATHS = ("/v1/messages", "/v1/chat/completions")


@attrs.frozen
class Answer:
    """What came back, and how long that took; `status` is 0 if the connection broke, or was left."""

    status: int = 0
    error: str = ""
    retry_after: str | None = None
    id: str = ""
    text: str = ""
    seconds: float = 0.0


@attrs.frozen(kw_only=True)
class Question:
    """A request: to whom, as whom, and how; `leaves` is a client that does not wait for the end."""

    gateway: RunningGateway
    key: str
    path: str = PATHS[0]
    model: str = "quick"
    stream: bool = False
    leaves: bool = False
    max_tokens: int = 20
    text: str = "one two three four"

    def open(self) -> http.client.HTTPConnection:
        """Connect."""
        connection = http.client.HTTPConnection(self.gateway.host, self.gateway.port, timeout=30)
        connection.connect()
        return connection

    def send(self, connection: http.client.HTTPConnection) -> None:
        """Ask."""
        body = {"model": self.model, "max_tokens": self.max_tokens, "stream": self.stream}
        messages = [{"role": "user", "content": self.text}]
        fields = {"x-api-key": f"sk-ct-{self.key}"}
        connection.request("POST", self.path, json.dumps({**body, "messages": messages}), fields)

    def ask(self, connection: http.client.HTTPConnection) -> Answer:
        """Ask, and return the answer, or as much of it as the client wants."""
        began = time.monotonic()
        self.send(connection)
        if self.leaves and not self.stream:
            connection.close()
            return Answer()
        response = connection.getresponse()
        status, fields = response.status, response.headers
        text = response.read1(1) if self.leaves else response.read()
        if self.leaves:
            connection.close()
            status = status if status != 200 else 0
        return Answer(
            status,
            fields["x-crabtwist-error"] or "",
            fields["retry-after"],
            fields["x-crabtwist-request-id"],
            text.decode(),
            time.monotonic() - began,
        )

    def answer(self) -> Answer:
        """Ask over a connection of its own."""
        connection = self.open()
        try:
            return self.ask(connection)
        finally:
            connection.close()


def until(holds: Callable[[], object], what: str) -> None:
    """Wait for something to be so, without asking so often that it disturbs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"never so: {what}"
        time.sleep(0.05)


def at_once(questions: Iterable[Question]) -> list[Answer]:
    """Ask all questions over as many connections, at the same moment."""
    asked = [(question, question.open()) for question in questions]
    barrier = threading.Barrier(len(asked))

    def ask(question: Question, connection: http.client.HTTPConnection) -> Answer:
        barrier.wait(30)
        try:
            return question.ask(connection)
        finally:
            connection.close()

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, *zip(*asked, strict=True)))


class Load:
    """Requests to gateways, two callers for each, until it is told to end or its gateway is gone."""

    def __init__(self, gateways: Iterable[RunningGateway]) -> None:
        self.answers: list[Answer] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(gateway, path, stream), daemon=True)
            for gateway in gateways
            for path, stream in zip(PATHS, (False, True), strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Answer]:
        """Return all answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
        return self.answers

    def more(self, number: int) -> None:
        """Wait for so many answers more."""
        enough = len(self.answers) + number
        until(lambda: len(self.answers) >= enough, f"{number} answers more")

    def _run(self, gateway: RunningGateway, path: str, stream: bool) -> None:
        question = Question(gateway=gateway, key="many", path=path, stream=stream)
        connection = question.open()
        number = 0
        while not self._ended.wait(0.01):
            number += 1
            try:
                # The cache knows none of them.
                answer = attrs.evolve(question, text=f"{path} {number} {id(self)}").ask(connection)
            except (OSError, http.client.HTTPException):
                answer = Answer()
            self.answers.append(answer)
            if answer.status == 0:
                break
        connection.close()
