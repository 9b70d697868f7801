"""The doors of the models list, in the shape of whoever asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klein import Klein

from crabtwist.errors import Refusal
from crabtwist.gateway import Gateway
from crabtwist.keys import VirtualKey, allows
from crabtwist.web.answers import asks_as_anthropic, say_json

#: Anthropic's page sizes.
DEFAULT_LIMIT = 20
LARGEST_LIMIT = 1000

_EPOCH = "1970-01-01T00:00:00Z"


def add_models(app: Klein, gateway: Gateway) -> None:
    """Add `GET /v1/models` and `GET /v1/models/{id}`."""

    @app.route("/v1/models", methods=["GET"], endpoint="models")
    def list_models(request: Any) -> bytes:
        names = usable_names(gateway, request.admission)
        if asks_as_anthropic(request):
            return say_json(request, 200, anthropic_page(names, request.args))
        listed = [openai_model(name) for name in names]
        return say_json(request, 200, {"object": "list", "data": listed})

    @app.route("/v1/models/<path:name>", methods=["GET"], endpoint="model")
    def one_model(request: Any, name: str) -> bytes:
        if name not in usable_names(gateway, request.admission):
            raise Refusal(404, "model_not_found", f"model {name!r} is not served here; see GET /v1/models")
        render = anthropic_model if asks_as_anthropic(request) else openai_model
        return say_json(request, 200, render(name))


def usable_names(gateway: Gateway, key: VirtualKey | None) -> list[str]:
    """Return the models and aliases that a key may use, models first."""
    registry = gateway.registry
    return [name for name in registry.names() if allows(key, name, registry.resolve(name))]


def openai_model(name: str) -> dict[str, Any]:
    """Return a model as OpenAI's clients expect it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "crabtwist"}


def anthropic_model(name: str) -> dict[str, Any]:
    """Return a model as Anthropic's clients expect it."""
    return {"type": "model", "id": name, "display_name": name, "created_at": _EPOCH}


def anthropic_page(names: list[str], args: Mapping[bytes, list[bytes]]) -> dict[str, Any]:
    """
    Return the page that `limit`, `after_id` and `before_id` ask for.

    Raises `Refusal` (400) for a limit that is none.
    """
    limit = _limit(args)
    after, before = _id(args, b"after_id"), _id(args, b"before_id")
    if before is not None:
        candidates = names[: names.index(before)] if before in names else []
        page, more = candidates[-limit:], len(candidates) > limit
    else:
        start = names.index(after) + 1 if after in names else 0
        page, more = names[start : start + limit], len(names) > start + limit
    return {
        "data": [anthropic_model(name) for name in page],
        "has_more": more,
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _limit(args: Mapping[bytes, list[bytes]]) -> int:
    text = args.get(b"limit", [str(DEFAULT_LIMIT).encode()])[0]
    if not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= LARGEST_LIMIT:
        raise Refusal(400, "invalid_query", f"limit has to be a whole number from 1 to {LARGEST_LIMIT}")
    return int(text)


def _id(args: Mapping[bytes, list[bytes]], name: bytes) -> str | None:
    values = args.get(name)
    return values[0].decode("utf-8", "replace") if values else None
