"""Somebody with the admin token, and somebody with a key, over sockets; all that they are told is kept."""

from __future__ import annotations

import http.client
import json
from typing import Any

import attrs

from tests.integration.running import RunningGateway

TOKEN = "ct-admin-of-the-tests"
SECRET_KEY = "0123456789abcdef" * 4
FILE_KEY = "sk-ct-of-the-file"


@attrs.frozen
class Said:
    """An answer."""

    status: int
    fields: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        """Its document."""
        return json.loads(self.text)

    @property
    def slug(self) -> str:
        """The gateway's word for what is wrong."""
        return self.fields.get("x-crabtwist-error", "")


class AdminClient:
    """
    Asks one gateway.

    `secrets` are those that it was told, once each; `told` is all else that came back.
    """

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        self.secrets: list[str] = []
        self.told = ""

    def ask(self, method: str, path: str, body: Any = None, token: str = TOKEN) -> Said:
        """Ask for something below /v1/admin/."""
        said = self.send(method, f"/v1/admin{path}", body, {"authorization": f"Bearer {token}"})
        shown = said.text
        if said.status < 300 and '"secret":' in shown:
            self.secrets.append(said.json["secret"])
            shown = shown.replace(said.json["secret"], "")
        self.told += f"{said.fields}{shown}\n"
        return said

    def send(self, method: str, path: str, body: Any, fields: dict[str, str]) -> Said:
        """Send a request, and return its answer."""
        connection = http.client.HTTPConnection(self._gateway.host, self._gateway.port, timeout=30)
        data = None if body is None else json.dumps(body).encode()
        more = {} if data is None else {"content-type": "application/json"}
        connection.request(method, path, data, {**fields, **more})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return Said(response.status, {name.lower(): value for name, value in response.getheaders()}, text)

    def make(self, name: str, **terms: Any) -> str:
        """Make a key; return its secret."""
        said = self.ask("POST", "/keys", {"name": name, **terms})
        assert said.status == 201, said
        return str(said.json["secret"])

    def chat(self, key: str, model: str = "echo") -> Said:
        """Ask a model something, with a key."""
        body = {
            "model": model,
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "one two three four"}],
        }
        said = self.send("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {key}"})
        self.told += f"{said.fields}{said.text}\n"
        return said
