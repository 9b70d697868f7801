"""Keys and providers through the admin API of a running gateway, over a socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.admin_client import FILE_KEY, SECRET_KEY, TOKEN, AdminClient, Said
from tests.integration.running import RunningGateway, running
from tests.integration.scripted_upstream import Answer, Received, ScriptedUpstream, plain
from tests.integration.test_fidelity import until

CONFIGURATION = f"""
admin_token = "{TOKEN}"
secret_key = "{SECRET_KEY}"

[[keys]]
name = "file"
key = "{FILE_KEY}"

[providers.echo]
models = ["echo", "other"]

[models.echo]
input = 0
output = 1000

[aliases]
alias = "echo"

[extensions.rate_limit]

[extensions.budget]

[extensions.audit]
path = "audit.jsonl"
bodies = true
"""

UPSTREAM_KEY = "sk-upstream-credential"
OTHER_UPSTREAM_KEY = "sk-upstream-other-credential"


def models_and_words(request: Received) -> Answer:
    """Be an upstream that lists two models and answers with who it is."""
    if request.line.startswith("GET /v1/models"):
        return plain(200, b'{"data":[{"id":"m1"},{"id":"m2"}]}')
    choice = {"index": 0, "message": {"role": "assistant", "content": "up"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return plain(200, json.dumps({"id": "c", "model": "m1", "choices": [choice], "usage": usage}).encode())


class AdminCase(SynchronousTestCase):
    """A gateway, and whoever runs it."""

    configuration = CONFIGURATION

    def setUp(self) -> None:
        """Start it."""
        self.folder = Path(self.mktemp()).absolute()
        gateway = running(self.folder, self.configuration)
        self.gateway: RunningGateway = gateway.__enter__()
        self.addCleanup(gateway.__exit__, None, None, None)
        self.admin = AdminClient(self.gateway)

    def assert_refused(self, status: int, slug: str, said: Said) -> None:
        """Check how something was refused."""
        self.assertEqual((status, slug), (said.status, said.slug), said.text)


class KeyTests(AdminCase):
    """Keys."""

    def test_made_and_used(self) -> None:
        """A key that is made works at once, with its models; no later answer has the secret."""
        terms = {"models": ["alias"], "metadata": {"team": "blue"}}
        said = self.admin.ask("POST", "/keys", {"name": "ann", **terms})
        self.assertEqual((201, "no-store"), (said.status, said.fields["cache-control"]))
        secret = said.json["secret"]
        self.assertRegex(secret, "^sk-ct-[0-9a-f]{64}$")
        self.assertEqual(200, self.admin.chat(secret, "alias").status)
        self.assertEqual(403, self.admin.chat(secret, "other").status)
        shown = self.admin.ask("GET", "/keys/ann").json
        self.assertNotIn("secret", shown)
        self.assertEqual(("api", terms), (shown["source"], {name: shown[name] for name in terms}))
        self.assertEqual([{"hint": secret[-4:], "until": None}], shown["secrets"])

    def test_limits(self) -> None:
        """A key is held to its limits, and to others as soon as they are changed."""
        secret = self.admin.make("ann", limits={"requests_per_minute": 2})
        self.assertEqual([200, 200, 429], [self.admin.chat(secret).status for _ in range(3)])
        self.admin.ask("PATCH", "/keys/ann", {"limits": None})
        self.assertEqual(200, self.admin.chat(secret).status)

    def test_budget(self) -> None:
        """A key is held to its budget."""
        secret = self.admin.make("ann", budget={"dollars": 0.005, "per": "total"})
        first, second = self.admin.chat(secret), self.admin.chat(secret)
        self.assertEqual(200, first.status)
        self.assertEqual(429, second.status)
        self.assertTrue(second.slug.startswith("budget_"), second)

    def test_disabled(self) -> None:
        """A disabled key opens nothing until it is enabled again."""
        secret = self.admin.make("ann")
        self.admin.ask("PATCH", "/keys/ann", {"disabled": True})
        self.assert_refused(401, "key_disabled", self.admin.chat(secret))
        self.admin.ask("PATCH", "/keys/ann", {"disabled": None})
        self.assertEqual(200, self.admin.chat(secret).status)

    def test_expired(self) -> None:
        """A key opens nothing from its moment on."""
        secret = self.admin.make("ann", expires_at="2020-01-01T01:00:00+01:00")
        self.assertEqual("2020-01-01T00:00:00Z", self.admin.ask("GET", "/keys/ann").json["expires_at"])
        self.assert_refused(401, "key_expired", self.admin.chat(secret))
        self.admin.ask("PATCH", "/keys/ann", {"expires_at": "2999-01-01T00:00:00Z"})
        self.assertEqual(200, self.admin.chat(secret).status)

    def test_rotated(self) -> None:
        """A rotated key has two secrets until the overlap ends, then the new one alone."""
        old = self.admin.make("ann")
        said = self.admin.ask("POST", "/keys/ann/rotate", {"overlap_seconds": 1.5})
        new = said.json["secret"]
        self.assertEqual(2, len(said.json["secrets"]))
        self.assertEqual([200, 200], [self.admin.chat(each).status for each in (old, new)])
        until(lambda: self.admin.chat(old).status == 401, "the old secret to end")
        self.assertEqual(200, self.admin.chat(new).status)
        newest = self.admin.ask("POST", "/keys/ann/rotate", {"overlap_seconds": 0}).json["secret"]
        self.assertEqual([401, 200], [self.admin.chat(each).status for each in (new, newest)])

    def test_deleted(self) -> None:
        """A deleted key opens nothing at once."""
        secret = self.admin.make("ann")
        said = self.admin.ask("DELETE", "/keys/ann")
        self.assertEqual((204, ""), (said.status, said.text))
        self.assert_refused(401, "unknown_key", self.admin.chat(secret))
        self.assert_refused(404, "key_not_found", self.admin.ask("GET", "/keys/ann"))

    def test_files(self) -> None:
        """A key of the file is shown, and changed in the file alone; gone from the file it is gone."""
        self.assertEqual("file", self.admin.ask("GET", "/keys/file").json["source"])
        for method, path, body in (
            ("PATCH", "/keys/file", {"disabled": True}),
            ("DELETE", "/keys/file", None),
            ("POST", "/keys/file/rotate", None),
        ):
            self.assert_refused(409, "key_in_file", self.admin.ask(method, path, body))
        self.assert_refused(409, "key_exists", self.admin.ask("POST", "/keys", {"name": "file"}))
        self.assertEqual(200, self.admin.chat(FILE_KEY).status)

    def test_restart(self) -> None:
        """What was made is there after a restart."""
        secret = self.admin.make("ann", limits={"requests_per_minute": 9})
        self.gateway.stop()
        with running(self.folder, self.configuration) as gateway:
            admin = AdminClient(gateway)
            self.assertEqual(200, admin.chat(secret).status)
            self.assertEqual(9, admin.ask("GET", "/keys/ann").json["limits"]["requests_per_minute"])

    def test_locked(self) -> None:
        """Keys open nothing here, nor a wrong token or none; the token is no key."""
        self.assert_refused(401, "not_the_admin_token", self.admin.ask("GET", "/keys", token=FILE_KEY))
        self.assert_refused(401, "credential_missing", self.admin.send("GET", "/v1/admin/keys", None, {}))
        self.assert_refused(401, "unknown_key", self.admin.chat(TOKEN))


class ProviderTests(AdminCase):
    """Providers."""

    def setUp(self) -> None:
        """Start two upstreams."""
        super().setUp()
        self.upstreams = [ScriptedUpstream() for _ in range(2)]
        for upstream in self.upstreams:
            upstream.play(models_and_words)
            self.addCleanup(upstream.close)

    def table(self, number: int = 0, **more: Any) -> dict[str, Any]:
        """Return what to send to have a provider for an upstream."""
        url = f"{self.upstreams[number].url}/v1"
        return {"name": "up", "kind": "openai", "api_key": UPSTREAM_KEY, "base_url": url, **more}

    def credentials(self, number: int = 0) -> set[str]:
        """Return what an upstream was sent."""
        return {value for each in self.upstreams[number].received for value in each.values("authorization")}

    def test_made_and_used(self) -> None:
        """A provider serves at once what its upstream lists; its credential is masked."""
        said = self.admin.ask("POST", "/providers?probe=true", self.table())
        self.assertEqual(201, said.status, said.text)
        settings = said.json["settings"]
        self.assertEqual(["m1", "m2"], [model["name"] for model in settings["models"]])
        self.assertEqual("********", settings["api_key"])
        self.assertIn('"up"', self.admin.chat(FILE_KEY, "m2").text)
        self.assertEqual({f"Bearer {UPSTREAM_KEY}"}, self.credentials())
        self.assertEqual(
            ["echo", "up"], [each["name"] for each in self.admin.ask("GET", "/providers").json["providers"]]
        )

    def test_probe(self) -> None:
        """An upstream that does not list its models is told of, and nothing is made."""
        self.upstreams[0].play(plain(401, b'{"error":{}}'))
        for path, table in (
            ("/providers", self.table()),
            ("/providers?probe=true", self.table(models=["m"])),
        ):
            said = self.admin.ask("POST", path, table)
            self.assert_refused(422, "upstream_unusable", said)
            self.assertIn("401", said.json["error"]["message"])
        self.assert_refused(404, "provider_not_found", self.admin.ask("GET", "/providers/up"))

    def test_asked(self) -> None:
        """What an upstream lists can be asked for, whatever is served of it."""
        self.admin.ask("POST", "/providers", self.table(models=["m2"]))
        self.assertEqual({"models": ["m1", "m2"]}, self.admin.ask("GET", "/providers/up/models").json)
        self.assertEqual({"models": ["echo"]}, self.admin.ask("GET", "/providers/echo/models").json)

    def test_changed(self) -> None:
        """A changed provider is used as it is now, with what stayed as it was."""
        self.admin.ask("POST", "/providers", self.table())
        self.admin.ask("PATCH", "/providers/up", {"api_key": OTHER_UPSTREAM_KEY, "weight": 3})
        self.upstreams[0].play(models_and_words)
        self.admin.chat(FILE_KEY, "m1")
        self.assertEqual({f"Bearer {OTHER_UPSTREAM_KEY}"}, self.credentials())
        elsewhere = {"base_url": f"{self.upstreams[1].url}/v1"}
        self.assert_refused(400, "invalid_provider", self.admin.ask("PATCH", "/providers/up", elsewhere))
        said = self.admin.ask(
            "PATCH", "/providers/up", {**elsewhere, "api_key": UPSTREAM_KEY, "models": ["m2"]}
        )
        self.assertEqual((200, 3), (said.status, said.json["settings"]["weight"]))
        self.assertEqual(200, self.admin.chat(FILE_KEY, "m2").status)
        self.assertEqual({f"Bearer {UPSTREAM_KEY}"}, self.credentials(1))
        self.assertEqual(404, self.admin.chat(FILE_KEY, "m1").status)

    def test_deleted(self) -> None:
        """A deleted provider serves nothing."""
        self.admin.ask("POST", "/providers", self.table())
        self.assertEqual(204, self.admin.ask("DELETE", "/providers/up").status)
        self.assertEqual(404, self.admin.chat(FILE_KEY, "m1").status)

    def test_files(self) -> None:
        """A provider of the file is changed in the file alone."""
        for method, path, body in (
            ("PATCH", "/providers/echo", {"weight": 2}),
            ("DELETE", "/providers/echo", None),
        ):
            self.assert_refused(409, "provider_in_file", self.admin.ask(method, path, body))
        self.assert_refused(
            409, "provider_exists", self.admin.ask("POST", "/providers", self.table(name="echo"))
        )

    def test_no_secret_in_clear(self) -> None:
        """Nothing that was said, logged or kept has a secret in it."""
        self.admin.make("ann")
        self.admin.ask("POST", "/keys/ann/rotate", {})
        for table in (self.table(), self.table(models=[1]), self.table(api_key=[OTHER_UPSTREAM_KEY])):
            self.admin.ask("POST", "/providers", table)
        self.admin.ask("PATCH", "/providers/up", {"api_key": OTHER_UPSTREAM_KEY})
        self.admin.ask("GET", "/keys", token="ct-wrong-token")
        for where in ("/keys", "/keys/ann", "/providers", "/providers/up", "/providers/up/models", "/config"):
            self.admin.ask("GET", where)
        for secret in (*self.admin.secrets, FILE_KEY, "sk-ct-unknown"):
            self.admin.chat(secret, "m1")
        self.gateway.stop()
        kept = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "crabtwist.toml"]
        self.assertTrue({"audit.jsonl"} < {path.name for path in kept}, "a store is there as well")
        secrets = [*self.admin.secrets, UPSTREAM_KEY, OTHER_UPSTREAM_KEY, TOKEN, SECRET_KEY, FILE_KEY]
        self.assertEqual(7, len(secrets))
        for secret in (*secrets, "ct-wrong-token", "sk-ct-unknown"):
            self.assertNotIn(secret, self.admin.told)
            self.assertNotIn(secret, self.gateway.log)
            for path in kept:
                self.assertNotIn(secret.encode(), path.read_bytes(), path.name)


class AuditTests(AdminCase):
    """What is written down of it."""

    def test_written(self) -> None:
        """Each change and each attempt at one has its line, a wrong token's too."""
        self.admin.make("ann")
        self.admin.ask("POST", "/keys", {"name": "ann"})
        self.admin.ask("DELETE", "/keys/file")
        self.admin.ask("DELETE", "/keys/ann", token="ct-wrong-token")
        self.admin.ask("DELETE", "/keys/ann")
        lines = [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]
        self.assertEqual(
            [
                ("admin", "keys.create", "ann", "done"),
                ("admin", "keys.create", "ann", "refused"),
                ("admin", "keys.delete", "file", "refused"),
                ("unknown", "admin.admit", "DELETE /v1/admin/keys/ann", "refused"),
                ("admin", "keys.delete", "ann", "done"),
            ],
            [(each["actor"], each["action"], each["target"], each["outcome"]) for each in lines],
        )


class NoTokenTests(AdminCase):
    """A gateway without an admin token."""

    configuration = CONFIGURATION.replace("admin_token", "#admin_token")

    def test_nothing_there(self) -> None:
        """There is no admin API, nor word of one."""
        for path in ("/v1/admin/keys", "/v1/admin/providers", "/openapi.json", "/docs"):
            said = self.admin.send("GET", path, None, {"authorization": f"Bearer {TOKEN}"})
            self.assert_refused(404, "path_not_found", said)
        self.assertEqual(404, self.admin.ask("POST", "/keys", {"name": "ann"}).status)


class NoSecretKeyTests(AdminCase):
    """A gateway without a `secret_key`."""

    configuration = CONFIGURATION.replace("secret_key", "#secret_key")

    def test_told(self) -> None:
        """Nothing can be made, and it is told what is missing; what the file has is shown."""
        said = self.admin.ask("POST", "/keys", {"name": "ann"})
        self.assert_refused(409, "no_secret_key", said)
        self.assertIn("add one of 64 random letters", said.json["error"]["message"])
        said = self.admin.ask("POST", "/providers", {"name": "b", "kind": "echo", "models": ["b"]})
        self.assert_refused(409, "no_secret_key", said)
        self.assertEqual(200, self.admin.ask("GET", "/keys").status)
