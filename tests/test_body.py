"""The checks on request bodies, and the splices."""

import base64
import json
import pathlib

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist import body
from crabtwist.errors import Refusal

CASES = json.loads((pathlib.Path(__file__).parent / "data" / "json_cases.json").read_text())["payloads"]

#: What is no fault of the body's; everything else in the file is to be refused.
FINE = {"plain"}


def refusal_of(test: SynchronousTestCase, data: bytes) -> str:
    """Return the words in which `data` is refused."""
    refusal: Refusal = test.assertRaises(Refusal, body.read, data)
    test.assertEqual(400, refusal.status)
    return refusal.message


class RefusedBodiesTests(SynchronousTestCase):
    """What no two parsers read alike never goes upstream."""

    def test_collected_cases(self) -> None:
        """Every collected oddity is refused with a 400, and the plain request is not."""
        for name, encoded in CASES.items():
            data = base64.b64decode(encoded) if name != "depth-100000" else DEEP
            if name in FINE:
                self.assertEqual("tiny", body.read(data).model)
            else:
                refusal_of(self, data)

    def test_duplicate_key(self) -> None:
        """A key that the gateway reads may stand once, however it is escaped or capitalised."""
        for second in ('"model"', '"mod\\u0065l"', '"Model"', '"MODEL"'):
            words = refusal_of(self, f'{{"model":"a",{second}:"b"}}'.encode())
            self.assertIn('"model" stands twice', words)

    def test_other_spelling(self) -> None:
        """A key that another parser could take for one that the gateway reads is refused, with the cure."""
        self.assertIn('spelled "stream"', refusal_of(self, b'{"model":"a","Stream":true}'))
        self.assertIn('spelled "stream"', refusal_of(self, '{"model":"a","\u017ftream":true}'.encode()))

    def test_other_keys_may_repeat(self) -> None:
        """What the gateway does not read is the upstream's business."""
        self.assertEqual("a", body.read(b'{"model":"a","x":1,"x":2}').model)

    def test_depth(self) -> None:
        """Nesting up to the bound is fine, one level more is not; brackets in strings do not count."""
        for depth, fine in ((63, True), (64, False)):
            data = b'{"model":"a","x":' + b"[" * depth + b'"\\"]}\\\\"' + b"]" * depth + b"}"
            if fine:
                body.read(data)
            else:
                self.assertIn("deeper than 64", refusal_of(self, data))

    def test_brackets_in_strings_are_not_depth(self) -> None:
        """Text full of brackets is only text."""
        text = json.dumps({"model": "a", "x": '[{"' * 500 + "\\"})
        self.assertEqual("a", body.read(text.encode()).model)

    def test_half_a_surrogate_pair(self) -> None:
        """Half of a pair, which no UTF-8 can say, is refused in words that say so."""
        for half in ('"\\ud800"', '"\\ud800abcdefg"', '"\\udc00"', '"\\ud800\\u0041"'):
            self.assertIn("surrogate pair", refusal_of(self, f'{{"model":"a","x":{half}}}'.encode()))
            self.assertIn("surrogate pair", refusal_of(self, f'{{"x":{half},"model":"a"}}'.encode()))

    def test_too_much_to_look_through(self) -> None:
        """What would keep everybody waiting is refused: members without end, and brackets without end."""
        members = b"{" + b",".join(b'"k%d":1' % number for number in range(1001)) + b',"model":"a"}'
        self.assertIn("1000 members", refusal_of(self, members))
        brackets = b'{"model":"a","x":"' + b"[{" * 250_001 + b'"}'
        self.assertIn("500000 opening brackets", refusal_of(self, brackets))
        self.assertEqual("a", body.read(b'{"model":"a","x":"' + b"[{" * 200_000 + b'"}').model)

    def test_max_tokens(self) -> None:
        """Only whole numbers that every parser reads alike."""
        for bad in ("-1", "4.0", '"4"', "1e3", "true", str(10**18), "[4]", str(2**53)):
            refusal_of(self, f'{{"model":"a","max_tokens":{bad}}}'.encode())
        for good, read in (("0", 0), ("4", 4), ("null", None), (str(2**53 - 1), 2**53 - 1)):
            self.assertEqual(read, body.read(f'{{"model":"a","max_tokens":{good}}}'.encode()).max_tokens)

    def test_two_bounds(self) -> None:
        """Where both names of the bound stand the larger one counts: an upstream may know only that one."""
        for text in ('"max_tokens":1,"max_completion_tokens":2', '"max_tokens":2,"max_completion_tokens":0'):
            self.assertEqual(2, body.read(f'{{"model":"a",{text}}}'.encode()).max_tokens)

    def test_choices(self) -> None:
        """How many answers are asked for is read where it is a number; else it is the vendor's business."""
        for text, read in (("3", 3), ("0", 1), ("-1", 1), ("null", 1), ('"3"', 1), ("9" * 40, 1)):
            self.assertEqual(read, body.read(f'{{"model":"a","n":{text}}}'.encode()).choices)

    def test_stream(self) -> None:
        """True or false and nothing like it."""
        for bad in ('"false"', "1", "[]", "{}"):
            refusal_of(self, f'{{"model":"a","stream":{bad}}}'.encode())
        for good, read in (("true", True), ("false", False), ("null", False)):
            self.assertEqual(read, body.read(f'{{"model":"a","stream":{good}}}'.encode()).stream)

    def test_model(self) -> None:
        """A name is a printable string of a sane length."""
        for bad in ('""', "null", "7", '["a"]', '"a\\u0000"', '"a\\u2028"', '"' + "x" * 257 + '"'):
            refusal_of(self, f'{{"model":{bad}}}'.encode())


DEEP = b'{"model":"tiny","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=("L", "N", "P")), min_size=1)
white = st.text(" \t\r\n", max_size=2)


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, tuple[int, int]]:
    """A valid body, in any order, spacing and escaping, and where its model's value stands."""
    others = draw(st.dictionaries(st.text(max_size=6), values, max_size=4))
    others = {key: value for key, value in others.items() if key.casefold() not in body.KEYS_READ}
    model = draw(names)
    before = draw(st.integers(0, len(others)))
    items: list[tuple[str, object]] = list(others.items())
    items.insert(before, ("model", model))
    text, span = draw(white) + "{", (0, 0)
    for index, (key, value) in enumerate(items):
        ascii_only = draw(st.booleans())
        written = json.dumps(value, ensure_ascii=ascii_only)
        name = json.dumps(key)
        if key == "model" and draw(st.booleans()):
            name = '"' + "".join(f"\\u{ord(letter):04x}" for letter in key) + '"'
        text += (draw(white) + "," if index else "") + draw(white) + name + draw(white) + ":" + draw(white)
        if index == before:
            start = len(text.encode())
            span = (start, start + len(written.encode()))
        text += written
    return (text + draw(white) + "}" + draw(white)).encode("utf-8", "surrogatepass"), span


class SpliceTests(SynchronousTestCase):
    """What is renamed differs only where it says so."""

    @given(documents(), names)
    def test_only_the_span_differs(self, document: tuple[bytes, tuple[int, int]], renamed: str) -> None:
        """For any document the renamed body differs inside the model's value alone, and says the new name."""
        data, span = document
        read = body.read(data)
        self.assertEqual(span, read.span("model"))
        spliced = body.splice(data, read.renaming(renamed))
        start, end = span
        self.assertEqual(data[:start], spliced[:start])
        self.assertEqual(data[end:], spliced[len(spliced) - (len(data) - end) :])
        self.assertEqual(renamed, json.loads(spliced)["model"])
        self.assertEqual({**json.loads(data), "model": renamed}, json.loads(spliced))

    def test_look_alikes(self) -> None:
        """Nested members and text that look like the model stay as they are."""
        data = b'{"x":{"model":"a"},"y":"\\"model\\":\\"a\\"", "model" : "a" ,"z":["model"]}'
        read = body.read(data)
        self.assertEqual(data.replace(b' : "a"', b' : "b"'), body.splice(data, read.renaming("b")))

    def test_same_name_is_same_object(self) -> None:
        """Nothing to rename, nothing to copy."""
        data = b'{"model":"\\u0061"}'
        read = body.read(data)
        self.assertIs(data, body.splice(data, read.renaming("a")))

    def test_setting(self) -> None:
        """A member is replaced where it stands, or added at the front; every other byte stays."""
        data = b' { "model":"a", "z": null}'
        read = body.read(data)
        edits = [*read.renaming("bc"), read.setting("y", b"{}"), read.setting("z", b"1")]
        self.assertEqual(b' { "y":{},"model":"bc", "z": 1}', body.splice(data, edits))

    def test_setting_in_an_empty_object(self) -> None:
        """No comma is left behind."""
        empty = body.JSONObject.parse(b"{ }")
        assert empty is not None
        self.assertEqual(b'{ "a":1}', body.splice(empty.data, [empty.setting("a", b"1")]))
