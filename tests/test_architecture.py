"""
The house: which room stands on which, and how large a room may be.

The lists below are the design.  Change them when the design changes, knowingly; a new file needs its place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import crabtwist

PACKAGE = Path(crabtwist.__file__).parent
TESTS = Path(__file__).parent

WORDS = ("money", "settings", "periods", "terms", "values", "errors", "interfaces", "records")
GRAMMAR = (
    *("sse", "extension", "body", "headers"),
    *("dialects.base", "dialects.anthropic", "dialects.openai", "dialects.operations"),
    *("pricing", "receipts", "windows", "leases", "meters"),
    *("recording_reader", "recording"),
    *("accounts", "charges"),
)
POLICY = (
    "keys",
    "stored_keys",
    "seal",
    "directory",
    "health",
    "routing",
    "retry",
    "hooks",
    "metrics",
    "plugins",
    "discovery",
)
CLIENT_WIRES = ("http_response", "http_request", "http_client", "connection_pool", "upstream")
SERVER_WIRES = ("http_reader", "gateway_request", "channel", "listener")
NOTES = ("segments", "journal", "delivery", "retention")
WIRES = (
    *NOTES,
    "direct_writes",
    *CLIENT_WIRES,
    "relay",
    "plain_relay",
    "stream_relay",
    "downstream",
    *SERVER_WIRES,
)
STORY = ("bookkeeping", "attempt", "surroundings", "dispatch", "sharing", "exchange", "gateway")
CONFIGURATION = ("tables", "config", "generation", "admin_keys", "admin_providers", "administration")
DOORS = (
    *("web.answers", "web.admin_lock", "web.admission", "web.models", "web.operations", "web.process"),
    *("web.admin.reading", "web.admin.times", "web.admin.endpoint"),
    *("web.admin.shown", "web.admin.follow", "web.admin.inside"),
    *("web.admin.requests", "web.admin.usage", "web.admin.state"),
    *("web.admin.keys", "web.admin.providers"),
    *("web.admin.schemas", "web.admin.page", "web.admin.openapi"),
    *("web.extensions", "web.app"),
)
ASSEMBLY = ("first_start", "heap", "node", "tap")

#: From the ground up: a room knows those before it, and no other.
HOUSE = (*WORDS, *GRAMMAR, *POLICY, *WIRES, *STORY, *CONFIGURATION, *DOORS, *ASSEMBLY)

#: What the makers make, and the fakes: each knows the rooms named first, and its neighbours before it.
#: Nobody in the house knows them; they are found by their dotted paths.
OUTBUILDINGS = (
    (
        (*WORDS, *GRAMMAR, *CLIENT_WIRES),
        ("providers.local", "providers.http", "providers.anthropic", "providers.openai", "providers.echo"),
    ),
    (
        (*WORDS, *GRAMMAR),
        (
            "extensions.rate_limit",
            "extensions.budget_refusals",
            "extensions.budget",
            "extensions.usage_rows",
            "extensions.usage",
            "extensions.cache_store",
            "extensions.cache",
            "extensions.rotating_file",
            "extensions.redaction",
            "extensions.audit_trail",
            "extensions.logging_file",
            "extensions.logging",
            "extensions.audit",
        ),
    ),
    (
        (*WORDS, *GRAMMAR),
        (
            *("storage.memory", "storage.migrations", "storage.sqlite_boards", "storage.sqlite"),
            *("storage.redis_boards", "storage.redis"),
            *("storage.postgres_connection", "storage.postgres_lane"),
            *("storage.postgres_boards", "storage.postgres"),
        ),
    ),
    (
        # The ledger in PostgreSQL stands on the lanes and the migrations of the store there.
        (*WORDS, *GRAMMAR, "storage.migrations", "storage.postgres_connection", "storage.postgres_lane"),
        (
            *("ledger.columns", "ledger.spans", "ledger.schema", "ledger.sqlite_totals", "ledger.sqlite"),
            *("ledger.postgres_tables", "ledger.postgres"),
        ),
    ),
    (WORDS, ("testing",)),
    (
        # The command line asks a running gateway; its doctor looks at what one would be made of.
        (*WORDS, *GRAMMAR, *POLICY, *CONFIGURATION),
        (
            *("cli.faults", "cli.place", "cli.client", "cli.shown", "cli.session", "cli.words"),
            *("cli.environment", "cli.keys", "cli.providers", "cli.spending"),
            *("cli.request_lines", "cli.receipts", "cli.logs", "cli.serving"),
            *("cli.findings", "cli.folder_checks", "cli.plugin_checks", "cli.gateway_checks", "cli.doctor"),
            "cli.root",
        ),
    ),
)

#: The tests of those rooms that have none of their own name.
TESTED_BY = {
    "recording_reader": "test_recording",
    "money": "test_pricing",
    "terms": "test_keys",
    "tables": "test_config",
    "values": "test_dialects",
    "errors": "test_exchange",
    "interfaces": "test_testing",
    "extension": "test_hooks",
    "dialects": "test_dialects",
    "plugins": "test_discovery",
    "plain_relay": "test_relay",
    "stream_relay": "test_relay",
    "downstream": "test_exchange",
    "http_reader": "test_channel",
    "gateway_request": "test_channel",
    "attempt": "test_exchange",
    "gateway": "test_exchange",
    "web": "test_web",
    "generation": "integration/test_process",
    "node": "integration/test_process",
    "tap": "integration/test_process",
    "providers.echo": "test_echo",
    "providers.local": "test_echo",
    "providers": "test_http_providers",
    "extensions.logging": "test_logging_extension",
    "extensions.logging_file": "test_logging_extension",
    "extensions.rate_limit": "test_rate_limit",
    "meters": "test_rate_limit",
    "extensions.rotating_file": "test_audit",
    "extensions.redaction": "test_audit",
    "extensions.audit_trail": "test_audit",
    "extensions.audit": "test_audit",
    "extensions.budget": "test_budget",
    "extensions.budget_refusals": "test_budget",
    "accounts": "test_budget",
    "charges": "test_budget",
    "extensions.usage": "test_usage",
    "extensions.usage_rows": "test_usage",
    "extensions.cache": "test_cache",
    "extensions.cache_store": "test_cache",
    "storage.migrations": "test_storage_sqlite",
    "storage.sqlite_boards": "test_storage_sqlite",
    "storage.redis": "integration/test_storage_servers",
    "storage.redis_boards": "integration/test_storage_servers",
    "storage.postgres": "integration/test_storage_servers",
    "storage.postgres_lane": "integration/test_storage_servers",
    "storage.postgres_boards": "integration/test_storage_servers",
    "storage.postgres_connection": "integration/test_storage_servers",
    "segments": "test_journal",
    "delivery": "test_journal",
    "cli": "test_cli",
    "ledger.columns": "test_ledger_sqlite",
    "ledger.schema": "test_ledger_sqlite",
    "ledger.spans": "test_ledger_sqlite",
    "ledger.sqlite_totals": "test_ledger_sqlite",
    "ledger.postgres_tables": "integration/test_ledger_postgres",
    "ledger.postgres": "integration/test_ledger_postgres",
    "surroundings": "test_exchange",
    "dispatch": "test_exchange",
}

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60

#: Words that say that something does something, and not what.
EMPTY_WORDS = {"manager", "handler", "helper", "util", "utils", "core", "engine", "processor"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@cache
def rooms() -> dict[str, Path]:
    """Return all modules of the package by their names in it, those of packages themselves left out."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


@cache
def tree(path: Path) -> ast.Module:
    """Return a file's syntax."""
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every dotted name that a file imports, wherever in it; a relative one begins with a dot."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", True) for alias in node.names)


def known(path: Path) -> set[str]:
    """Return the rooms that a file imports, or imports something from."""
    everywhere, found = rooms(), set()
    for name, is_member in imports(path):
        if name.split(".")[0] == "crabtwist":
            room = name.removeprefix("crabtwist.")
            found.add(room.rpartition(".")[0] if is_member and room not in everywhere else room)
    return found


def names(path: Path) -> Iterator[str]:
    """Yield every name that a file gives to something."""
    yield path.stem
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


class DirectionTests(SynchronousTestCase):
    """Imports run down, so there is no cycle either."""

    def test_every_room_has_its_place(self) -> None:
        """The lists name every module, once."""
        listed = [*HOUSE, *(room for _, neighbours in OUTBUILDINGS for room in neighbours)]
        self.assertEqual(sorted(rooms()), sorted(listed))

    def test_the_house(self) -> None:
        """A room of the house imports only from rooms below it."""
        for position, room in enumerate(HOUSE):
            if room in rooms():
                self.assertEqual(set(), known(rooms()[room]) - set(HOUSE[:position]), f"{room} looks up")

    def test_the_outbuildings(self) -> None:
        """What is plugged in knows words and grammar, never the policy, the story or the doors."""
        for ground, neighbours in OUTBUILDINGS:
            for position, room in enumerate(neighbours):
                allowed = {*ground, *neighbours[:position]}
                self.assertEqual(set(), known(rooms()[room]) - allowed, f"{room} looks up")

    def test_packages_are_empty(self) -> None:
        """A package itself imports nothing, so that importing one room opens no other."""
        for path in PACKAGE.rglob("__init__.py"):
            self.assertEqual([], list(imports(path)), path)

    def test_absolute(self) -> None:
        """Every import names its room in full, and what it takes from there."""
        for room, path in rooms().items():
            odd = [name for name, _ in imports(path) if name.startswith(".") or name.endswith("*")]
            self.assertEqual([], odd, room)

    def test_no_hidden_imports(self) -> None:
        """Only the lazy makers import by name, and nothing is imported for type checkers alone."""
        by_name = {room for room, path in rooms().items() if "importlib" in dict(imports(path))}
        self.assertEqual({"plugins"}, by_name)
        for room, path in rooms().items():
            self.assertNotIn("typing.TYPE_CHECKING", dict(imports(path)), room)
            self.assertNotIn("__import__", path.read_text("utf-8"), room)

    def test_interfaces(self) -> None:
        """The contracts import zope.interface alone: every twistd and trial around loads them."""
        names = dict(imports(rooms()["interfaces"]))
        allowed = {"__future__.annotations", "zope.interface.Attribute", "zope.interface.Interface"}
        self.assertEqual(allowed, set(names))

    def test_reactor(self) -> None:
        """Nobody imports the reactor but the function of tap that twistd calls."""
        for room, path in rooms().items():
            found = [name for name, _ in imports(path) if name.startswith("twisted.internet.reactor")]
            self.assertEqual(["twisted.internet.reactor"] if room == "tap" else [], found, room)
        at_once = {alias.name for node in tree(rooms()["tap"]).body for alias in getattr(node, "names", [])}
        self.assertNotIn("reactor", at_once)

    def test_plugin_directory(self) -> None:
        """`twisted/plugins` belongs to everybody: an `__init__.py` there would hide the others."""
        for directory in (PACKAGE.parent / "twisted", PACKAGE.parent / "twisted" / "plugins"):
            self.assertFalse((directory / "__init__.py").exists())


class MeasureTests(SynchronousTestCase):
    """How large rooms and functions may be, and what they may not be called."""

    def test_files(self) -> None:
        """No file is longer than four hundred lines."""
        lengths = {room: len(path.read_text("utf-8").splitlines()) for room, path in rooms().items()}
        self.assertEqual({}, {room: length for room, length in lengths.items() if length > MOST_LINES})

    def test_functions(self) -> None:
        """No function is longer than sixty."""
        long = [
            f"{room}.{node.name}"
            for room, path in rooms().items()
            for node in ast.walk(tree(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_A_FUNCTION
        ]
        self.assertEqual([], long)

    def test_names(self) -> None:
        """Nothing is named by a word that says nothing."""
        empty = {
            f"{room}: {name}"
            for room, path in rooms().items()
            for name in names(path)
            if EMPTY_WORDS & {word.lower() for word in _WORD.findall(name)}
        }
        self.assertEqual(set(), empty)


class TestedTests(SynchronousTestCase):
    """Every room is tested, and every test says what for."""

    def test_every_room_is_tested(self) -> None:
        """Each module has a test of its name, or one that is named above."""
        for room in rooms():
            package = room.partition(".")[0]
            test = TESTED_BY.get(room) or TESTED_BY.get(package) or "test_" + room.replace(".", "_")
            self.assertTrue((TESTS / f"{test}.py").exists(), f"{room} has no {test}")

    def test_exceptions_are_needed(self) -> None:
        """The list of exceptions names rooms that exist, and none that has a test of its own name."""
        everywhere = {*rooms(), *(room.partition(".")[0] for room in rooms())}
        self.assertEqual(set(), set(TESTED_BY) - everywhere)
        own = {room for room in TESTED_BY if (TESTS / f"test_{room.replace('.', '_')}.py").exists()}
        self.assertEqual(set(), {room for room in own if TESTED_BY[room] != f"test_{room}"})

    def test_docstrings(self) -> None:
        """Every test method has a sentence that says which behaviour it holds on to."""
        mute = [
            f"{path.name}: {test.name}"
            for path in sorted(TESTS.rglob("test_*.py"))
            for case in ast.walk(tree(path))
            if isinstance(case, ast.ClassDef)
            for test in case.body
            if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)
            and test.name.startswith("test")
            and not (ast.get_docstring(test) or "").endswith((".", "?", "!"))
        ]
        self.assertEqual([], mute)
