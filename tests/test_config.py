"""The configuration file: what it means, and everything that can be wrong with it, at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.config import Config, load
from crabtwist.discovery import Makers
from crabtwist.errors import ConfigurationError
from crabtwist.keys import KeySettings
from crabtwist.plugins import ExtensionMaker, LedgerMaker, NoSettings, ProviderMaker, StorageMaker
from crabtwist.settings import Secret
from crabtwist.tables import LedgerSettings, ServedModel


class Upstream:
    @attrs.frozen
    class Settings:
        api_key: Secret | None = None
        base_url: str = "https://example.com"


class Limit:
    @attrs.frozen
    class Settings:
        per_minute: int = 60


class Plain:
    pass


class Greedy:
    @attrs.frozen
    class Settings:
        journal: str = "mine"


MAKERS = Makers(
    providers={kind: ProviderMaker(kind, f"{__name__}:Upstream") for kind in ("anthropic", "openai")},
    extensions={
        "limit": ExtensionMaker("limit", f"{__name__}:Limit"),
        "logging": ExtensionMaker("logging", f"{__name__}:Plain"),
    },
    storages={
        "sqlite": StorageMaker("sqlite", f"{__name__}:Plain"),
        "disk": StorageMaker("disk", f"{__name__}:Limit"),
    },
    ledgers={
        "sqlite": LedgerMaker("sqlite", f"{__name__}:Plain"),
        "disk": LedgerMaker("disk", f"{__name__}:Limit"),
        "greedy": LedgerMaker("greedy", f"{__name__}:Greedy"),
    },
    failed={"twisted.plugins.acme": "ImportError: no acme"},
)

KEY = """
[[keys]]
name = "ann"
key = "sk-ann"
"""
PROVIDER = """
[providers.anthropic]
models = ["small", { name = "large", upstream = "large-2" }]
"""


class Loading(SynchronousTestCase):
    def load(self, text: str | bytes, environ: dict[str, str] | None = None) -> Config:
        self.path = Path(self.mktemp())
        self.path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load(self.path, environ or {}, MAKERS)

    def complaints(self, text: str | bytes, environ: dict[str, str] | None = None) -> list[str]:
        error: ConfigurationError = self.assertRaises(ConfigurationError, self.load, text, environ)
        return error.complaints

    def complaint(self, text: str | bytes, environ: dict[str, str] | None = None) -> str:
        found = self.complaints(text, environ)
        self.assertEqual(len(found), 1, found)
        return found[0]


class TestMeaning(Loading):
    def test_defaults(self) -> None:
        """The smallest configuration listens on loopback, keeps everything in files, and is closed."""
        config = self.load(KEY + PROVIDER)
        self.assertEqual(config.listen, ("127.0.0.1:5632",))
        self.assertEqual((config.admin_token, config.allow_anonymous), (None, False))
        self.assertEqual((config.max_body_bytes, config.cooldown_failures), (33554432, 3))
        self.assertEqual((config.storage.kind, config.storage.settings), ("sqlite", NoSettings()))
        assert config.ledger is not None
        self.assertEqual((config.ledger.kind, config.ledger.common), ("sqlite", LedgerSettings()))
        self.assertEqual((dict(config.aliases), config.extensions), ({}, ()))
        self.assertEqual(config.keys, (KeySettings(name="ann", key=Secret("sk-ann"), models=("*",)),))

    def test_top_level(self) -> None:
        """Keys at the top are attributes; one address to listen on needs no array."""
        top = 'listen = "[::1]:80"\nadmin_token = "t"\nshutdown_timeout = 5\ninject_stream_usage = false\n'
        config = self.load(top + KEY + PROVIDER)
        self.assertEqual(config.listen, ("[::1]:80",))
        self.assertEqual((config.admin_token, config.shutdown_timeout), (Secret("t"), 5.0))
        self.assertFalse(config.inject_stream_usage)
        self.assertEqual(self.load('listen = ["a:1", "b:2"]' + KEY + PROVIDER).listen, ("a:1", "b:2"))

    def test_provider(self) -> None:
        """A provider has the gateway's settings for it, its maker, and the maker's own settings."""
        (provider,) = self.load(f'{KEY}{PROVIDER}timeout = 5\napi_key = "k"').providers
        self.assertEqual((provider.name, provider.maker), ("anthropic", MAKERS.providers["anthropic"]))
        self.assertEqual((provider.common.kind, provider.common.timeout), ("anthropic", 5.0))
        self.assertEqual(
            provider.common.models,
            (ServedModel(name="small", upstream="small"), ServedModel(name="large", upstream="large-2")),
        )
        self.assertEqual(provider.settings, Upstream.Settings(api_key=Secret("k")))

    def test_kind(self) -> None:
        """A provider may be called anything when its kind is given; one model may have several."""
        config = self.load(
            KEY + PROVIDER + '[providers.spare]\nkind = "openai"\nmodels = ["small"]\nweight = 0'
        )
        self.assertEqual([each.maker.kind for each in config.providers], ["anthropic", "openai"])
        self.assertEqual([each.common.weight for each in config.providers], [1, 0])

    def test_order_of_extensions(self) -> None:
        """Extensions are in the order of the file, which makes a difference."""
        limit, logging = "[extensions.limit]\nper_minute = 5\n", "[extensions.logging]\n"
        one, other = self.load(KEY + PROVIDER + logging + limit), self.load(KEY + PROVIDER + limit + logging)
        self.assertEqual([each.name for each in one.extensions], ["logging", "limit"])
        self.assertEqual([each.name for each in other.extensions], ["limit", "logging"])
        self.assertEqual(one.extensions[1].settings, Limit.Settings(5))
        self.assertNotEqual(one, other)

    def test_storage(self) -> None:
        """The storage's other keys are its maker's."""
        storage = self.load(KEY + PROVIDER + '[storage]\nkind = "disk"\nper_minute = 2').storage
        self.assertEqual((storage.kind, storage.settings), ("disk", Limit.Settings(2)))

    def test_ledger(self) -> None:
        """The ledger may be another than the storage; what all ledgers have is apart from its own."""
        table = '[ledger]\nkind = "disk"\nper_minute = 2\njournal = "notes"\nkeep_days = 0\n'
        config = self.load(KEY + PROVIDER + table)
        assert config.ledger is not None
        self.assertEqual((config.storage.kind, config.ledger.kind), ("sqlite", "disk"))
        self.assertEqual(config.ledger.common, LedgerSettings(journal="notes", keep_days=0))
        self.assertEqual(config.ledger.settings, Limit.Settings(2))

    def test_no_ledger(self) -> None:
        """The kind "none" is no ledger at all."""
        self.assertIsNone(self.load(KEY + PROVIDER + '[ledger]\nkind = "none"').ledger)

    def test_prices(self) -> None:
        """A model's own prices are read, and every fault in them is told."""
        config = self.load(f'{KEY}{PROVIDER}[models."a/b"]\ninput = 0.00875\noutput = 1\n')
        self.assertEqual(config.models["a/b"].row("a/b").rates.input, 8750)
        told = self.complaints(
            f"{KEY}{PROVIDER}[models]\nx = 1\n[models.y]\ninput = -1\noutput = 1\n"
            "[models.z]\ninput = 0.0000001\noutput = 1\n"
        )
        self.assertEqual(
            ["models.x", "models.y.input", "models.z"], [each.partition(":")[0] for each in told]
        )

    def test_aliases_and_models_of_keys(self) -> None:
        """A key may list models and aliases; both are known when the file has them further down."""
        config = self.load(f'{KEY}models = ["small", "fast"]\n[aliases]\nfast = "large"\n{PROVIDER}')
        self.assertEqual(config.keys[0].models, ("small", "fast"))
        self.assertEqual(dict(config.aliases), {"fast": "large"})

    def test_environment(self) -> None:
        """Variables are filled in everywhere, and a comment's are nobody's business."""
        text = f'{KEY}{PROVIDER}api_key = "${{K}}" # ${{NO_SUCH}}\nbase_url = "${{U:-http://x}}"'
        settings = self.load(text, {"K": 'quoted " and \n'}).providers[0].settings
        self.assertEqual(settings, Upstream.Settings(Secret('quoted " and \n'), "http://x"))

    def test_anonymous(self) -> None:
        """A gateway without keys has to say so."""
        config = self.load("allow_anonymous = true" + PROVIDER)
        self.assertEqual((config.keys, config.allow_anonymous), ((), True))

    def test_comparable(self) -> None:
        """Loading one text twice gives equals, another text something else."""
        text = KEY + PROVIDER + '[aliases]\na = "small"'
        self.assertEqual(self.load(text), self.load(text))
        self.assertNotEqual(self.load(text), self.load(text.replace("sk-ann", "sk-bob")))
        self.assertNotEqual(self.load(text), self.load(text.replace('a = "small"', 'a = "large"')))

    def test_printed_without_secrets(self) -> None:
        """A configuration can be printed; its secrets are not."""
        shown = repr(self.load(f'admin_token = "hunter2"{KEY}{PROVIDER}api_key = "hunter3"'))
        for secret in ("hunter", "sk-ann"):
            self.assertNotIn(secret, shown)

    def test_frozen(self) -> None:
        """A configuration cannot be changed."""
        config: Any = self.load(KEY + PROVIDER)
        with self.assertRaises(attrs.exceptions.FrozenInstanceError):
            config.listen = ()
        with self.assertRaises(TypeError):
            config.aliases["a"] = "b"

    def test_byte_order_mark(self) -> None:
        """A mark that an editor left at the file's beginning is passed over."""
        self.assertEqual(self.load(b"\xef\xbb\xbf" + (KEY + PROVIDER).encode()).keys[0].name, "ann")


class TestFile(Loading):
    def test_missing(self) -> None:
        """A file that is not there is named."""
        error = self.assertRaises(ConfigurationError, load, "no/such.toml", {}, MAKERS)
        self.assertEqual(error.complaints, ["no/such.toml: cannot be read: No such file or directory"])

    def test_directory(self) -> None:
        """A directory is no file."""
        path = self.mktemp()
        os.mkdir(path)
        error = self.assertRaises(ConfigurationError, load, path, {}, MAKERS)
        self.assertIn("cannot be read", error.complaints[0])

    def test_syntax(self) -> None:
        """What is no TOML is told with its line."""
        self.assertRegex(self.complaint("a = 1\nb = = 2\n"), "not valid TOML: .*line 2")

    def test_encoding(self) -> None:
        """What is no UTF-8 is told with its line."""
        self.assertIn("line 2 is not UTF-8", self.complaint(b"# a\n# \xff\n"))

    def test_outlandish_toml(self) -> None:
        """What only exhausts the parser is a complaint as well."""
        deep = "a = " + "[" * 100000 + "]" * 100000
        dotted = ".".join(["a"] * 2000) + " = 1"
        for text in (deep, dotted, "a = " + "1" * 5000):
            self.assertIn("not valid TOML", self.complaint(text))


class TestComplaints(Loading):
    def test_everything_at_once(self) -> None:
        """One loading finds the faults of every section."""
        found = self.complaints(
            """
            listn = "x"
            ping_seconds = 0
            [providers.anthropic]
            models = ["small"]
            timout = 3
            base_ulr = "x"
            max_retries = -1
            api_key = "${NO_SUCH}"
            [[keys]]
            name = "ann"
            key = "a"
            models = ["smal"]
            [aliases]
            a = "larg"
            [extensions.limt]
            [extensions.limit]
            per_minute = "x"
            [storage]
            kind = "dis"
            """
        )
        beginnings = (
            "providers.anthropic.api_key: the environment variable NO_SUCH",
            'listn: unknown key; did you mean "listen"?',
            "ping_seconds: must be greater than 0",
            "providers.anthropic.max_retries: must be 0 or more",
            'providers.anthropic.timout: unknown key; did you mean "timeout"?',
            'providers.anthropic.base_ulr: unknown key; did you mean "base_url"?',
            'extensions.limt: there is no extension "limt"; did you mean "limit"?',
            "extensions.limit.per_minute: must be a whole number",
            'storage.kind: there is no storage kind "dis"; did you mean "disk"?',
            'aliases.a: no provider serves "larg"',
            'keys[0].models[0]: there is no model or alias "smal"; did you mean "small"?',
        )
        self.assertEqual(len(found), len(beginnings), found)
        for complaint, beginning in zip(found, beginnings, strict=True):
            self.assertTrue(complaint.startswith(beginning), complaint)

    def test_unknown_kind(self) -> None:
        """A kind that nobody makes is told with the nearest, with all, and with what failed to load."""
        complaint = self.complaint(KEY + PROVIDER + '[providers.x]\nkind = "opnai"\nmodels = ["m"]')
        for part in (
            '"opnai"',
            'did you mean "openai"',
            "anthropic, openai",
            "ImportError: no acme",
            "dropin.cache",
        ):
            self.assertIn(part, complaint)
        self.assertTrue(complaint.startswith("providers.x.kind: "))

    def test_kind_of_the_wrong_type(self) -> None:
        """A kind that is no string is one complaint."""
        text = KEY + PROVIDER + '[providers.x]\nkind = 3\nmodels = ["m"]'
        self.assertEqual(self.complaint(text), "providers.x.kind: must be a string, not a whole number")
        text = KEY + PROVIDER + "[storage]\nkind = 3"
        self.assertEqual(self.complaint(text), "storage.kind: must be a string")

    def test_unknown_ledger(self) -> None:
        """A kind of ledger that nobody makes is told with all that there are, none included."""
        complaint = self.complaint(KEY + PROVIDER + '[ledger]\nkind = "nome"')
        self.assertTrue(complaint.startswith("ledger.kind: "), complaint)
        for part in ('did you mean "none"?', "There are: disk, greedy, none, sqlite."):
            self.assertIn(part, complaint)

    def test_settings_of_no_ledger(self) -> None:
        """Whoever keeps no ledger and sets something for it is told of each such key."""
        found = self.complaints(KEY + PROVIDER + '[ledger]\nkind = "none"\nkeep_days = 3\npath = "x"')
        self.assertEqual([each.partition(": ")[0] for each in found], ["ledger.keep_days", "ledger.path"])
        for complaint in found:
            self.assertIn('kind = "none"', complaint)

    def test_faults_in_ledger(self) -> None:
        """Every fault is told: in what all ledgers have, in what one has, and in their names."""
        text = '[ledger]\nkind = "disk"\nper_minute = "x"\nkeep_dayz = 1\nkeep_records = -1\njournal = " "'
        found = "\n".join(self.complaints(KEY + PROVIDER + text))
        for part in (
            "ledger.per_minute: must be a whole number",
            'ledger.keep_dayz: unknown key; did you mean "keep_days"?',
            "ledger.keep_records: must be 0 or more",
            "ledger.journal: must not be blank",
        ):
            self.assertIn(part, found)
        complaint = self.complaint(KEY + PROVIDER + "[ledger]\njournal_max_bytes = 1048575")
        self.assertEqual(complaint, "ledger.journal_max_bytes: must be 1048576 or more")

    def test_greedy_ledger(self) -> None:
        """A ledger's maker cannot take what belongs to all."""
        complaint = self.complaint(KEY + PROVIDER + '[ledger]\nkind = "greedy"')
        self.assertIn("may not have settings called ['journal']", complaint)

    def test_no_providers(self) -> None:
        """A gateway without providers serves nothing."""
        for text in (KEY, KEY + "[providers]"):
            self.assertIn("providers: there are none", self.complaint(text))

    def test_no_keys(self) -> None:
        """Without keys the complaint says how to have them, and how to do without."""
        complaint = self.complaint("keys = []" + PROVIDER)
        self.assertIn("[[keys]]", complaint)
        self.assertIn("allow_anonymous = true", complaint)

    def test_keys_and_anonymous(self) -> None:
        """Keys make no sense where nobody needs one."""
        self.assertIn("allow_anonymous: ", self.complaint("allow_anonymous = true" + KEY + PROVIDER))

    def test_sections_of_the_wrong_type(self) -> None:
        """A section that is no table is told how to begin one, and is not called missing."""
        text = "providers = 1\naliases = 1\nextensions = 1\nstorage = 1\nledger = 1\nkeys = 1"
        found = {complaint.split(":")[0]: complaint for complaint in self.complaints(text)}
        self.assertEqual(set(found), {"providers", "aliases", "extensions", "storage", "ledger", "keys"})
        self.assertIn("[providers]", found["providers"])
        self.assertIn("[[keys]]", found["keys"])

    def test_tables_of_the_wrong_type(self) -> None:
        """A provider and an extension are tables."""
        text = f"{KEY}{PROVIDER}[providers]\nx = 1"
        self.assertIn("providers.x: must be a table", self.complaint(text.replace("anthropic", "openai")))
        self.assertIn(
            "extensions.limit: must be a table", self.complaint(f"{KEY}{PROVIDER}[extensions]\nlimit = 1")
        )

    def test_models_of_a_provider(self) -> None:
        """A provider serves at least one model, each once, none of them called "*"."""
        for models, words in (
            ("[]", ".models: must not be empty"),
            ('["a", {name = "a"}]', '.models[1]: "a" is in the list already, at [0]'),
            ('["a", "*"]', '.models[1]: no model can be called "*"'),
            ('["a", ""]', ".models[1].name: must be 1 to 256 printable"),
            ('["a", "b\\n"]', ".models[1].name: must be 1 to 256 printable"),
            ('[{name = "a", upstream = ""}]', ".models[0].upstream: must be 1 to 256 printable"),
            ('[{upstream = "a"}]', ".models[0].name: is missing"),
        ):
            complaint = self.complaint(f"{KEY}[providers.openai]\nmodels = {models}")
            self.assertTrue(complaint.startswith(f"providers.openai{words}"), complaint)

    def test_names(self) -> None:
        """Providers, keys and extensions have plain names."""
        long = "x" * 65
        for text, path in (
            (f'{PROVIDER.replace("anthropic", long)}kind = "openai"{KEY}', f"providers.{long}: the name"),
            (f'{PROVIDER}[providers."a b"]\n{KEY}', 'providers."a b": the name'),
            (f'{PROVIDER}[extensions."a\\n"]\n{KEY}', 'extensions."a\\n": the name'),
            (PROVIDER + KEY.replace("ann", "a/b"), "keys[0].name: must be 1 to 64"),
            (PROVIDER + KEY.replace("ann", ""), "keys[0].name: must be 1 to 64"),
        ):
            complaint = self.complaint(text)
            self.assertTrue(complaint.startswith(path), complaint)

    def test_names_of_keys(self) -> None:
        """No two keys have one name or one secret."""
        self.assertEqual(
            self.complaints(KEY + KEY + PROVIDER),
            [
                'keys[1].name: keys[0] is called "ann" already',
                "keys[1].key: is the same as that of keys[0]; generate another",
            ],
        )

    def test_key_like_the_admin_token(self) -> None:
        """A client's key must not open the admin routes."""
        complaint = self.complaint('admin_token = "sk-ann"' + KEY + PROVIDER)
        self.assertIn("keys[0].key: is the same as admin_token", complaint)

    def test_unfit_secrets(self) -> None:
        """Blank secrets, and those that no header can carry, are refused and never shown."""
        for secret, words in (
            ("", "must not be blank"),
            (" ", "must not be blank"),
            ("hun\\n", "visible ASCII"),
        ):
            complaint = self.complaint(KEY.replace("sk-ann", secret) + PROVIDER)
            self.assertTrue(complaint.startswith("keys[0].key: ") and words in complaint, complaint)
            complaint = self.complaint(f'admin_token = "{secret}"{KEY}{PROVIDER}')
            self.assertTrue(complaint.startswith("admin_token: ") and words in complaint, complaint)

    def test_models_of_a_key(self) -> None:
        """A key lists something, and nothing unknown."""
        self.assertIn("keys[0].models: must not be empty", self.complaint(f"{KEY}models = []{PROVIDER}"))
        self.assertEqual(
            self.complaint(f'{KEY}models = ["*", "larje"]{PROVIDER}'),
            'keys[0].models[1]: there is no model or alias "larje"; did you mean "large"?',
        )

    def test_aliases(self) -> None:
        """An alias leads to a served model in one step, and hides none."""
        for aliases, words in (
            ('a = "smal"', 'aliases.a: no provider serves "smal"; did you mean "small"?'),
            ('a = "b"\nb = "small"', 'aliases.a: "b" is an alias too, and aliases are not followed further'),
            ('a = "a"', "aliases.a: names itself"),
            ('small = "large"', "aliases.small: a provider serves a model of that name"),
            ("a = 1", "aliases.a: must be a string"),
            ('"*" = "small"', 'aliases."*": the name means all models'),
            ('" " = "small"', 'aliases." ": the name must be 1 to 256'),
        ):
            complaint = self.complaint(f"{KEY}{PROVIDER}[aliases]\n{aliases}")
            self.assertTrue(complaint.startswith(words), complaint)

    def test_cycle_of_aliases(self) -> None:
        """Aliases that lead to each other are each told so."""
        found = self.complaints(f'{KEY}{PROVIDER}[aliases]\na = "b"\nb = "a"')
        self.assertEqual(
            [complaint.split(" is ")[0] for complaint in found], ['aliases.a: "b"', 'aliases.b: "a"']
        )

    def test_no_false_complaints(self) -> None:
        """Models that cannot be read are one fault; names that may be among them are not called unknown."""
        text = f'{KEY}models = ["m"]\n[aliases]\na = "m"\n[providers.openai]\nmodels = ["${{M}}"]'
        self.assertIn("variable M", self.complaint(text))

    def test_unset_variables_are_one_fault_each(self) -> None:
        """A value that could not be filled in is complained of once, wherever it stands."""
        text = f'''listen = "${{A}}"\n{KEY}{PROVIDER}[providers.x]\nkind = "${{A}}"\nmodels = ["m"]
        [aliases]\na = "${{A}}"\n[storage]\nkind = "${{A}}"\n[extensions]\nlimit = "${{A}}"'''
        found = self.complaints(text)
        paths = [complaint.removesuffix("; set it, or write ${A:-default}") for complaint in found]
        self.assertEqual(
            paths,
            [
                f"{path}: the environment variable A is not set"
                for path in ("listen", "providers.x.kind", "aliases.a", "storage.kind", "extensions.limit")
            ],
        )

    def test_listen(self) -> None:
        """There is somewhere to listen."""
        self.assertIn("listen: must not be empty", self.complaint("listen = []" + KEY + PROVIDER))
        self.assertIn("listen: must not be blank", self.complaint('listen = ["a:1", " "]' + KEY + PROVIDER))

    def test_numbers(self) -> None:
        """Every number has a bound, and 0 is allowed only where it means something."""
        for key in ("retry_deadline", "connection_wait", "weight", "max_retries"):
            self.assertIn("0 or more", self.complaint(f"{KEY}{PROVIDER}{key} = -1"))
            self.load(f"{KEY}{PROVIDER}{key} = 0")
        for key in ("timeout", "connect_timeout", "idle_timeout", "max_connections"):
            self.assertIn("greater than 0", self.complaint(f"{KEY}{PROVIDER}{key} = 0"))
        for field in attrs.fields(Config):
            if type(field.default) in (int, float):
                complaint = self.complaint(f"{field.name} = -1{KEY}{PROVIDER}")
                self.assertTrue(complaint.startswith(f"{field.name}: must be "), complaint)

    def test_no_secret_is_told(self) -> None:
        """Complaints about a file full of faults hold none of its secrets."""
        text = """
        admin_token = "hunter2\\n"
        [providers.openai]
        models = []
        api_key = "hunter2${"
        [[keys]]
        name = "hunter2 as name"
        key = "hunter2"
        [[keys]]
        name = "b"
        key = "hunter2"
        models = 3
        """
        self.assertNotIn("hunter2", "\n".join(self.complaints(text)))
