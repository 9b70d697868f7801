"""The JSON Schemas of what goes in and comes out, made from the classes that read it and are answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from typing import Any, get_args, get_type_hints

import attrs
import msgspec

from crabtwist.settings import (
    LONGEST_CREDENTIAL_BYTES,
    LONGEST_MODEL_NAME,
    LONGEST_WORD,
    Secret,
    header_word,
    model_name,
    not_empty,
    not_negative,
    positive,
    word,
)
from crabtwist.terms import moment

REFERENCE = "#/components/schemas/"

_WORDED: Mapping[Any, dict[str, Any]] = {
    positive: {"exclusiveMinimum": 0},
    not_negative: {"minimum": 0},
    not_empty: {"minItems": 1},
    moment: {"format": "date-time"},
    word: {
        "minLength": 1,
        "maxLength": LONGEST_WORD,
        "pattern": "^[A-Za-z0-9._-]+$",
        "not": {"enum": [".", ".."]},
    },
    model_name: {"minLength": 1, "maxLength": LONGEST_MODEL_NAME},
    header_word: {"minLength": 1, "maxLength": LONGEST_CREDENTIAL_BYTES, "pattern": "^[!-~]+$"},
}
_BOUNDS = {">=": "minimum", "<=": "maximum", ">": "exclusiveMinimum", "<": "exclusiveMaximum"}

Schema = dict[str, Any]


def schemas_of(settings: Iterable[type], answers: Iterable[Any]) -> dict[str, Schema]:
    """
    Return the schemas of all classes, and of those within them, by the classes' names.

    `settings` are read strictly: nothing that they do not know is taken.
    """
    strict = {cls for each in settings for cls in _classes_in(each)}
    kept = {cls for each in answers for cls in _classes_in(each)}
    _, components = msgspec.json.schema_components(
        [*strict, *kept], schema_hook=_unknown, ref_template=REFERENCE + "{name}"
    )
    for cls in {*strict, *kept}:
        schema = components[cls.__name__]
        schema.pop("title", None)
        schema["description"] = _in_one_line(cleandoc(cls.__doc__ or ""))
        if cls in strict:
            schema["additionalProperties"] = bool(getattr(cls, "OTHERS_TOO", False))
        if attrs.has(cls):
            for field in attrs.fields(cls):
                if field.name in schema["properties"]:
                    schema["properties"][field.name] = _refined(field, schema["properties"][field.name])
    return components


def patch_of(schema: Schema) -> Schema:
    """Return the schema of a merge patch of something (RFC 7396): nothing is needed, and all can be null."""
    properties = {}
    for name, each in schema["properties"].items():
        rest = {member: value for member, value in each.items() if member != "default"}
        if isinstance(rest.get("additionalProperties"), dict):
            rest["additionalProperties"] = nullable(rest["additionalProperties"])
        properties[name] = rest if {"type": "null"} in rest.get("anyOf", ()) else nullable(rest)
    return {**schema, "properties": properties, "required": []}


def nullable(schema: Schema) -> Schema:
    """Return a schema that lets null in too."""
    return {"anyOf": [schema, {"type": "null"}]}


def is_kept(hint: Any) -> bool:
    """Tell whether this is a class whose schema has a name."""
    return isinstance(hint, type) and (attrs.has(hint) or issubclass(hint, msgspec.Struct))


def _classes_in(hint: Any) -> Iterator[type]:
    """Yield the class that this is, or all in this annotation, and those of its fields."""
    if is_kept(hint):
        yield hint
        for inner in get_type_hints(hint).values():
            yield from _classes_in(inner)
    for each in get_args(hint):
        yield from _classes_in(each)


def _unknown(cls: type) -> Schema:
    if cls is Secret:
        return {"type": "string", "format": "password", "writeOnly": True}
    return {}


def _refined(field: attrs.Attribute[Any], schema: Schema) -> Schema:
    """Return a field's schema with what its validators and metadata say."""
    schema = field.metadata.get("crabtwist.schema", schema)
    if field.metadata.get("crabtwist.one_is_enough"):
        schema = {"anyOf": [schema, {"type": "string"}], "default": schema.pop("default", None)}
    for validator in _validators(field.validator):
        said = _WORDED.get(validator) or _bound(validator)
        for each in (schema, *schema.get("anyOf", ())):
            if each.get("type") not in (None, "null"):
                each.update(said)
    text = field.metadata.get("crabtwist.about")
    return {**schema, "description": text} if text else schema


def _validators(validator: Any) -> Iterator[Any]:
    for each in getattr(validator, "_validators", (validator,)):
        if each is not None:
            yield each


def _bound(validator: Any) -> Schema:
    bound = _BOUNDS.get(getattr(validator, "compare_op", ""))
    return {bound: validator.bound} if bound else {}


def _in_one_line(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
