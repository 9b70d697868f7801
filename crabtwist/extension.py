"""What an extension starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zope.interface import implementer

from crabtwist.errors import UpstreamError
from crabtwist.interfaces import IExtension
from crabtwist.sse import Event
from crabtwist.values import AdminAction, Answer, Context, Outcome

#: Takes a query's parameters; returns what JSON can say, or a Deferred or coroutine of that.
AdminRoute = Callable[[Mapping[str, str]], Any]


@implementer(IExtension)
class Extension:
    """
    An extension that does nothing; override the hooks that are needed.

    `IExtension` says when each is called and what it may do.  A hook may be an `async def`, or return a
    Deferred, except `on_chunk`.
    """

    name = ""

    def admin_routes(self) -> Mapping[str, AdminRoute]:
        """Return what to show to whoever has the admin token, by path."""
        return {}

    def on_request(self, context: Context) -> Any:
        """Guard the request: raise `crabtwist.errors.Refused` to end it."""

    def on_cache_lookup(self, context: Context, body: bytes) -> Any:
        """Return an `Answer` to give instead of asking an upstream, or None."""

    def on_response(self, context: Context, body: bytes, response: Answer) -> Any:
        """Watch a complete plain answer."""

    def on_chunk(self, context: Context, event: Event) -> None:
        """Watch one event of a stream."""

    def on_error(self, context: Context, error: UpstreamError) -> Any:
        """Watch a failed attempt or a broken stream."""

    def on_end(self, context: Context, outcome: Outcome) -> Any:
        """Watch the end, exactly once."""

    def on_admin_action(self, action: AdminAction) -> Any:
        """Watch what was done to the gateway itself."""
