"""Reading tables: what fits, what is complained of, and that secrets stay secret."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.settings import (
    ONE_IS_ENOUGH,
    UNUSABLE,
    Secret,
    did_you_mean,
    expand,
    header_word,
    key_path,
    model_name,
    not_blank,
    not_empty,
    not_negative,
    positive,
    read,
    word,
)


@attrs.frozen
class Wheel:
    SHORTHAND: ClassVar[str] = "name"

    name: str
    spokes: int = attrs.field(default=32, validator=positive)


@attrs.frozen
class Bicycle:
    name: str
    weight: float | None = attrs.field(default=None, validator=positive)
    gears: int = attrs.field(default=3, validator=not_negative)
    bell: bool = True
    brake: Literal["rim", "disc"] = "rim"
    lock: Secret | None = None
    wheels: tuple[Wheel, ...] = ()
    colours: tuple[str, ...] = attrs.field(default=("red",), validator=not_empty, metadata=ONE_IS_ENOUGH)
    prices: Mapping[str, float] = MappingProxyType({})
    spare: Wheel | None = None


@attrs.frozen
class Crossed:
    lowest: int
    highest: int

    def __attrs_post_init__(self) -> None:
        if self.lowest > self.highest:
            raise ValueError("lowest must not exceed highest")


@attrs.frozen
class Numbered:
    gear: Literal[1, 2]


@attrs.frozen
class Unreadable:
    both: int | str = 1


class TestReading(SynchronousTestCase):
    def read(self, **table: object) -> Bicycle:
        complaints: list[str] = []
        bicycle = read(Bicycle, {"name": "b", **table}, "shed", complaints)
        self.assertEqual(complaints, [])
        assert bicycle is not None
        return bicycle

    def complaints(self, **table: object) -> list[str]:
        complaints: list[str] = []
        self.assertIsNone(read(Bicycle, {"name": "b", **table}, "shed", complaints))
        return complaints

    def test_defaults(self) -> None:
        """Keys that are left out have their defaults."""
        self.assertEqual(self.read(), Bicycle("b"))

    def test_whole_number_for_a_float(self) -> None:
        """A whole number does where a float is wanted, and becomes one."""
        weight = self.read(weight=12).weight
        self.assertEqual((weight, type(weight)), (12.0, float))

    def test_everything_fits(self) -> None:
        """Every kind of annotation is read from its TOML counterpart."""
        bicycle = self.read(
            gears=0,
            bell=False,
            brake="disc",
            lock="1234",
            wheels=[{"name": "front", "spokes": 24}, "rear"],
            colours=["red", "green"],
            prices={"new": 100, "used": 10.5},
            spare="third",
        )
        self.assertEqual(bicycle.wheels, (Wheel("front", 24), Wheel("rear")))
        self.assertEqual((bicycle.gears, bicycle.bell, bicycle.brake), (0, False, "disc"))
        self.assertEqual((bicycle.lock, bicycle.colours), (Secret("1234"), ("red", "green")))
        self.assertEqual(dict(bicycle.prices), {"new": 100.0, "used": 10.5})
        self.assertEqual(bicycle.spare, Wheel("third"))

    def test_lone_string_for_an_array(self) -> None:
        """A field that says so takes one string instead of an array of strings."""
        self.assertEqual(self.read(colours="blue").colours, ("blue",))

    def test_results_are_frozen(self) -> None:
        """Tables with free keys cannot be changed afterwards."""
        prices: Any = self.read(prices={"new": 1}).prices
        with self.assertRaises(TypeError):
            prices["new"] = 2

    def test_null(self) -> None:
        """JSON's null is None where that may be, and of the wrong type elsewhere."""
        self.assertEqual((None, None), (self.read(weight=None, lock=None).weight, self.read(lock=None).lock))
        self.assertEqual(["shed.bell: must be true or false, not null"], self.complaints(bell=None))

    def test_wrong_types(self) -> None:
        """A value of the wrong type is named by its path, what is wanted, and what it is."""
        for key, value, words in (
            ("name", 3, "a string, not a whole number"),
            ("gears", True, "a whole number, not true or false"),
            ("gears", 1.0, "a whole number, not a decimal number"),
            ("weight", False, "a number, not true or false"),
            ("weight", "12", "a number, not a string"),
            ("bell", 1, "true or false, not a whole number"),
            ("lock", 1234, "a string, not a whole number"),
            ("wheels", "front", "an array, not a string"),
            ("colours", 3, "an array, not a whole number"),
            ("prices", [1], "a table, not an array"),
            ("spare", 3, "a string or a table, not a whole number"),
            ("name", datetime.date(2000, 1, 1), "a string, not a date or time"),
        ):
            self.assertEqual(self.complaints(**{key: value}), [f"shed.{key}: must be {words}"])

    def test_paths_lead_into_arrays_and_tables(self) -> None:
        """The path of a complaint says which item of which array, and which key."""
        self.assertEqual(
            self.complaints(wheels=["a", {"name": "b", "spokes": 0}, 3], prices={"a b": "x"}),
            [
                "shed.wheels[1].spokes: must be greater than 0",
                "shed.wheels[2]: must be a string or a table, not a whole number",
                'shed.prices."a b": must be a number, not a string',
            ],
        )

    def test_numbers_out_of_range(self) -> None:
        """What is no finite number, or more than 64 bits hold, is refused."""
        for value in (float("nan"), float("inf"), float("-inf")):
            self.assertEqual(self.complaints(weight=value), ["shed.weight: must be a finite number"])
        for value in (2**63, -(2**64), 10**400):
            self.assertEqual(self.complaints(weight=value), ["shed.weight: is too large a number"])

    def test_choices(self) -> None:
        """A value that is no choice is not repeated; the choices and the nearest one are told."""
        self.assertEqual(
            self.complaints(brake="disk"), ['shed.brake: must be one of "rim", "disc"; did you mean "disc"?']
        )
        self.assertEqual(self.complaints(brake=1), ['shed.brake: must be one of "rim", "disc"'])

    def test_choices_of_numbers(self) -> None:
        """True is not the choice 1, though Python says that they are equal."""
        complaints: list[str] = []
        self.assertEqual(read(Numbered, {"gear": 1}, "", complaints), Numbered(1))
        self.assertIsNone(read(Numbered, {"gear": True}, "", complaints))
        self.assertEqual(complaints, ["gear: must be one of 1, 2"])

    def test_unknown_key(self) -> None:
        """An unknown key is told with the nearest one, or with all if none is near."""
        self.assertEqual(self.complaints(geers=1), ['shed.geers: unknown key; did you mean "gears"?'])
        complaints: list[str] = []
        read(Wheel, {"name": "a", "zzz": 1}, "", complaints)
        self.assertEqual(complaints, ["zzz: unknown key; known keys: name, spokes"])

    def test_suggestions_from_elsewhere(self) -> None:
        """Keys that somebody else reads are suggested too, though they may not be in the table."""
        complaints: list[str] = []
        read(Wheel, {"name": "a", "timout": 1}, "", complaints, elsewhere=["timeout"])
        self.assertEqual(complaints, ['timout: unknown key; did you mean "timeout"?'])

    def test_missing_key(self) -> None:
        """A key without default must be there."""
        complaints: list[str] = []
        self.assertIsNone(read(Bicycle, {}, "", complaints))
        self.assertEqual(complaints, ["name: is missing; add it (a string)"])

    def test_all_at_once(self) -> None:
        """One reading finds every fault."""
        found = self.complaints(name=1, weight=-1, gears="", bell=2, colours=[], lock=" ", zzz=1)
        self.assertEqual(len(found), 7)

    def test_faults_between_keys(self) -> None:
        """A class may refuse a combination, which is told with the table's path."""
        complaints: list[str] = []
        self.assertIsNone(read(Crossed, {"lowest": 2, "highest": 1}, "range", complaints))
        self.assertEqual(complaints, ["range: lowest must not exceed highest"])

    def test_unusable_is_not_complained_of_again(self) -> None:
        """What could not be expanded makes no second complaint, and nothing to use."""
        complaints: list[str] = []
        self.assertIsNone(read(Bicycle, {"name": UNUSABLE, "colours": [UNUSABLE]}, "", complaints))
        self.assertEqual(complaints, [])

    def test_annotations_that_cannot_be_read(self) -> None:
        """A settings class that asks for what TOML cannot say is its author's mistake."""
        with self.assertRaisesRegex(TypeError, "one type and None at most"):
            read(Unreadable, {"both": 1}, "", [])

    def test_no_value_is_repeated(self) -> None:
        """Complaints never hold what the file says, which may be a secret in the wrong place."""
        found = self.complaints(
            gears="hunter2", brake="hunter2", wheels=["x", ["hunter2"]], prices={"a": "hunter2"}
        )
        self.assertEqual(len(found), 4)
        self.assertNotIn("hunter2", "".join(found))


class TestSecret(SynchronousTestCase):
    def test_never_printed(self) -> None:
        """No way of formatting gives a secret away, not even inside a record."""
        secret = Secret("hunter2")
        shown = f"{secret} {secret!r} {secret!s} {'%s' % secret} {Bicycle('b', lock=secret)}"  # noqa: UP031 - the old way counts too
        self.assertNotIn("hunter2", shown)
        self.assertEqual(str(secret), "<redacted>")

    def test_revealed(self) -> None:
        """Only `reveal` gives the text."""
        self.assertEqual(Secret("hunter2").reveal(), "hunter2")

    def test_equality(self) -> None:
        """Secrets with one text are equal, hash alike, and equal no string."""
        self.assertEqual(Secret("a"), Secret("a"))
        self.assertEqual(hash(Secret("a")), hash(Secret("a")))
        self.assertNotEqual(Secret("a"), Secret("b"))
        self.assertNotEqual(Secret("a"), "a")

    def test_bytes_of_the_environment(self) -> None:
        """Text from an environment that is no UTF-8 can be compared."""
        self.assertNotEqual(Secret("a\udcff"), Secret("a"))

    def test_blank(self) -> None:
        """A blank secret is refused."""
        for text in ("", " ", "\n\t"):
            self.assertRaises(ValueError, Secret, text)


class TestExpanding(SynchronousTestCase):
    def expand(self, value: object, **environ: str) -> object:
        complaints: list[str] = []
        expanded = expand(value, environ, "", complaints)
        self.assertEqual(complaints, [])
        return expanded

    def fault(self, text: str, **environ: str) -> str:
        complaints: list[str] = []
        self.assertIs(expand(text, environ, "a.b", complaints), UNUSABLE)
        (complaint,) = complaints
        return complaint

    def test_variables(self) -> None:
        """Variables are filled in wherever they stand, once: what they hold is not looked at."""
        self.assertEqual(self.expand("<${A}-${B}>", A="1", B="${A}"), "<1-${A}>")

    def test_default(self) -> None:
        """A default is for a variable that is unset or empty."""
        self.assertEqual(self.expand("${A:-x y}"), "x y")
        self.assertEqual(self.expand("${A:-x}", A=""), "x")
        self.assertEqual(self.expand("${A:-x}", A="1"), "1")
        self.assertEqual(self.expand("${A:-}"), "")

    def test_empty_variable(self) -> None:
        """A variable that is set to nothing is nothing."""
        self.assertEqual(self.expand("<${A}>", A=""), "<>")

    def test_literal(self) -> None:
        """A doubled dollar sign keeps the brace from meaning anything; others mean nothing anyway."""
        self.assertEqual(self.expand("$${A} $A $$ {} $", A="1"), "${A} $A $$ {} $")

    def test_nested_values(self) -> None:
        """Strings in tables and arrays are expanded; keys and other values stay as they are."""
        self.assertEqual(
            self.expand({"${A}": ["${A}", 3, {"b": "${A}"}]}, A="x"), {"${A}": ["x", 3, {"b": "x"}]}
        )

    def test_unset(self) -> None:
        """An unset variable without default is a complaint with its name and its path."""
        self.assertEqual(
            self.fault("${NO_SUCH}"),
            "a.b: the environment variable NO_SUCH is not set; set it, or write ${NO_SUCH:-default}",
        )

    def test_unterminated(self) -> None:
        """An open brace must be closed."""
        self.assertIn("without a closing", self.fault("hunter2${A", A="1"))

    def test_no_name(self) -> None:
        """What stands in the braces must be a name, and a default may not refer to another variable."""
        for text in ("${}", "${1A}", "${a-b}", "${A-b}", "${:-b}", "${ A }", "${A:-${B}}"):
            self.assertIn("expected `${VAR}`", self.fault(text, A="1", B="2"))

    def test_faults_hold_no_text(self) -> None:
        """A complaint does not repeat the string around the fault."""
        self.assertNotIn("hunter2", self.fault("hunter2${hunter2 x}"))

    def test_path_of_an_item(self) -> None:
        """The path of a fault leads through tables and arrays."""
        complaints: list[str] = []
        expand({"a": [{"b c": "${"}]}, {}, "", complaints)
        self.assertTrue(complaints[0].startswith('a[0]."b c": '))

    @given(st.text(alphabet="${}A:-x"))
    @settings(deadline=None)
    def test_escaped_text_survives(self, text: str) -> None:
        """Any text survives when each `${` in it is written `$${`."""
        self.assertEqual(expand(text.replace("${", "$${"), {}, "", []), text)


class TestValidators(SynchronousTestCase):
    def check(self, validator: Any, good: list[object], bad: list[object]) -> None:
        for value in [*good, None]:
            validator(None, None, value)
        for value in bad:
            with self.assertRaises(ValueError, msg=repr(value)):
                validator(None, None, value)

    def test_numbers(self) -> None:
        """`positive` excludes 0, `not_negative` does not."""
        self.check(positive, [1, 0.1], [0, -1, 0.0])
        self.check(not_negative, [0, 1], [-1, -0.1])

    def test_texts(self) -> None:
        """`not_blank` and `not_empty` want something to be there."""
        self.check(not_blank, ["a", Secret("a")], ["", " \n"])
        self.check(not_empty, [("a",), "a"], [(), ""])

    def test_words(self) -> None:
        """`word` allows letters, digits and `._-`, 64 of them, but not what a path is without."""
        self.check(word, ["a", "A.b_c-9", "a" * 64], ["", "a b", "a/b", "é", "a\n", "a" * 65])
        self.check(word, ["...", ".a", "a."], [".", ".."])

    def test_model_names(self) -> None:
        """`model_name` allows what can be seen, without spaces around it."""
        self.check(model_name, ["a/b:c@d e", "é", "m" * 256], ["", " a", "a ", "a\nb", "a\x00", "m" * 257])

    def test_header_words(self) -> None:
        """`header_word` allows what may travel in a header, in a secret as well."""
        self.check(header_word, ["sk-1", Secret("x" * 1024)], [Secret("a\n"), "a b", "é", Secret("x" * 1025)])


class TestWords(SynchronousTestCase):
    def test_key_path(self) -> None:
        """A key that TOML would quote is quoted in a path."""
        self.assertEqual(key_path("", "a"), "a")
        self.assertEqual(key_path("a.b", "c-d_9"), "a.b.c-d_9")
        self.assertEqual(key_path("a", 'b."'), 'a."b.\\""')

    def test_did_you_mean(self) -> None:
        """The nearest word is suggested, in whatever case, and none if none is near."""
        self.assertEqual(did_you_mean("OPENIA", ["anthropic", "OpenAI"]), '; did you mean "OpenAI"?')
        self.assertEqual(did_you_mean("zzz", ["anthropic", "openai"]), "")
