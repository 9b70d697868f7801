"""The OpenAPI document as one page for people, which loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

_CODE = re.compile(r"`([^`]+)`")
_SHELL_QUOTE = "'\\''"

Json = Mapping[str, Any]


def page_of(document: Json) -> str:
    """Return the page, as HTML."""
    style = files("crabtwist").joinpath("data/docs.css").read_text("utf-8")
    info = document["info"]
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    tags = [tag["name"] for tag in document["tags"]]
    body = [
        f"<header><h1>{escape(info['title'])}</h1><p class=version>{escape(info['version'])}, ",
        '<a href="/openapi.json">openapi.json</a></p>',
        _paragraphs(info["description"]),
        "</header>",
        _contents(tags, operations),
        "<main>",
        *(_section(tag, operations) for tag in tags),
        _schemas(document["components"]["schemas"]),
        "</main>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{style}</style></head><body>{''.join(body)}</body></html>\n"
    )


Operations = list[tuple[str, str, Json]]


def _contents(tags: Iterable[str], operations: Operations) -> str:
    listed = "".join(
        f"<li><b>{escape(tag)}</b><ul>"
        + "".join(
            f'<li><a href="#{operation["operationId"]}">{escape(operation["summary"])}</a></li>'
            for _, _, operation in operations
            if tag in operation["tags"]
        )
        + "</ul></li>"
        for tag in tags
    )
    return f'<nav aria-label="Contents"><ul>{listed}<li><a href="#schemas"><b>schemas</b></a></li></ul></nav>'


def _section(tag: str, operations: Operations) -> str:
    own = (_operation(*each) for each in operations if tag in each[2]["tags"])
    return f"<section><h2>{escape(tag)}</h2>{''.join(own)}</section>"


def _operation(method: str, path: str, operation: Json) -> str:
    return "".join(
        [
            f'<article id="{operation["operationId"]}"><h3>{escape(operation["summary"])}</h3>',
            f'<p class=route><span class="method {method.lower()}">{method}</span> ',
            f"<code>{escape(path)}</code></p>",
            _paragraphs(operation.get("description", "")),
            _in_and_out(operation),
            _parameters(each for each in operation["parameters"] if each["in"] == "query"),
            f"<pre>{escape(curl(method, path, operation))}</pre>",
            _responses(operation["responses"]),
            "</article>",
        ]
    )


def _in_and_out(operation: Json) -> str:
    contents = operation.get("requestBody", {}).get("content", {})
    taken = " ".join(dict.fromkeys(_kind_in_html(content["schema"]) for content in contents.values()))
    status, response = next(iter(operation["responses"].items()))
    given = f"answers <code>{status}</code> {_links(response)}"
    return f"<p class=route>{f'takes {taken}, ' if taken else ''}{given}</p>"


def curl(method: str, path: str, operation: Json) -> str:
    """Return the line for a shell that asks for this; `$TOKEN` is the admin token, or the key."""
    filled = re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), path)
    words = ["curl" if method == "GET" else f"curl -X {method}"]
    words[0] += f' "$URL{filled}"'
    words.append('-H "Authorization: Bearer $TOKEN"')
    contents = operation.get("requestBody", {}).get("content", {})
    for media_type, content in list(contents.items())[:1]:
        body = json.dumps(content.get("example", {})).replace("'", _SHELL_QUOTE)
        words += [f'-H "Content-Type: {media_type}"', f"-d '{body}'"]
    return " \\\n  ".join(words)


def _parameters(parameters: Iterable[Json]) -> str:
    rows = [(each["name"], kind_of(each["schema"]), each.get("description", "")) for each in parameters]
    return _table(("parameter", "", ""), rows)


def _responses(responses: Mapping[str, Json]) -> str:
    rows = "".join(
        f"<tr><td><code>{status}</code></td><td>{_marked(each['description'])} {_links(each)}</td></tr>"
        for status, each in responses.items()
    )
    return f"<details><summary>all answers</summary><table>{rows}</table></details>"


def _links(response: Json) -> str:
    found = (content.get("x-data", content["schema"]) for content in response.get("content", {}).values())
    return " ".join(_kind_in_html(schema) for schema in found)


def _schemas(schemas: Mapping[str, Json]) -> str:
    articles = "".join(_schema(name, schemas[name]) for name in sorted(schemas))
    return f'<section id="schemas"><h2>schemas</h2>{articles}</section>'


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(member)}</code>{'' if member in required else '?'}</td>"
        f"<td>{_kind_in_html(each)}</td><td>{_marked(each.get('description', ''))}{_default(each)}</td></tr>"
        for member, each in schema.get("properties", {}).items()
    )
    return (
        f'<article id="{escape(name)}"><h3>{escape(name)}</h3>{_paragraphs(schema.get("description", ""))}'
        f"<table>{rows}</table></article>"
    )


def _default(schema: Json) -> str:
    default = schema.get("default")
    return "" if default is None else f" <small>default <code>{escape(json.dumps(default))}</code></small>"


def kind_of(schema: Json) -> str:
    """Return a schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " or ".join(json.dumps(each) for each in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind_of, schema["anyOf"])))
    if schema.get("type") == "array":
        return f"array of {kind_of(schema.get('items', {}))}"
    return str(schema.get("format") or schema.get("type", "anything"))


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for each in schema.values():
            yield from _references(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from _references(each)


def _kind_in_html(schema: Json) -> str:
    shown = escape(kind_of(schema))
    for name in set(_references(schema)):
        shown = re.sub(rf"\b{name}\b", f'<a href="#{name}">{name}</a>', shown)
    return shown


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    lines = "".join(
        f"<tr><td><code>{escape(row[0])}</code></td>"
        + "".join(f"<td>{_marked(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_marked(each)}</p>" for each in text.split("\n\n") if each)


def _marked(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))
