"""What extensions show to administrators, and the lock before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.test.requesthelper import DummyRequest

from crabtwist.errors import ConfigurationError, Refusal
from crabtwist.extension import AdminRoute, Extension
from crabtwist.listener import GatewayFactory
from crabtwist.settings import Secret
from crabtwist.web import admin_lock
from crabtwist.web.admin_lock import MINUTE_SECONDS, MOST_WRONG_TOKENS, AdminLock
from crabtwist.web.admission import Admission
from crabtwist.web.app import make_app
from tests.test_web import ALL, BODY, NOBODY, Said
from tests.test_web import WebTestCase as _WebTestCase

TOKEN = "ct-admin-secret"
ADMIN = {"authorization": f"Bearer {TOKEN}"}
SHOWS = "/v1/admin/extensions/shows"


async def later(query: Mapping[str, str]) -> Any:
    """Return a query in its time."""
    return await succeed({"query": query})


def refuse(_query: Mapping[str, str]) -> Any:
    """Refuse."""
    raise Refusal(400, "invalid_query", "no such colour")


class Shows(Extension):
    """Shows all kinds of things."""

    name = "shows"

    def __init__(self) -> None:
        self.cancelled: list[Any] = []

    def admin_routes(self) -> Mapping[str, AdminRoute]:
        return {
            "plain": lambda query: {"query": query},
            "deep/er": lambda _query: succeed([1, 10**30]),
            "later": later,
            "refuse": refuse,
            "crash": lambda _query: 1 / 0,
            "fail": lambda _query: fail(ValueError("hushed")),
            "odd": lambda _query: object(),
            "never": lambda _query: Deferred(self.cancelled.append),
        }


@attrs.frozen
class Misspelt(Extension):
    """Shows something where nobody can ask."""

    path: str
    name = "misspelt"

    def admin_routes(self) -> Mapping[str, AdminRoute]:
        return {self.path: refuse}


class DoorsTestCase(_WebTestCase):
    """A gateway with an extension that shows something, and with or without an admin token."""

    token: Secret | None = Secret(TOKEN)

    def setUp(self) -> None:
        """Make the doors anew."""
        super().setUp()
        self.extension = Shows()
        admission = Admission(self.gateway, self.token)
        self.factory = GatewayFactory(
            make_app(self.gateway, [Extension(), self.extension]).resource(),
            reactor=self.clock,
            admit=admission,
            render_refusal=admission.refuse,
        )

    def show(self, path: str, fields: dict[str, str] = ADMIN) -> Said:
        """Return what an extension shows."""
        return self.ask("GET", f"{SHOWS}/{path}", fields)


class ShowingTests(DoorsTestCase):
    """What is shown."""

    def test_shown(self) -> None:
        """Routes answer in JSON, at once or later, with numbers of any size; nothing is kept by caches."""
        for path, shown in (("plain", {"query": {}}), ("later", {"query": {}}), ("deep/er", [1, 10**30])):
            said = self.show(path)
            self.assertEqual((200, shown), (said.status, said.json))
            self.assertEqual("application/json", said.fields["content-type"])
            self.assertEqual("no-store", said.fields["cache-control"])

    def test_query(self) -> None:
        """They are given the query's parameters, decoded."""
        self.assertEqual(
            {"a": "b c", "ü": "", "d": "1,2"}, self.show("plain?a=b+c&%C3%BC=&d=1,2").json["query"]
        )

    def test_wrong_query(self) -> None:
        """What is given twice, or is no text, is refused."""
        for query in ("a=1&a=2", "a=%ff", "%ff=1"):
            self.assertEqual((400, "invalid_query"), self.show(f"plain?{query}").refusal)

    def test_nothing_there(self) -> None:
        """There is nothing else."""
        for path in ("nope", "plain/", "deep", "deep%2F", "Plain"):
            self.assertEqual((404, "path_not_found"), self.show(path).refusal, path)
        for path in ("/v1/admin", "/v1/admin/", "/v1/admin/extensions", "/v1/admin/extensions/nope/plain"):
            self.assertEqual((404, "path_not_found"), self.ask("GET", path, ADMIN).refusal, path)

    def test_methods(self) -> None:
        """They are asked with GET, or HEAD."""
        self.assertEqual(
            (405, "method_not_allowed"), self.ask("POST", f"{SHOWS}/plain", ADMIN, b"{}").refusal
        )
        said = self.ask("HEAD", f"{SHOWS}/plain", ADMIN)
        self.assertEqual((200, b""), (said.status, said.body))

    def test_errors(self) -> None:
        """A refusal says why; a crash does not, but the log knows."""
        self.assertEqual((400, "invalid_query"), self.show("refuse").refusal)
        for path in ("crash", "fail", "odd"):
            said = self.show(path)
            self.assertEqual((500, "internal_error"), said.refusal)
            self.assertNotIn(b"hushed", said.body)
            self.assertEqual(1, len(self.flushLoggedErrors()))

    def test_client_leaves(self) -> None:
        """Nobody goes on with what nobody waits for."""
        self.send("GET", f"{SHOWS}/never", ADMIN)
        self.assertEqual([], self.extension.cancelled)
        self.channel.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(1, len(self.extension.cancelled))

    def test_one_shape(self) -> None:
        """Errors have OpenAI's shape, whatever the caller sends for a client."""
        wrong = {"x-api-key": "wrong", "anthropic-version": "2023-06-01"}
        for said in (
            self.show("nope", {"x-api-key": TOKEN}),
            self.show("refuse", {"x-api-key": TOKEN, "anthropic-version": "2023-06-01"}),
            self.show("plain", wrong),
            self.ask("GET", SHOWS.replace("admin", "%61dmin") + "/plain", wrong),
            self.send("POST", f"{SHOWS}/plain", {**ADMIN, "content-length": "99999999"}),
        ):
            self.assertIsNotNone(said.type_in("openai"))

    def test_misspelt(self) -> None:
        """A path that nobody could ask for is told at the start."""
        for path in ("", "/totals", "totals/"):
            error = self.assertRaises(ConfigurationError, make_app, self.gateway, [Misspelt(path)])
            self.assertIn("extensions.misspelt", str(error))


class LockedTests(DoorsTestCase):
    """Who is let in."""

    def test_token(self) -> None:
        """The token opens, sent as keys are."""
        for fields in (ADMIN, {"x-api-key": TOKEN}, {"authorization": f"bearer {TOKEN}"}):
            self.assertEqual(200, self.show("plain", fields).status)

    def test_anything_else(self) -> None:
        """Nothing else does, no key either; the answer is the same however nearly right it was."""
        said = [
            self.show("plain", {"x-api-key": token})
            for token in ("x", TOKEN[:-1], f"{TOKEN}x", "all", "some")
        ]
        self.assertEqual({(401, "not_the_admin_token")}, {each.refusal for each in said})
        self.assertEqual(1, len({each.json["error"]["message"] for each in said}))
        self.assertEqual("Bearer", said[0].fields["www-authenticate"])
        self.assertEqual((401, "credential_missing"), self.show("plain", NOBODY).refusal)

    def test_spellings(self) -> None:
        """No key opens it, and spelled in any other way it is not there at all, for nobody."""
        self.assertEqual((401, "not_the_admin_token"), self.ask("GET", "/v1/admin", ALL).refusal)
        for path in (
            "/v1/%61dmin/extensions/shows/plain",
            "/v1/admin%2Fextensions/shows/plain",
            "/v1//admin/extensions/shows/plain",
            "/v1/x/../admin/extensions/shows/plain",
        ):
            for fields in (ALL, ADMIN):
                self.assertNotEqual(200, self.ask("GET", path, fields).status, path)
            self.assertEqual((404, "path_not_found"), self.ask("GET", path, ALL).refusal, path)
        self.assertEqual((404, "path_not_found"), self.ask("GET", "/v1/administrator", ALL).refusal)

    def test_not_a_key(self) -> None:
        """The token is no key."""
        for fields in (ADMIN, {"x-api-key": TOKEN}):
            self.assertEqual((401, "unknown_key"), self.ask("POST", "/v1/messages", fields, BODY).refusal)

    def test_before_the_body(self) -> None:
        """Who is not let in is told so before any body is taken."""
        said = self.send("POST", f"{SHOWS}/plain", {**ALL, "content-length": "10"})
        self.assertEqual((401, "not_the_admin_token"), said.refusal)

    def test_door_checks(self) -> None:
        """The door itself shows nothing to whom admission let in as somebody else."""
        self.factory.admit = lambda _request: None
        self.assertEqual((404, "path_not_found"), self.show("plain").refusal)

    def test_guessing(self) -> None:
        """After too many wrong tokens none is looked at any more, until the minute is over."""
        for _ in range(MOST_WRONG_TOKENS):
            self.assertEqual(401, self.show("plain", ALL).status)
            self.clock.advance(1)
        for fields in (ALL, ADMIN):
            said = self.show("plain", fields)
            self.assertEqual((429, "too_many_wrong_tokens"), said.refusal)
            self.assertEqual(str(60 - MOST_WRONG_TOKENS), said.fields["retry-after"])
        self.assertEqual(200, self.ask("GET", "/v1/models", ALL).status)
        self.clock.advance(float(said.fields["retry-after"]))
        self.assertEqual(200, self.show("plain").status)

    def test_not_guessing(self) -> None:
        """To send none is no guess, nor is the right one."""
        for _ in range(2 * MOST_WRONG_TOKENS):
            self.show("plain", NOBODY)
            self.assertEqual(200, self.show("plain").status)

    def test_counted(self) -> None:
        """Refusals are counted, once each."""
        self.show("plain", ALL)
        self.show("nope")
        for slug in ("not_the_admin_token", "path_not_found"):
            self.assertEqual(1, self.counted("refusals", reason=slug))

    def test_draining(self) -> None:
        """A gateway that is being stopped shows nothing new."""
        self.gateway.draining = True
        self.assertEqual((503, "draining"), self.show("plain").refusal)


class NoTokenTests(DoorsTestCase):
    """A gateway without an admin token."""

    token = None

    def test_nothing_there(self) -> None:
        """Where there is no token there is nothing to see, for anybody."""
        for fields in (ADMIN, ALL, NOBODY, {"x-api-key": ""}):
            self.assertEqual((404, "path_not_found"), self.show("plain", fields).refusal)


class OpenTests(DoorsTestCase):
    """A gateway that serves anybody."""

    keys = ()

    def test_locked(self) -> None:
        """It still does not show itself to everybody."""
        for fields, status in ((NOBODY, 401), (ALL, 401), (ADMIN, 200)):
            self.assertEqual(status, self.show("plain", fields).status)


class AddressesTests(DoorsTestCase):
    """Whose wrong tokens are counted together."""

    def setUp(self) -> None:
        """Have a lock."""
        self.lock = AdminLock(Secret(TOKEN), Clock())

    def knock(self, address: Any, token: bytes = b"wrong") -> int:
        """Return the status that somebody gets, 200 if let in."""
        request = DummyRequest([b""])
        request.requestHeaders.setRawHeaders(b"x-api-key", [token])
        request.client = address
        try:
            self.lock.admit(request)
        except Refusal as refusal:
            return refusal.status
        return 200

    def test_addresses(self) -> None:
        """One address's do not shut out another's; those of one IPv6 network are one."""
        for number in range(MOST_WRONG_TOKENS):
            self.knock(IPv4Address("TCP", "192.0.2.1", 1000 + number))
            self.knock(IPv6Address("TCP", f"2001:db8::{number:x}", 1))
        for host, status in (("192.0.2.1", 429), ("192.0.2.2", 200)):
            self.assertEqual(status, self.knock(IPv4Address("TCP", host, 1), TOKEN.encode()))
        for host, status in (("2001:db8::ffff", 429), ("2001:db8:0:1::1", 200), ("fe80::1%eth0", 200)):
            self.assertEqual(status, self.knock(IPv6Address("TCP", host, 1), TOKEN.encode()))
        self.assertEqual(429, self.knock(IPv6Address("TCP", "::ffff:192.0.2.1", 1), TOKEN.encode()))
        self.assertEqual(200, self.knock(UNIXAddress("/run/x"), TOKEN.encode()))

    def test_bounded(self) -> None:
        """Not more addresses are remembered than there is room for: those of late."""
        self.patch(admin_lock, "MOST_ADDRESSES", 3)
        for number in range(9):
            self.knock(IPv4Address("TCP", f"192.0.2.{number}", 1))
        self.assertEqual(["192.0.2.6", "192.0.2.7", "192.0.2.8"], list(self.lock._wrong))
        for _ in range(3 * MOST_WRONG_TOKENS):
            self.knock(IPv4Address("TCP", "192.0.2.6", 1))
        self.assertEqual(MOST_WRONG_TOKENS, len(self.lock._wrong["192.0.2.6"]))

    def test_minute(self) -> None:
        """A wrong token is forgotten after a minute, to the moment."""
        clock = self.lock._clock = Clock()
        for _ in range(MOST_WRONG_TOKENS):
            self.knock(UNIXAddress("/run/x"))
        clock.advance(MINUTE_SECONDS - 0.5)
        self.assertEqual(429, self.knock(UNIXAddress("/run/x"), TOKEN.encode()))
        clock.advance(0.5)
        self.assertEqual(200, self.knock(UNIXAddress("/run/x"), TOKEN.encode()))
