"""The doors of extensions: what they show to whoever has the admin token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import iscoroutine
from typing import Any

import msgspec
from klein import Klein
from twisted.internet.defer import Deferred, ensureDeferred

from crabtwist.errors import ConfigurationError, Refusal
from crabtwist.extension import AdminRoute
from crabtwist.values import Answer
from crabtwist.web.admin_lock import Administrator
from crabtwist.web.answers import ADMIN, path_not_found, say

#: Whoever has what was shown yesterday should not take it for what is so today.
_FIELDS = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"))


def add_extensions(app: Klein, extensions: Sequence[Any]) -> None:
    """
    Add `GET /v1/admin/extensions/NAME/PATH` for each extension's routes.

    Raises `ConfigurationError` for a path that nobody could ask for.
    """
    routes = {extension.name: _checked(extension) for extension in extensions}
    path_of_all = f"{ADMIN.decode()}extensions/<name>/<path:path>"

    @app.route(path_of_all, methods=["GET"], endpoint="extension")
    async def show(request: Any, name: str, path: str) -> bytes:
        # Admission has seen to it; what is shown here must not hang on that alone.
        route = routes.get(name, {}).get(path)
        if route is None or not isinstance(request.admission, Administrator):
            raise path_not_found(request.path)
        shown = route(_query(request.args))
        if iscoroutine(shown) or isinstance(shown, Deferred):
            shown = await ensureDeferred(shown)
        return say(request, Answer(200, _FIELDS, msgspec.json.encode(shown)))


def _checked(extension: Any) -> Mapping[str, AdminRoute]:
    routes: Mapping[str, AdminRoute] = extension.admin_routes()
    wrong = [path for path in routes if not path or path != path.strip("/")]
    if wrong:
        raise ConfigurationError(
            [
                f"extensions.{extension.name}: {path!r} is no path of a route; write it as 'a' or 'a/b'"
                for path in wrong
            ]
        )
    return routes


def _query(args: Mapping[bytes, list[bytes]]) -> dict[str, str]:
    """Return the parameters, each once; raises `Refusal` (400)."""
    try:
        named = {name.decode(): [value.decode() for value in values] for name, values in args.items()}
    except UnicodeDecodeError:
        raise Refusal(400, "invalid_query", "the query is not UTF-8") from None
    twice = sorted(name for name, values in named.items() if len(values) > 1)
    if twice:
        raise Refusal(400, "invalid_query", f"given more than once: {', '.join(twice)}")
    return {name: value for name, [value] in named.items()}
