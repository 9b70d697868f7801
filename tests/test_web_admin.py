"""What every endpoint of the admin API has from its declaration: checks, answers, the audit, the document."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import attrs
import msgspec
from klein import Klein
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from crabtwist.errors import Refusal, StorageError
from crabtwist.extension import Extension
from crabtwist.hooks import Hooks
from crabtwist.listener import GatewayFactory
from crabtwist.settings import Secret, positive
from crabtwist.values import AdminAction
from crabtwist.web.admin.endpoint import Asked, Endpoint, about, add_endpoints
from crabtwist.web.admin.openapi import add_document, document_of
from crabtwist.web.admin.times import rfc3339
from crabtwist.web.admission import Admission
from crabtwist.web.app import _add_errors
from tests.test_web import ALL, NOBODY, Said
from tests.test_web import WebTestCase as _WebTestCase

ADMIN = {"authorization": "Bearer ct-admin-secret"}
JSON = {**ADMIN, "content-type": "application/json"}


@attrs.frozen(kw_only=True)
class Filters:
    """Which cakes."""

    by: tuple[str, ...] = attrs.field(default=(), metadata=about("what they are sorted by"))
    limit: int = attrs.field(default=10, validator=positive)
    fresh: bool | None = None
    weight: float = 1.0


@attrs.frozen(kw_only=True)
class Recipe:
    """How to make a cake."""

    name: str
    eggs: int = attrs.field(default=2, validator=positive)
    secret: Secret | None = None


@attrs.frozen
class Cakes:
    """Cakes."""

    cakes: list[Recipe]


class Watching(Extension):
    """Remembers what was done."""

    name = "watching"

    def __init__(self) -> None:
        self.actions: list[AdminAction] = []

    def on_admin_action(self, action: AdminAction) -> None:
        self.actions.append(action)


class EndpointTestCase(_WebTestCase):
    """A gateway with a family of endpoints."""

    def setUp(self) -> None:
        """Open its doors."""
        super().setUp()
        self.watching = Watching()
        self.gateway.hooks = Hooks([self.watching], self.clock)
        self.asked: list[Asked] = []
        self.result: Any = None
        app = Klein()
        add_endpoints(app, self.endpoints(), self.gateway)
        add_document(app, self.endpoints())
        _add_errors(app, self.gateway)
        admission = Admission(self.gateway, Secret("ct-admin-secret"))
        self.factory = GatewayFactory(
            app.resource(), reactor=self.clock, admit=admission, render_refusal=admission.refuse
        )

    def act(self, asked: Asked) -> Any:
        """Do what the test wants."""
        self.asked.append(asked)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def endpoints(self) -> list[Endpoint]:
        """Declare them."""
        base, one = "/v1/admin/cakes", "/v1/admin/cakes/<name>"
        return [
            Endpoint("GET", base, "List the cakes", self.act, query=Filters, answer=Cakes),
            Endpoint(
                "POST", base, "Bake", self.act, action="cakes.bake", body=Recipe, answer=Recipe, status=201
            ),
            Endpoint("PATCH", one, "Mend", self.act, action="cakes.mend", body=Recipe, body_as_mapping=True),
            Endpoint("DELETE", one, "Eat", self.act, action="cakes.eat", status=204, refusals={404: "None."}),
            Endpoint("GET", "/v1/mine", "List mine", self.act, for_keys=True),
        ]

    def bake(self, body: Any, fields: dict[str, str] = JSON) -> Said:
        """Send a recipe."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/v1/admin/cakes", {**fields, "content-length": str(len(data))}, data)

    def told(self) -> list[tuple[str, str, str]]:
        """Return what the audit was told: action, target, outcome."""
        return [(each.action, each.target, each.outcome) for each in self.watching.actions]


class AskingTests(EndpointTestCase):
    """What reaches an endpoint's function, and what does not."""

    def test_query(self) -> None:
        """A query is read as its class says it, commas parting what there may be several of."""
        self.ask("GET", "/v1/admin/cakes?by=a,b&limit=3&fresh=true&weight=0.5", ADMIN)
        self.assertEqual(Filters(by=("a", "b"), limit=3, fresh=True, weight=0.5), self.asked[0].query)

    def test_query_complaints(self) -> None:
        """All that is wrong with a query is told at once, what is unknown by its name."""
        said = self.ask("GET", "/v1/admin/cakes?limit=0&limt=1&fresh=perhaps&weight=x", ADMIN)
        self.assertEqual((400, "invalid_query"), said.refusal)
        for part in (
            "limit: must be greater",
            'limt: unknown key; did you mean "limit"',
            "fresh: must",
            "weight: must",
        ):
            self.assertIn(part, said.json["error"]["message"])
        for query in ("limit=1&limit=2", "by=%FF"):
            self.assertEqual(
                (400, "invalid_query"), self.ask("GET", f"/v1/admin/cakes?{query}", ADMIN).refusal
            )

    def test_no_query(self) -> None:
        """Where no parameter is known none is taken, and no body where there is none."""
        self.assertEqual(400, self.ask("DELETE", "/v1/admin/cakes/a?force=1", ADMIN).status)
        fields = {**JSON, "content-length": "9"}
        self.assertEqual(400, self.ask("DELETE", "/v1/admin/cakes/a", fields, b'{"all":1}').status)
        self.assertEqual([], self.asked)

    def test_body(self) -> None:
        """A body is read as its class says it; null is as if left out."""
        self.result = Recipe(name="pie")
        self.assertEqual(201, self.bake({"name": "pie", "eggs": 3, "secret": None}).status)
        self.assertEqual(Recipe(name="pie", eggs=3), self.asked[0].body)

    def test_body_complaints(self) -> None:
        """All that is wrong with a body is told at once; what is no JSON object is told as well."""
        said = self.bake({"egs": 1, "eggs": 0})
        self.assertEqual((400, "invalid_body"), said.refusal)
        for part in ("egs: unknown key", "eggs: must be greater", "name: is missing"):
            self.assertIn(part, said.json["error"]["message"])
        deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
        for body in (b"[]", b"{", b"null", b'"x"', b"\xff", b'{"name":"\\ud800"}', deep):
            self.assertEqual((400, "invalid_json"), self.bake(body).refusal, body[:20])
        self.assertEqual([], self.asked)

    def test_content_type(self) -> None:
        """A body has to call itself JSON, by whichever of its names: forms of other sites cannot."""
        self.result = Recipe(name="pie")
        for content_type in (
            "application/json; charset=utf-8",
            "application/merge-patch+json",
            "Application/JSON",
        ):
            self.assertEqual(201, self.bake({"name": "pie"}, {**ADMIN, "content-type": content_type}).status)
        for fields in (ADMIN, {**ADMIN, "content-type": "text/plain"}):
            self.assertEqual((415, "content_type"), self.bake({"name": "pie"}, fields).refusal)

    def test_too_large(self) -> None:
        """A body is not larger than anybody's hand would write."""
        self.assertEqual((413, "body_too_large"), self.bake({"name": "x" * 2**20}).refusal)

    def test_mapping(self) -> None:
        """Where a body is passed as it came, nulls are in it."""
        body = b'{"eggs":null}'
        self.ask("PATCH", "/v1/admin/cakes/pie", {**JSON, "content-length": str(len(body))}, body)
        self.assertEqual(({"eggs": None}, {"name": "pie"}), (self.asked[0].body, dict(self.asked[0].path)))

    def test_who(self) -> None:
        """A key opens nothing of an administrator's, and the token nothing of a key's."""
        self.assertEqual((401, "not_the_admin_token"), self.ask("GET", "/v1/admin/cakes", ALL).refusal)
        self.assertEqual(401, self.ask("GET", "/v1/mine", ADMIN).status)
        self.assertEqual(200, self.ask("GET", "/v1/mine", ALL).status)
        self.assertEqual("key-all", getattr(self.asked[0].key, "name", None))

    def test_checked_again(self) -> None:
        """Were admission to let somebody in by mistake, the endpoint would still not be there."""
        self.factory.admit = lambda request: setattr(request, "admission", None)
        self.assertEqual((404, "path_not_found"), self.ask("GET", "/v1/admin/cakes", NOBODY).refusal)


class AnsweringTests(EndpointTestCase):
    """What comes of an endpoint's function."""

    def test_answers(self) -> None:
        """Values, coroutines and Deferreds are answered in JSON, secrets masked; no cache keeps them."""

        async def later() -> Any:
            return await succeed(Cakes([]))

        for result, shown in (
            (
                Cakes([Recipe(name="pie", secret=Secret("hush"))]),
                {"name": "pie", "eggs": 2, "secret": "********"},
            ),
            (later(), None),
            (succeed(Cakes([])), None),
        ):
            self.result = result
            said = self.ask("GET", "/v1/admin/cakes", ADMIN)
            self.assertEqual({"cakes": [shown] if shown else []}, said.json)
            self.assertEqual("no-store", said.fields["cache-control"])

    def test_nothing(self) -> None:
        """What has nothing to say has no body."""
        said = self.ask("DELETE", "/v1/admin/cakes/pie", ADMIN)
        self.assertEqual((204, b""), (said.status, said.body))

    def test_store(self) -> None:
        """A store that does not answer is a 503 that says when to ask again, and nothing of the store."""
        for result in (StorageError("10.0.0.1 refused"), fail(StorageError("10.0.0.1 refused"))):
            self.result = result
            said = self.ask("DELETE", "/v1/admin/cakes/pie", ADMIN)
            self.assertEqual((503, "storage_unavailable"), said.refusal)
            self.assertEqual("1", said.fields["retry-after"])
            self.assertNotIn(b"10.0.0.1", said.body)

    def test_crash(self) -> None:
        """A crash is a 500 without its words, and is logged."""
        self.result = ValueError("hushed")
        said = self.ask("DELETE", "/v1/admin/cakes/pie", ADMIN)
        self.assertEqual((500, "internal_error"), said.refusal)
        self.assertNotIn(b"hushed", said.body)
        self.assertEqual(1, len(self.flushLoggedErrors(ValueError)))

    def test_moments(self) -> None:
        """Moments are texts in UTC."""
        self.assertEqual("2027-01-15T08:00:00Z", rfc3339(1_800_000_000))
        self.assertEqual("2027-01-15T08:00:00.250000Z", rfc3339(1_800_000_000.25))


class TellingTests(EndpointTestCase):
    """What the audit is told."""

    def test_done(self) -> None:
        """A change is told with its target and the members that were sent, never what was in them."""
        self.result = Recipe(name="pie")
        self.bake({"name": "pie", "secret": "hush"})
        [action] = self.watching.actions
        self.assertEqual(("admin", "cakes.bake", "pie", "done"), attrs.astuple(action)[1:5])
        self.assertEqual("name, secret", action.detail)

    def test_not_done(self) -> None:
        """So is what was refused, for its body too, and what failed."""
        self.bake(b"{")
        for result in (Refusal(404, "none", "there is none"), StorageError("gone"), ValueError()):
            self.result = result
            self.ask("DELETE", "/v1/admin/cakes/pie", ADMIN)
        self.flushLoggedErrors(ValueError)
        eat = ("cakes.eat", "pie")
        self.assertEqual(
            [("cakes.bake", "", "refused"), (*eat, "refused"), (*eat, "failed"), (*eat, "failed")],
            self.told(),
        )

    def test_strange_name(self) -> None:
        """What is no name is not written down as one: it may be anything."""
        self.bake({"name": "sk-ct-0123 and a text", "eggs": 0})
        self.assertEqual([("cakes.bake", "", "refused")], self.told())

    def test_looking(self) -> None:
        """Nobody is told of who only looks."""
        self.ask("GET", "/v1/admin/cakes", ADMIN)
        self.assertEqual([], self.told())

    def test_wrong_token(self) -> None:
        """A wrong token is told, and where it was tried; not so none at all, or one too many."""
        self.ask("DELETE", "/v1/admin/cakes/pie", NOBODY)
        for _ in range(12):
            self.ask("DELETE", "/v1/admin/cakes/pie", {"x-api-key": "hush"})
        self.assertEqual(10 * [("admin.admit", "DELETE /v1/admin/cakes/pie", "refused")], self.told())
        self.assertNotIn("hush", repr(self.watching.actions))

    def test_client_leaves(self) -> None:
        """A change goes on to its end when whoever asked leaves, and is told as what it came to."""
        self.result = changing = Deferred[None]()
        self.send("DELETE", "/v1/admin/cakes/pie", ADMIN)
        self.channel.connectionLost(Failure(ConnectionDone()))
        self.assertEqual([], self.told())
        changing.callback(None)
        self.assertEqual([("cakes.eat", "pie", "done")], self.told())


class DocumentTests(EndpointTestCase):
    """The document, and its page."""

    def test_document(self) -> None:
        """It says of each endpoint what its declaration says."""
        said = self.ask("GET", "/openapi.json", NOBODY)
        document = said.json
        self.assertEqual(json.loads(msgspec.json.encode(document_of(self.endpoints()))), document)
        self.assertEqual({"/v1/admin/cakes", "/v1/admin/cakes/{name}", "/v1/mine"}, set(document["paths"]))
        bake = document["paths"]["/v1/admin/cakes"]["post"]
        self.assertEqual({"201", "400", "401", "413", "415", "429", "503"}, set(bake["responses"]))
        self.assertEqual([{"key": []}], document["paths"]["/v1/mine"]["get"]["security"])
        self.assertTrue(bake["requestBody"]["required"])

    def test_parameters(self) -> None:
        """Parameters have what their fields' annotations, validators and words say."""
        parameters = document_of(self.endpoints())["paths"]["/v1/admin/cakes"]["get"]["parameters"]
        by_name = {each["name"]: each for each in parameters}
        self.assertEqual(
            {"type": "integer", "default": 10, "exclusiveMinimum": 0}, by_name["limit"]["schema"]
        )
        self.assertEqual("what they are sorted by", by_name["by"]["description"])
        self.assertIs(False, by_name["by"]["explode"])
        self.assertEqual({"type": "boolean"}, by_name["fresh"]["schema"])

    def test_schemas(self) -> None:
        """What is read takes nothing unknown, what patches it takes nulls and needs nothing."""
        schemas = document_of(self.endpoints())["components"]["schemas"]
        recipe = schemas["Recipe"]
        self.assertEqual((False, ["name"]), (recipe["additionalProperties"], recipe["required"]))
        self.assertIn(
            {"type": "string", "format": "password", "writeOnly": True},
            recipe["properties"]["secret"]["anyOf"],
        )
        patch = schemas["RecipePatch"]
        self.assertEqual([], patch["required"])
        self.assertIn({"type": "null"}, patch["properties"]["name"]["anyOf"])

    def test_page(self) -> None:
        """The page tells of each endpoint, loads and runs nothing, and its links lead somewhere."""
        said = self.ask("GET", "/docs", NOBODY)
        page = Page(said.body.decode())
        for summary in ("List the cakes", "Bake", "Mend", "Eat", "List mine"):
            self.assertIn(summary, page.text)
        self.assertIn("default-src 'none'", said.fields["content-security-policy"])
        self.assertEqual(set(), {"script", "link", "img", "iframe"} & page.tags)
        self.assertEqual(set(), {link for link in page.links if not link.startswith("#")} - {"/openapi.json"})
        self.assertEqual(set(), {link[1:] for link in page.links if link.startswith("#")} - page.ids)

    def test_no_token(self) -> None:
        """Without an admin token there is neither."""
        self.factory.admit = Admission(self.gateway)
        for path in ("/docs", "/openapi.json"):
            self.assertEqual((404, "path_not_found"), self.ask("GET", path, NOBODY).refusal)


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.links, self.ids = set[str](), set[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take in an element."""
        self.tags.add(tag)
        named = dict(attrs)
        self.links.add(named.get("href") or "#")
        self.ids |= {named.get("id") or "", ""}

    def handle_data(self, data: str) -> None:
        """Take in a text."""
        self.text += data
