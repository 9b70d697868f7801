"""What administrators do with providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crabtwist.admin_providers import MASK, MOST_LISTED_MODELS, AdminProviders
from crabtwist.config import ConfiguredProvider
from crabtwist.directory import Directory
from crabtwist.discovery import discover
from crabtwist.errors import ConfigurationError, ConnectFailed
from crabtwist.seal import Seal
from crabtwist.settings import Secret
from tests.administering import CONFIGURATION, AdministrationTestCase

UP = {"name": "up", "kind": "openai", "api_key": "sk-up-secret", "base_url": "http://127.0.0.1:9/v1"}


class ProvidersTestCase(AdministrationTestCase):
    """The providers of one node, whose upstreams list what a test says."""

    sealed = True

    def setUp(self) -> None:
        """Have them."""
        super().setUp()
        self.asked: list[ConfiguredProvider] = []
        self.lists: Callable[[], list[str]] = lambda: ["m1", "m2"]
        self.directory = Directory(self.storage, self.clock, ("providers",))
        self.seal = Seal(Secret("s" * 64)) if self.sealed else None
        config = self.read(self.configuration)
        self.complaints: list[str] = []
        self.providers = AdminProviders(
            self.directory, self.seal, discover(), lambda: config, self.probe, self.try_making
        )

    async def probe(self, configured: ConfiguredProvider) -> list[str]:
        """Be the upstream."""
        self.asked.append(configured)
        return self.lists()

    def try_making(self, _configured: ConfiguredProvider) -> None:
        """Be the maker, with complaints if a test has some."""
        if self.complaints:
            raise ConfigurationError(self.complaints)

    def create(self, probe: bool = False, **table: Any) -> Any:
        """Make a provider."""
        return self.do(self.providers.create({**UP, **table}, probe=probe))

    def asked_with(self) -> str:
        """Return the credential that the upstream was asked with."""
        settings: Any = self.asked[0].settings
        return str(settings.api_key.reveal())

    def models(self) -> list[str]:
        """Return what the provider that was made serves."""
        [stored] = self.providers.stored()
        return [model.name for model in stored.common.models]

    def credential(self) -> str:
        """Return the credential of the provider that was made."""
        [stored] = self.providers.stored()
        settings: Any = stored.settings
        return str(settings.api_key.reveal())


class MakingTests(ProvidersTestCase):
    """How providers come, change and go."""

    def test_made(self) -> None:
        """A provider is listed after the file's, its credential masked, and nowhere in clear."""
        known = self.create(models=["m"])
        self.assertEqual(
            ("up", "api", "openai", MASK), (known.name, known.source, known.kind, known.settings["api_key"])
        )
        self.assertEqual(["echo", "up"], [each.name for each in self.providers.all()])
        stored = repr(self.do(self.everything()))
        self.assertNotIn("sk-up-secret", stored + repr(self.providers.all()) + repr(self.providers.stored()))
        self.assertEqual("sk-up-secret", self.credential())

    async def everything(self) -> Any:
        """Return all that the store has of providers."""
        return await self.storage.list("admin.providers")

    def test_filled(self) -> None:
        """Without models it serves what the upstream lists, but for names that nothing can be served by."""
        self.lists = lambda: ["m1", "m1", "*", "alias", " ", "m2"]
        self.create()
        self.assertEqual(["m1", "m2"], self.models())
        self.assertEqual("sk-up-secret", self.asked_with())

    def test_none_listed(self) -> None:
        """An upstream that lists nothing leaves somebody to name the models."""
        self.lists = list
        status, _, message = self.refused(self.providers.create(UP, probe=False))
        self.assertEqual((400, "models: the upstream lists none; name those to serve"), (status, message))

    def test_too_many_listed(self) -> None:
        """So does one that lists more than anybody would serve."""
        self.lists = lambda: [f"m{number}" for number in range(MOST_LISTED_MODELS + 1)]
        status, _, message = self.refused(self.providers.create(UP, probe=False))
        self.assertEqual((400, "models: the upstream lists 5001; name those to serve"), (status, message))

    def test_probe(self) -> None:
        """With models the upstream is asked only if that is wanted, and its failure is told."""
        self.create(models=["m"])
        self.assertEqual([], self.asked)
        self.lists = self.fail_to_connect
        work = self.providers.create({**UP, "name": "b", "models": ["m"]}, probe=True)
        status, slug, message = self.refused(work)
        self.assertEqual((422, "upstream_unusable"), (status, slug))
        self.assertIn("nobody there", message)
        self.assertEqual(["echo", "up"], [each.name for each in self.providers.all()])

    def fail_to_connect(self) -> list[str]:
        """Be an upstream that is not there."""
        raise ConnectFailed("nobody there")

    def test_unmakeable(self) -> None:
        """What its maker cannot make is the asker's fault."""

        def complain() -> list[str]:
            raise ConfigurationError(["base_url: is no URL"])

        self.lists = complain
        self.assertEqual(
            (400, "invalid_provider", "base_url: is no URL"),
            self.refused(self.providers.create(UP, probe=False)),
        )

    def test_unmakeable_unasked(self) -> None:
        """That is so where no upstream is asked, too; the provider stays as it was."""
        self.create(models=["m"])
        self.complaints = ["providers.up.base_url: is no URL"]
        changing = self.providers.update("up", {"base_url": "x", "api_key": "k"}, probe=False)
        self.assertEqual((400, "invalid_provider", "base_url: is no URL"), self.refused(changing))
        self.assertEqual(UP["base_url"], self.providers.get("up").settings["base_url"])

    def test_complaints(self) -> None:
        """All that is wrong is told at once, each with its path, the name's fault too."""
        table = {"name": "a b", "kind": "openai", "wieght": 1, "base_ur": "x", "timeout": -1}
        status, slug, message = self.refused(self.providers.create(table, probe=False))
        self.assertEqual((400, "invalid_provider"), (status, slug))
        for part in (
            "name: must be 1 to",
            'wieght: unknown key; did you mean "weight"?',
            "base_ur: unknown",
            "timeout: must",
        ):
            self.assertIn(part, message)
        self.assertNotIn("models", message)

    def test_dotted_name(self) -> None:
        """Paths in complaints are those of the body, whatever the provider is called."""
        work = self.providers.create({**UP, "name": "a.b", "models": []}, probe=False)
        self.assertTrue(self.refused(work)[2].startswith("models: must not be empty"))

    def test_alias(self) -> None:
        """A model may not take an alias's name."""
        work = self.providers.create({**UP, "models": ["alias"]}, probe=False)
        self.assertIn("models: 'alias' is the name of an alias", self.refused(work)[2])

    def test_taken(self) -> None:
        """No second provider has another's name."""
        self.create(models=["m"])
        for name in ("up", "echo"):
            work = self.providers.create({**UP, "name": name, "models": ["m"]}, probe=False)
            self.assertEqual((409, "provider_exists"), self.refused(work)[:2])

    def test_changed(self) -> None:
        """A patch changes what it names; a mask that comes back leaves the credential, null takes it away."""
        self.create(models=["m"])
        known = self.do(self.providers.update("up", {"weight": 5, "api_key": MASK}, probe=False))
        self.assertEqual((5, "sk-up-secret"), (known.settings["weight"], self.credential()))
        self.do(self.providers.update("up", {"api_key": "sk-other"}, probe=False))
        self.assertEqual("sk-other", self.credential())
        known = self.do(
            self.providers.update("up", {"api_key": None, "weight": None, "timeout": None}, probe=False)
        )
        self.assertNotIn("api_key", known.settings)
        self.assertEqual(1, known.settings["weight"])

    def test_refilled(self) -> None:
        """Models that are taken away are asked for anew."""
        self.create(models=["m"])
        self.do(self.providers.update("up", {"models": None}, probe=False))
        self.assertEqual(["m1", "m2"], self.models())

    def test_redirected(self) -> None:
        """A credential is not sent to another host than it was given for, unless it is given again."""
        self.create(models=["m"])
        elsewhere = {"base_url": "http://127.0.0.2:9/v1"}
        for patch in (elsewhere, {**elsewhere, "api_key": MASK}, {"base_url": None}):
            status, _, message = self.refused(self.providers.update("up", patch, probe=True))
            self.assertEqual(
                (400, "api_key: was given for another host; give it again with the new"), (status, message)
            )
        self.assertEqual([], self.asked)
        self.do(self.providers.update("up", {"base_url": "http://127.0.0.1:9/other"}, probe=False))
        again = {**elsewhere, "api_key": UP["api_key"]}
        for patch in (
            again,
            {"base_url": "http://h", "api_key": "sk-new"},
            {"base_url": None, "api_key": None},
        ):
            self.do(self.providers.update("up", patch, probe=False))

    def test_redirected_from_nowhere(self) -> None:
        """Nor is one of a kind that is there no more: nobody knows what host it was given for."""
        assert self.seal is not None
        gone = b'{"kind": "gone", "api_key": "sk-up-secret", "base_url": "http://127.0.0.1:9/v1"}'
        self.do(self.directory.put("providers", "up", self.seal.close(gone)))
        patch = {"kind": "openai", "base_url": "http://127.0.0.2:9/v1", "models": ["m"]}
        message = self.refused(self.providers.update("up", patch, probe=False))[2]
        self.assertIn("api_key: was given for another host", message)
        self.do(self.providers.update("up", {**patch, "api_key": "sk-new"}, probe=False))

    def test_mask_alone(self) -> None:
        """A mask where there was no credential is none."""
        work = self.providers.create({**UP, "api_key": MASK, "models": ["m"]}, probe=False)
        self.assertIn("api_key: is only a mask", self.refused(work)[2])

    def test_patch_complaints(self) -> None:
        """A patch is checked as a provider is, also one that takes away what there cannot be."""
        self.create(models=["m"])
        for patch, word in (
            ({"wieght": None}, "wieght: unknown key"),
            ({"name": "x"}, "name: unknown key"),
            ({"delay_seconds": 1}, "delay_seconds: unknown key"),
            ({"models": [1]}, "models[0]: must be"),
        ):
            self.assertIn(word, self.refused(self.providers.update("up", patch, probe=False))[2])
        self.assertEqual(["m"], self.models())

    def test_deleted(self) -> None:
        """A deleted provider is gone."""
        self.create(models=["m"])
        self.do(self.providers.delete("up"))
        self.assertEqual((), self.providers.stored())
        self.assertEqual((404, "provider_not_found"), self.refused(self.providers.delete("up"))[:2])

    def test_files_provider(self) -> None:
        """A provider of the file is changed in the file alone; its upstream can be asked."""
        for work in (self.providers.update("echo", {}, probe=False), self.providers.delete("echo")):
            self.assertEqual((409, "provider_in_file"), self.refused(work)[:2])
        self.assertEqual(["m1", "m2"], self.do(self.providers.models("echo")))
        self.assertEqual(404, self.refused(self.providers.models("nobody"))[0])

    def test_unreadable(self) -> None:
        """What cannot be opened serves nothing and is logged; a whole one can take its place."""
        self.do(self.directory.put("providers", "up", b"garbage"))
        self.assertEqual((), self.providers.stored())
        self.assertEqual(409, self.refused(self.providers.create(UP, probe=False))[0])
        whole = {name: value for name, value in UP.items() if name != "name"}
        self.do(self.providers.update("up", {**whole, "models": ["m"]}, probe=False))
        self.assertEqual(["m"], self.models())


class UnprotectedTests(ProvidersTestCase):
    """A gateway without a `secret_key`."""

    configuration = CONFIGURATION
    sealed = False

    def test_refused(self) -> None:
        """No provider can be made: its credential would lie in the store in clear."""
        work = self.providers.create({**UP, "models": ["m"]}, probe=False)
        self.assertEqual((409, "no_secret_key"), self.refused(work)[:2])
        self.assertEqual(["echo"], [each.name for each in self.providers.all()])
