"""
TOML tables read into frozen attrs classes: every fault is found at once and named by its key.

A settings class is an attrs class whose fields are the keys that its table may have.  Annotations say
what fits: `str`, `int`, `float` (a whole number will do), `bool`, `Secret`, `Literal[...]`, `X | None`
(None is what an absent key's default may be; TOML itself has no null), `tuple[X, ...]` for arrays,
`Mapping[str, X]` for tables with free keys, and other settings classes for tables.  Validators, here or
from `attrs.validators`, say the rest; a class that declares `SHORTHAND = "name"` may be written as a
plain string that stands for that one key.

Complaints never hold a value of the file, for it may be a secret in the wrong place.
"""

from __future__ import annotations

import difflib
import hmac
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

T = TypeVar("T", bound=attrs.AttrsInstance)

#: A field with this metadata takes a lone string where its annotation says `tuple[str, ...]`.
ONE_IS_ENOUGH: Final[Mapping[str, bool]] = MappingProxyType({"crabtwist.one_is_enough": True})

LONGEST_WORD = 64
LONGEST_MODEL_NAME = 256
LONGEST_CREDENTIAL_BYTES = 1024
LEAST_SECRET_KEY_LETTERS = 32

_LARGEST_INTEGER = 2**63 - 1
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_WORD = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]+")
_VISIBLE_ASCII = re.compile(r"[!-~]+")


class _Unusable:
    """Stands for a value whose complaint has been made already, so that nobody makes a second one."""


UNUSABLE: Final = _Unusable()


class Secret:
    """
    A string that cannot be printed by accident.

    `repr`, `str` and format give `<redacted>`; `reveal` gives the text.  Comparing two takes as long
    whatever they hold.  A blank one raises ValueError.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not text.strip():
            raise ValueError("must not be blank")
        self._text = text

    def reveal(self) -> str:
        """Return the text, to be sent and never to be shown."""
        return self._text

    def __repr__(self) -> str:
        return "<redacted>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._as_bytes(), other._as_bytes())

    def __hash__(self) -> int:
        return hash(self._text)

    def _as_bytes(self) -> bytes:
        # The environment may hold bytes that are no UTF-8, which Python keeps as lone surrogates.
        return self._text.encode("utf-8", "surrogatepass")


# --- paths and suggestions ---------------------------------------------------------------------------


def key_path(path: str, key: str) -> str:
    """Return the path of `key` in the table at `path` ("" for the whole file), quoted as TOML would."""
    shown = key if _BARE_KEY.fullmatch(key) else json.dumps(key)
    return f"{path}.{shown}" if path else shown


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the one of `words` that is most like `word`, or "" if none is."""
    by_folded = {candidate.casefold(): candidate for candidate in words}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return f'; did you mean "{by_folded[close[0]]}"?' if close else ""


# --- the environment ---------------------------------------------------------------------------------


def expand(value: object, environ: Mapping[str, str], path: str, complaints: list[str]) -> object:
    """
    Return `value`, as TOML gave it, with the `${VAR}` in its strings replaced; keys stay as they are.

    `${VAR:-default}` takes the default when VAR is unset or empty, `$${` stands for `${`, and what a
    variable holds is not looked at again.  A string with a fault (unset without default, no closing
    brace, not a name) becomes `UNUSABLE`, after a complaint with its path.
    """
    if isinstance(value, str):
        return _expand_text(value, environ, path, complaints)
    if isinstance(value, dict):
        return {key: expand(v, environ, key_path(path, key), complaints) for key, v in value.items()}
    if isinstance(value, list):
        return [expand(v, environ, f"{path}[{index}]", complaints) for index, v in enumerate(value)]
    return value


def _expand_text(text: str, environ: Mapping[str, str], path: str, complaints: list[str]) -> object:
    faults: list[str] = []
    expanded = _REFERENCE.sub(lambda match: _expand_reference(match, environ, faults), text)
    complaints.extend(f"{path}: {fault}" for fault in faults)
    return UNUSABLE if faults else expanded


def _expand_reference(match: re.Match[str], environ: Mapping[str, str], faults: list[str]) -> str:
    if match[0] == "$${":
        return "${"
    if not match[2]:
        faults.append("`${` without a closing `}`; write `$${` for a literal `${`")
        return ""
    variable = _VARIABLE.fullmatch(match[1])
    if variable is None or "${" in match[1]:
        faults.append("expected `${VAR}` or `${VAR:-default}`; write `$${` for a literal `${`")
        return ""
    name, default = variable.groups()
    if default is not None:
        return environ.get(name) or default
    if name not in environ:
        faults.append(f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}")
    return environ.get(name, "")


# --- validators --------------------------------------------------------------------------------------

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _rule(words: str, fits: Callable[[Any], bool]) -> Validator:
    # None is the default of a key that was left out; there is nothing to check about it.
    def check(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value is not None and not fits(value):
            raise ValueError(words)

    return check


def _text(value: object) -> str:
    return value.reveal() if isinstance(value, Secret) else str(value)


def _is_header_word(value: object) -> bool:
    text = _text(value)
    return len(text) <= LONGEST_CREDENTIAL_BYTES and _VISIBLE_ASCII.fullmatch(text) is not None


def _is_model_name(value: object) -> bool:
    text = _text(value)
    return 0 < len(text) <= LONGEST_MODEL_NAME and text.isprintable() and text == text.strip()


def _is_word(value: object) -> bool:
    text = _text(value)
    return len(text) <= LONGEST_WORD and _WORD.fullmatch(text) is not None


positive = _rule("must be greater than 0", lambda value: value > 0)
not_negative = _rule("must be 0 or more", lambda value: value >= 0)
not_blank = _rule("must not be blank", lambda value: bool(_text(value).strip()))
not_empty = _rule("must not be empty; give at least one", bool)
model_name = _rule(
    f"must be 1 to {LONGEST_MODEL_NAME} printable characters, without spaces around them", _is_model_name
)
#: Never `.` or `..`: clients leave these out of a path, and so could not ask for what is called so.
word = _rule(f"must be 1 to {LONGEST_WORD} letters, digits, dots, underscores or hyphens", _is_word)
#: For what travels in a header: keys, tokens.  Its usual catch is a newline from the end of a file.
header_word = _rule(
    f"must be 1 to {LONGEST_CREDENTIAL_BYTES} visible ASCII characters, without spaces or newlines",
    _is_header_word,
)
long_enough = _rule(
    f"must be at least {LEAST_SECRET_KEY_LETTERS} random letters",
    lambda value: len(_text(value)) >= LEAST_SECRET_KEY_LETTERS,
)


def fault_in(validator: Validator, value: object) -> str | None:
    """Return what a validator of this module says against `value`, None if nothing."""
    try:
        validator(None, attrs.NOTHING, value)  # type: ignore[arg-type] # ours look at the value alone
    except ValueError as error:
        return str(error)
    return None


# --- reading -----------------------------------------------------------------------------------------


def read(
    cls: type[T],
    table: Mapping[str, object],
    path: str,
    complaints: list[str],
    *,
    elsewhere: Collection[str] = (),
) -> T | None:
    """
    Return an instance of the settings class `cls` from `table`, or None after complaining.

    All faults are added to `complaints`, each beginning with the path of its key; `path` is the table's
    own, "" for the whole file.  `elsewhere` are keys that are read by somebody else: they are not in
    `table`, but are suggested for one that is misspelt.  Validators are called without an instance.
    Raises TypeError for an annotation that this module does not know.
    """
    fields = {field.alias or field.name: field for field in attrs.fields(cls) if field.init}
    hints = get_type_hints(cls)
    unknown = [key for key in table if key not in fields]
    complaints.extend(_unknown(key, {*fields, *elsewhere}, path) for key in unknown)
    values: dict[str, object] = {}
    for key, field in fields.items():
        where = key_path(path, key)
        if key in table:
            values[key] = _field(field, hints[field.name], table[key], where, complaints)
        elif field.default is attrs.NOTHING:
            values[key] = UNUSABLE
            complaints.append(f"{where}: is missing; add it ({_words(hints[field.name])})")
    if unknown or UNUSABLE in values.values():
        return None
    return _made(cls, values, path, complaints)


def _unknown(key: str, known: Collection[str], path: str) -> str:
    hint = did_you_mean(key, known)
    listed = f"; known keys: {', '.join(sorted(known))}" if known else "; this table takes no keys"
    return f"{key_path(path, key)}: unknown key{hint or listed}"


def _made(cls: type[T], values: dict[str, object], path: str, complaints: list[str]) -> T | None:
    try:
        return cls(**values)
    except ValueError as error:
        complaints.append(f"{path or 'the file'}: {error.args[0]}")
        return None


def _field(
    field: attrs.Attribute[object], hint: object, value: object, path: str, complaints: list[str]
) -> object:
    if field.metadata.get("crabtwist.one_is_enough") and isinstance(value, str):
        value = [value]
    found = _value(hint, value, path, complaints)
    if found is not UNUSABLE and field.validator is not None:
        try:
            field.validator(None, field, found)
        except ValueError as error:
            complaints.append(f"{path}: {error.args[0]}")
            return UNUSABLE
    return found


def _value(hint: object, value: object, path: str, complaints: list[str]) -> object:
    if value is UNUSABLE:
        return UNUSABLE
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        # TOML has no null; JSON's is what a key that was left out is.
        return None if value is None else _value(_without_none(hint), value, path, complaints)
    if origin is Literal:
        return _choice(get_args(hint), value, path, complaints)
    if origin is tuple:
        return _array(hint, value, path, complaints)
    if origin is Mapping:
        return _free_table(hint, value, path, complaints)
    if isinstance(hint, type) and attrs.has(hint):
        return _nested(hint, value, path, complaints)
    return _scalar(hint, value, path, complaints)


def _without_none(hint: object) -> object:
    members = [member for member in get_args(hint) if member is not NoneType]
    if len(members) != 1:
        raise TypeError(f"a setting cannot be annotated {hint}: one type and None at most")
    return members[0]


def _choice(choices: tuple[object, ...], value: object, path: str, complaints: list[str]) -> object:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    complaints.append(f"{path}: must be one of {_list(choices)}{hint}")
    return UNUSABLE


def _array(hint: object, value: object, path: str, complaints: list[str]) -> object:
    inner, *rest = get_args(hint)
    if rest != [...]:
        raise TypeError(f"a setting cannot be annotated {hint}: write tuple[X, ...]")
    if not isinstance(value, list):
        return _wrong(hint, value, path, complaints)
    found = tuple(_value(inner, item, f"{path}[{i}]", complaints) for i, item in enumerate(value))
    return UNUSABLE if UNUSABLE in found else found


def _free_table(hint: object, value: object, path: str, complaints: list[str]) -> object:
    if not isinstance(value, dict):
        return _wrong(hint, value, path, complaints)
    inner = get_args(hint)[1]
    found = {key: _value(inner, item, key_path(path, key), complaints) for key, item in value.items()}
    return UNUSABLE if UNUSABLE in found.values() else MappingProxyType(found)


def _nested(
    cls: type[attrs.AttrsInstance], value: object, path: str, complaints: list[str]
) -> attrs.AttrsInstance | _Unusable:
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand is not None and isinstance(value, str):
        value = {shorthand: value}
    if not isinstance(value, dict):
        return _wrong(cls, value, path, complaints)
    found = read(cls, value, path, complaints)
    return UNUSABLE if found is None else found


def _scalar(hint: object, value: object, path: str, complaints: list[str]) -> object:
    if hint not in (str, int, float, bool, Secret):
        raise TypeError(f"a setting cannot be annotated {hint}")
    fits = {float: (int, float), Secret: (str,)}.get(hint, (hint,))
    if type(value) not in fits:
        return _wrong(hint, value, path, complaints)
    fault = _fault_in_scalar(hint, value)
    if fault:
        complaints.append(f"{path}: {fault}")
        return UNUSABLE
    return {float: float, Secret: Secret}.get(hint, lambda same: same)(value)


def _fault_in_scalar(hint: object, value: object) -> str | None:
    if hint is Secret:
        return fault_in(not_blank, value)
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return "is too large a number"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return None


def _wrong(hint: object, value: object, path: str, complaints: list[str]) -> _Unusable:
    complaints.append(f"{path}: must be {_words(hint)}, not {_toml_words(value)}")
    return UNUSABLE


# --- words -------------------------------------------------------------------------------------------

_TYPE_WORDS: Mapping[object, str] = {
    str: "a string",
    Secret: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "an array",
    tuple: "an array",
    dict: "a table",
    Mapping: "a table",
    NoneType: "null",
}


def _words(hint: object) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _words(_without_none(hint))
    if origin is Literal:
        return f"one of {_list(get_args(hint))}"
    lone = "a string or " if getattr(hint, "SHORTHAND", None) else ""
    return lone + _TYPE_WORDS.get(origin or hint, "a table")


def _toml_words(value: object) -> str:
    return "a decimal number" if isinstance(value, float) else _TYPE_WORDS.get(type(value), "a date or time")


def _list(choices: Iterable[object]) -> str:
    return ", ".join(json.dumps(choice) for choice in choices)
