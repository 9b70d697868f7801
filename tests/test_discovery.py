"""Finding makers in drop-ins, making what they name, and saying what cannot be found."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import twisted.plugins
from twisted.application.service import IServiceMaker
from twisted.plugin import getPlugins
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

import crabtwist
from crabtwist.discovery import Makers, discover, missing, own_settings, pick
from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import IExtensionMaker, IProviderMaker, IStorageMaker
from crabtwist.plugins import ExtensionMaker, NoSettings, ProviderMaker, StorageMaker
from crabtwist.tables import ProviderSettings

ROOT = Path(crabtwist.__file__).parents[1]

ACME = """
from crabtwist.plugins import ProviderMaker
acme = ProviderMaker("acme", "acme:Acme")
"""


class Scratch(SynchronousTestCase):
    """Drop-ins and modules in directories of their own, forgotten after the test."""

    def setUp(self) -> None:
        self.patch(sys, "dont_write_bytecode", True)
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()
        self.patch(twisted.plugins, "__path__", [str(self.directory)])

    def drop_in(self, name: str, source: str) -> None:
        (self.directory / f"{name}.py").write_text(source)
        self.forget(name)
        self.addCleanup(self.forget, name)

    def forget(self, name: str) -> None:
        importlib.invalidate_caches()
        sys.modules.pop(f"twisted.plugins.{name}", None)
        vars(twisted.plugins).pop(name, None)

    def module(self, name: str, source: str) -> None:
        path = Path(self.mktemp()).absolute()
        path.mkdir()
        (path / f"{name}.py").write_text(source)
        self.patch(sys, "path", [str(path), *sys.path])
        self.addCleanup(sys.modules.pop, name, None)


class TestFinding(Scratch):
    def test_makers_by_their_words(self) -> None:
        """Makers are found in every drop-in, by their words, sorted."""
        self.drop_in("scratch_b", ACME)
        self.drop_in("scratch_a", ACME.replace('"acme"', '"zebra"'))
        found = discover().providers
        self.assertEqual(list(found), ["acme", "zebra"])
        self.assertEqual(found["acme"], ProviderMaker("acme", "acme:Acme"))

    def test_each_sort_by_itself(self) -> None:
        """One word may be that of a provider, an extension and a store."""
        self.drop_in(
            "scratch_a",
            "from crabtwist.plugins import *\n"
            "p = ProviderMaker('x', 'p')\ne = ExtensionMaker('x', 'e')\ns = StorageMaker('x', 's')\n",
        )
        makers = discover()
        self.assertEqual(dict(makers.providers), {"x": ProviderMaker("x", "p")})
        self.assertEqual(dict(makers.extensions), {"x": ExtensionMaker("x", "e")})
        self.assertEqual(dict(makers.storages), {"x": StorageMaker("x", "s")})
        self.assertEqual(dict(makers.failed), {})

    def test_duplicates(self) -> None:
        """Two makers of one word are an error that names the word and both modules."""
        self.drop_in("scratch_a", ACME)
        self.drop_in("scratch_b", ACME)
        (complaint,) = self.assertRaises(ConfigurationError, discover).complaints
        for part in ('"acme"', "twisted.plugins.scratch_a", "twisted.plugins.scratch_b"):
            self.assertIn(part, complaint)

    def test_one_maker_with_two_names(self) -> None:
        """One maker that a module knows by two names is no duplicate."""
        self.drop_in("scratch_a", f"{ACME}\nagain = acme")
        self.assertEqual(list(discover().providers), ["acme"])

    def test_broken_drop_in(self) -> None:
        """A drop-in that cannot be imported is remembered with the reason; the others are found."""
        self.drop_in("scratch_a", ACME)
        self.drop_in("scratch_b", "import no_such_module_anywhere")
        makers = discover()
        self.assertEqual(list(makers.providers), ["acme"])
        self.assertEqual(
            dict(makers.failed),
            {"twisted.plugins.scratch_b": "ModuleNotFoundError: No module named 'no_such_module_anywhere'"},
        )
        self.flushLoggedErrors(ModuleNotFoundError)

    def test_drop_in_that_exits(self) -> None:
        """Not even a drop-in that wants to end the program ends it."""
        self.drop_in("scratch_a", "raise SystemExit('no')")
        self.assertEqual(dict(discover().failed), {"twisted.plugins.scratch_a": "SystemExit: no"})
        self.flushLoggedErrors(SystemExit)

    def test_drop_in_that_broke_later(self) -> None:
        """A drop-in that Twisted remembers from better days is among the failed ones as well."""
        self.drop_in("scratch_a", ACME)
        discover()
        self.drop_in("scratch_a", "broken = 1 / 0")
        os.utime(self.directory / "scratch_a.py", (2e9, 2e9))
        makers = discover()
        self.assertEqual(dict(makers.providers), {})
        self.assertEqual(
            dict(makers.failed), {"twisted.plugins.scratch_a": "ZeroDivisionError: division by zero"}
        )
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))


class TestMissing(SynchronousTestCase):
    def test_helps(self) -> None:
        """The message has the word, the nearest one, all there are, what failed, and the cache."""
        self.assertEqual(
            missing("provider kind", "opnai", ["openai", "echo"], {"twisted.plugins.x": "ImportError: y"}),
            'there is no provider kind "opnai"; did you mean "openai"? There are: echo, openai.'
            " The drop-in twisted.plugins.x could not be loaded: ImportError: y."
            " If it was installed just now, delete the dropin.cache file beside its drop-in"
            " (uv and others keep old file times, so that the cache looks newer).",
        )

    def test_nothing_there(self) -> None:
        """Without any maker it says so."""
        self.assertIn('no extension "a". There are none at all.', missing("extension", "a", [], {}))

    def test_pick(self) -> None:
        """A maker is picked by its word; a word without maker is a complaint with its path."""
        makers = Makers(providers={"acme": ProviderMaker("acme", "acme:Acme")})
        complaints: list[str] = []
        self.assertIs(
            pick(makers.providers, "acme", "kind", "a.kind", makers, complaints), makers.providers["acme"]
        )
        self.assertEqual(complaints, [])
        self.assertIsNone(pick(makers.providers, "acm", "kind", "a.kind", makers, complaints))
        self.assertTrue(complaints[0].startswith('a.kind: there is no kind "acm"; did you mean "acme"?'))


ACME_MODULE = """
import attrs

class Acme:
    @attrs.frozen
    class Settings:
        size: int = 1

    def __init__(self, *given):
        self.given = given

def plain(*given):
    return given

def odd():
    pass

odd.Settings = 3
"""


class TestMaking(Scratch):
    def setUp(self) -> None:
        super().setUp()
        self.module("scratch_acme", ACME_MODULE)

    def test_contracts(self) -> None:
        """Each maker provides its contract."""
        self.assertTrue(verifyObject(IProviderMaker, ProviderMaker("a", "b:c")))
        self.assertTrue(verifyObject(IExtensionMaker, ExtensionMaker("a", "b:c")))
        self.assertTrue(verifyObject(IStorageMaker, StorageMaker("a", "b:c")))

    def test_what_is_given(self) -> None:
        """A provider is given its name, the settings and the services; the others go without name."""
        for path in ("scratch_acme:Acme", "scratch_acme.Acme"):
            self.assertEqual(ProviderMaker("a", path).make("n", 1, 2).given, ("n", 1, 2))
            self.assertEqual(ExtensionMaker("a", path).make(1, 2).given, (1, 2))
            self.assertEqual(StorageMaker("a", path).make(1, 2).given, (1, 2))

    def test_functions(self) -> None:
        """A plain function makes as well as a class does, and takes no settings unless it says so."""
        maker = ExtensionMaker("a", "scratch_acme:plain")
        self.assertEqual(maker.make(1, 2), (1, 2))
        self.assertIs(maker.settings_class(), NoSettings)

    def test_settings_class(self) -> None:
        """The settings class is the factory's `Settings`, for each sort of maker."""
        for maker in (ProviderMaker, ExtensionMaker, StorageMaker):
            cls: Any = maker("a", "scratch_acme:Acme").settings_class()
            self.assertEqual(cls().size, 1)

    def test_settings_must_be_an_attrs_class(self) -> None:
        """Any other `Settings` is an error that names the path."""
        with self.assertRaisesRegex(ConfigurationError, "scratch_acme:odd.*attrs class"):
            StorageMaker("a", "scratch_acme:odd").settings_class()

    def test_lazy(self) -> None:
        """Nothing is imported before it is asked for."""
        maker = ProviderMaker("a", "scratch_acme:Acme")
        self.assertNotIn("scratch_acme", sys.modules)
        maker.settings_class()
        self.assertIn("scratch_acme", sys.modules)

    def test_what_cannot_be_imported(self) -> None:
        """No such module, no such name, and a module that fails are errors that name the path."""
        self.module("scratch_broken", "1 / 0")
        for path, why in (
            ("scratch_none:X", "No module named 'scratch_none'"),
            ("scratch_acme:X", "has no attribute 'X'"),
            ("scratch_broken:X", "ZeroDivisionError: division by zero"),
            ("nothing", "ValueError"),
        ):
            for attempt in (
                ProviderMaker("a", path).settings_class,
                lambda p=path: StorageMaker("a", p).make(1, 2),
            ):
                (complaint,) = self.assertRaises(ConfigurationError, attempt).complaints
                self.assertTrue(complaint.startswith(f"{path}: cannot be imported: "), complaint)
                self.assertIn(why, complaint)


class TestOwnSettings(Scratch):
    def read(self, source: str, **table: object) -> tuple[object, list[str]]:
        self.module("scratch_own", f"import attrs\n{source}")
        complaints: list[str] = []
        maker = ProviderMaker("acme", "scratch_own:Acme")
        common = [field.name for field in attrs.fields(ProviderSettings)]
        return own_settings(maker, table, "providers.a", complaints, common), complaints

    def test_read(self) -> None:
        """A table is read into the maker's settings class."""
        source = "class Acme:\n  @attrs.frozen\n  class Settings:\n    size: int"
        settings, complaints = self.read(source, size=3)
        self.assertEqual((repr(settings), complaints), ("Acme.Settings(size=3)", []))

    def test_keys_of_the_gateway(self) -> None:
        """A drop-in that wants a key of the gateway's own is complained of."""
        source = "class Acme:\n  @attrs.frozen\n  class Settings:\n    weight: int = 1"
        settings, complaints = self.read(source)
        self.assertEqual(
            (settings, complaints),
            (None, ["providers.a: its drop-in may not have settings called ['weight']"]),
        )

    def test_broken_module(self) -> None:
        """A module that cannot be imported is a complaint with the table's path."""
        settings, complaints = self.read("1 / 0")
        self.assertIsNone(settings)
        self.assertEqual(
            complaints,
            ["providers.a: scratch_own:Acme: cannot be imported: ZeroDivisionError: division by zero"],
        )

    def test_broken_settings(self) -> None:
        """A settings class that cannot be read is a complaint, not a crash."""
        source = "class Acme:\n  @attrs.frozen\n  class Settings:\n    size: complex"
        settings, complaints = self.read(source, size=3)
        self.assertIsNone(settings)
        self.assertIn("providers.a: the settings of its drop-in cannot be had: TypeError: ", complaints[0])


class TestOwnDropIn(Scratch):
    def setUp(self) -> None:
        super().setUp()
        self.drop_in(
            "crabtwist_dropin", (ROOT / "twisted" / "plugins" / "crabtwist_dropin.py").read_text("utf-8")
        )

    def test_built_in_makers(self) -> None:
        """What comes with crabtwist is found like any drop-in's."""
        makers = discover()
        self.assertEqual(list(makers.providers), ["anthropic", "echo", "openai"])
        self.assertEqual(
            list(makers.extensions), ["audit", "budget", "cache", "logging", "rate_limit", "usage"]
        )
        self.assertEqual(list(makers.storages), ["memory", "postgres", "redis", "sqlite"])
        self.assertEqual(list(makers.ledgers), ["postgres", "sqlite"])

    def test_memory_storage(self) -> None:
        """The built-in store takes no settings."""
        self.assertIs(discover().storages["memory"].settings_class(), NoSettings)

    def test_twistd_command(self) -> None:
        """`twistd crabtwist` is there, and its module is not imported for that."""
        (maker,) = getPlugins(IServiceMaker)
        self.assertEqual((maker.tapname, vars(maker)["module"]), ("crabtwist", "crabtwist.tap"))

    def test_no_package(self) -> None:
        """There is no `__init__.py` beside the drop-in, which would hide Twisted's own plugins."""
        self.assertFalse((ROOT / "twisted" / "plugins" / "__init__.py").exists())

    def test_light(self) -> None:
        """Loading what drop-ins use loads no reactor, no HTTP and nothing of the gateway's."""
        program = "import sys, crabtwist.plugins; print(*sys.modules)"
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        loaded = {name for name in run.stdout.split() if name.startswith("crabtwist")}
        self.assertEqual(
            loaded - {f"crabtwist.{word}" for word in ("money", "settings", "periods", "terms", "values")},
            {"crabtwist", "crabtwist.errors", "crabtwist.interfaces", "crabtwist.plugins"},
        )
        self.assertFalse({"twisted.internet.reactor", "treq", "klein", "OpenSSL"} & set(run.stdout.split()))
