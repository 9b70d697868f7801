"""What administrators do with keys."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from crabtwist.admin_keys import merged
from crabtwist.generation import key_ring
from tests.administering import CONFIGURATION, SECRET_KEY, AdministrationTestCase


class KeysTestCase(AdministrationTestCase):
    """The keys of one node."""

    def setUp(self) -> None:
        """Have them."""
        super().setUp()
        self.keys = self.here.keys

    def create(self, **table: Any) -> str:
        """Make a key; return its secret."""
        _, secret = self.do(self.keys.create({"name": "ann", **table}))
        return str(secret)

    def opens(self, secret: str) -> bool:
        """Say whether a secret is known."""
        ring = key_ring(self.here.config, self.here.made())
        return ring.authenticate(secret.encode(), self.clock.seconds()) is not None


class MakingTests(KeysTestCase):
    """How keys come, change and go."""

    def test_made(self) -> None:
        """A key that was made opens at once, and is listed after the file's, without its secret."""
        secret = self.create(models=["alias"], limits={"requests_per_minute": 3})
        self.assertTrue(self.opens(secret))
        self.assertEqual(
            [("file", "file"), ("ann", "api")], [(key.name, key.source) for key in self.keys.all()]
        )
        self.assertNotIn(secret, repr(self.keys.all()))
        self.assertEqual(secret[-4:], self.keys.get("ann").secrets[0].hint)

    def test_complaints(self) -> None:
        """All that is wrong with a key is told at once, each with its path."""
        table = {
            "nam": "x",
            "models": ["ech"],
            "limits": {"requests_per_minute": 0},
            "budget": {"dollars": 1},
        }
        status, slug, message = self.refused(self.keys.create(table))
        self.assertEqual((400, "invalid_key"), (status, slug))
        for part in (
            'nam: unknown key; did you mean "name"?',
            "name: is missing",
            "limits.requests_per_minute: must",
        ):
            self.assertIn(part, message)
        _, _, message = self.refused(self.keys.create({**table, "nam": "y"} | {"limits": None}))
        _, _, message = self.refused(
            self.keys.create({"name": "a", "models": ["ech"], "budget": {"dollars": 1}})
        )
        self.assertIn('models[0]: there is no model or alias "ech"; did you mean "echo"?', message)
        self.assertIn("budget: nobody would hold the key to it; add [extensions.budget]", message)

    def test_name_taken(self) -> None:
        """No second key has the name of another, wherever that one is from."""
        self.create()
        for name in ("ann", "file"):
            self.assertEqual((409, "key_exists"), self.refused(self.keys.create({"name": name}))[:2])

    def test_changed(self) -> None:
        """A merge patch changes what it names, null takes away, and the rest stays; the secret opens on."""
        secret = self.create(limits={"requests_per_minute": 3}, metadata={"a": "1", "b": "2"})
        self.do(self.keys.update("ann", {"metadata": {"a": None}, "limits": {"concurrent_requests": 2}}))
        terms = self.keys.get("ann").terms
        assert terms.limits is not None
        self.assertEqual((3, 2), (terms.limits.requests_per_minute, terms.limits.concurrent_requests))
        self.assertEqual({"b": "2"}, terms.metadata)
        self.do(self.keys.update("ann", {"limits": None}))
        self.assertIsNone(self.keys.get("ann").terms.limits)
        self.assertTrue(self.opens(secret))

    def test_patch_complaints(self) -> None:
        """A patch is checked as a key is, and one that takes away what there cannot be is refused."""
        self.create()
        for patch, word in (
            ({"modles": None}, "modles: unknown key"),
            ({"limits": {"nope": None}}, "limits.nope: unknown key"),
            ({"name": "eve"}, "name: unknown key"),
            ({"models": []}, "models: must not be empty"),
            ({"expires_at": "tomorrow"}, "expires_at: must be a moment"),
        ):
            self.assertIn(word, self.refused(self.keys.update("ann", patch))[2])

    def test_old_terms(self) -> None:
        """What a key has may stay though it is served no more: such a key can still be disabled."""
        self.create(models=["echo"], limits={"requests_per_minute": 3})
        elsewhere = SECRET_KEY + CONFIGURATION.replace('"echo"', '"other"').replace(
            "[extensions.rate_limit]", ""
        )
        self.here.config = self.read(elsewhere.replace("providers.echo]", 'providers.echo]\nkind = "echo"'))
        self.do(self.keys.update("ann", {"disabled": True}))
        self.assertTrue(self.keys.get("ann").terms.disabled)

    def test_rotated(self) -> None:
        """A rotated key has a new secret, and the old one for as long as was said."""
        old = self.create()
        _, new = self.do(self.keys.rotate("ann", 60.0))
        self.assertTrue(self.opens(old) and self.opens(new))
        self.clock.advance(60)
        self.assertEqual((False, True), (self.opens(old), self.opens(new)))

    def test_deleted(self) -> None:
        """A deleted key opens nothing, and another of its name has another secret."""
        old = self.create()
        self.do(self.keys.delete("ann"))
        self.assertFalse(self.opens(old))
        self.assertEqual((404, "key_not_found"), self.refused(self.keys.delete("ann"))[:2])
        self.create()
        self.assertFalse(self.opens(old))

    def test_files_key(self) -> None:
        """A key of the file is changed in the file alone, whoever has what name in the store."""
        for work in (
            self.keys.update("file", {"disabled": True}),
            self.keys.rotate("file", 0.0),
            self.keys.delete("file"),
        ):
            self.assertEqual((409, "key_in_file"), self.refused(work)[:2])

    def test_hidden(self) -> None:
        """When the file comes to have a key of a name, the one that was made opens nothing."""
        secret = self.create()
        self.here.config = self.read(SECRET_KEY + CONFIGURATION.replace('"file"', '"ann"'))
        self.assertFalse(self.opens(secret))
        self.assertEqual([("ann", "file")], [(key.name, key.source) for key in self.keys.all()])

    def test_unreadable(self) -> None:
        """What cannot be read opens nothing and is logged once; the others open on."""
        secret = self.create()
        self.do(self.put("bad", b"{}"))
        for _ in range(3):
            self.assertEqual(["file", "ann"], [key.name for key in self.keys.all()])
        self.assertTrue(self.opens(secret))

    async def put(self, name: str, data: bytes) -> None:
        """Have something in the store that this version did not write."""
        await self.here._directory.put("keys", name, data)

    def test_other_node(self) -> None:
        """A node changes a key as another left it, without having looked before."""
        self.create(metadata={"a": "1"})
        there = self.node(self.configuration)
        self.do(self.keys.update("ann", {"metadata": {"b": "2"}}))
        self.do(there.keys.update("ann", {"disabled": True}))
        self.assertEqual({"a": "1", "b": "2"}, there.keys.get("ann").terms.metadata)


class UnprotectedTests(KeysTestCase):
    """A gateway without a `secret_key`."""

    configuration = CONFIGURATION

    def test_refused(self) -> None:
        """No key can be made, and it is said what is missing; the file's are shown."""
        self.assertEqual((409, "no_secret_key"), self.refused(self.keys.create({"name": "ann"}))[:2])
        self.assertEqual(["file"], [key.name for key in self.keys.all()])


class AnonymousTests(KeysTestCase):
    """A gateway that serves everybody."""

    configuration = f"allow_anonymous = true\n{SECRET_KEY}[providers.echo]\nmodels = ['echo']\n"

    def test_refused(self) -> None:
        """No key is made where none counts."""
        self.assertEqual((409, "keys_unused"), self.refused(self.keys.create({"name": "ann"}))[:2])


class MergeTests(SynchronousTestCase):
    """JSON merge patches."""

    def test_rfc(self) -> None:
        """The examples of RFC 7396, appendix A, come out as they should."""
        for target, patch, result in (
            ('{"a":"b"}', '{"a":"c"}', '{"a":"c"}'),
            ('{"a":"b"}', '{"b":"c"}', '{"a":"b","b":"c"}'),
            ('{"a":"b"}', '{"a":null}', "{}"),
            ('{"a":"b","b":"c"}', '{"a":null}', '{"b":"c"}'),
            ('{"a":["b"]}', '{"a":"c"}', '{"a":"c"}'),
            ('{"a":"c"}', '{"a":["b"]}', '{"a":["b"]}'),
            ('{"a":{"b":"c"}}', '{"a":{"b":"d","c":null}}', '{"a":{"b":"d"}}'),
            ('{"a":[{"b":"c"}]}', '{"a":[1]}', '{"a":[1]}'),
            ('["a","b"]', '["c","d"]', '["c","d"]'),
            ('{"a":"b"}', '["c"]', '["c"]'),
            ('{"a":"foo"}', "null", "null"),
            ('{"a":"foo"}', '"bar"', '"bar"'),
            ('{"e":null}', '{"a":1}', '{"e":null,"a":1}'),
            ("[1,2]", '{"a":"b","c":null}', '{"a":"b"}'),
            ("{}", '{"a":{"bb":{"ccc":null}}}', '{"a":{"bb":{}}}'),
        ):
            self.assertEqual(json.loads(result), merged(json.loads(target), json.loads(patch)))
