"""The doors of the records: the list of requests, the receipt of one, and all of them as they end."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import attrs
import msgspec
from attrs.validators import le
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from crabtwist.bookkeeping import Bookkeeping
from crabtwist.errors import Refusal
from crabtwist.records import Record, microseconds
from crabtwist.settings import positive
from crabtwist.terms import moment as a_moment
from crabtwist.terms import unix_time
from crabtwist.web.admin.endpoint import ADMIN, Asked, Endpoint, about
from crabtwist.web.admin.follow import Wanted
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admin.shown import RequestInFull, RequestShown, request_in_full, request_shown

T = TypeVar("T")

LARGEST_PAGE = 1000

_NO_LEDGER = "this gateway keeps no records"
_AWAY = "the ledger does not answer"

_log = Logger()


@attrs.frozen(kw_only=True)
class Filters:
    """Which requests."""

    principal: str | None = attrs.field(default=None, metadata=about('the key\'s name; "" for those without'))
    model: str | None = attrs.field(default=None, metadata=about("the model's name here"))
    provider: str | None = attrs.field(default=None, metadata=about("who answered"))
    reason: str | None = attrs.field(default=None, metadata=about('how it ended, such as "complete"'))
    since: str | None = attrs.field(
        default=None, validator=a_moment, metadata=about("accepted then or later: 2026-11-30T18:00:00Z")
    )
    until: str | None = attrs.field(default=None, validator=a_moment, metadata=about("accepted before then"))

    @property
    def names(self) -> dict[str, str | None]:
        """Return the filters that compare a name."""
        return {name: getattr(self, name) for name in ("principal", "model", "provider", "reason")}

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """Return `since` and `until` in microseconds."""
        return _microseconds(self.since), _microseconds(self.until)

    def wanted(self) -> Wanted:
        """Return what tells of a record whether it is one of these."""
        names = {name: value for name, value in self.names.items() if value is not None}
        since, until = self.bounds

        def is_wanted(record: Record) -> bool:
            return (
                all((getattr(record, name) or "") == value for name, value in names.items())
                and (since is None or record.accepted_at >= since)
                and (until is None or record.accepted_at < until)
            )

        return is_wanted


@attrs.frozen(kw_only=True)
class PageOfRequests(Filters):
    """Which requests, and how many of them at once."""

    before: str | None = attrs.field(default=None, metadata=about("`next` of the page before this one"))
    limit: int = attrs.field(default=100, validator=[positive, le(LARGEST_PAGE)])


@attrs.frozen(slots=False)
class Requests:
    """A page of requests, those accepted last first; `next` asks for the page after it."""

    requests: tuple[RequestShown, ...]
    next: str | None


def request_endpoints(inside: Inside) -> list[Endpoint]:
    """Return the endpoints of the records."""
    no_ledger = {404: _NO_LEDGER, 503: _AWAY}
    return [
        Endpoint(
            "GET",
            f"{ADMIN}requests",
            "List the requests that have ended",
            lambda asked: _page(inside, asked.query),
            description="The newest come first.  The last second's may still be on their way to the ledger.",
            query=PageOfRequests,
            answer=Requests,
            refusals=no_ledger,
        ),
        Endpoint(
            "GET",
            f"{ADMIN}requests/follow",
            "Follow the requests as they end",
            lambda asked: inside.tail.follow(asked.request, asked.query.wanted()),
            description=(
                "Those of this node, from now on, as events `request`.  An event `end` says why no more come:"
                " the gateway is being stopped, or the reader was too slow."
            ),
            query=Filters,
            answer=RequestShown,
            streams=True,
            refusals={429: "too many follow"},
        ),
        Endpoint(
            "GET",
            f"{ADMIN}requests/<id>",
            "Show one request, with its receipt",
            lambda asked: _one(inside, asked),
            answer=RequestInFull,
            refusals={404: f"there is no record of it, or {_NO_LEDGER}", 503: _AWAY},
        ),
    ]


async def _page(inside: Inside, query: PageOfRequests) -> Requests:
    since, until = query.bounds
    try:
        page = await from_ledger(
            books_of(inside).ledger.records(
                **query.names, since=since, until=until, before=query.before, limit=query.limit
            )
        )
    except ValueError as error:
        raise Refusal(400, "invalid_query", "before: is not the `next` of a page") from error
    return Requests(tuple(map(request_shown, page.records)), page.before)


async def _one(inside: Inside, asked: Asked) -> RequestInFull:
    books, request_id = books_of(inside), asked.path["id"]
    record = books.journal.find(request_id)
    if record is None:
        record = await from_ledger(books.ledger.get(request_id))
    if record is None:
        raise Refusal(404, "request_not_found", f"there is no record of a request {request_id[:200]!r}")
    return request_in_full(record)


def books_of(inside: Inside) -> Bookkeeping:
    """Return the books of a gateway; refuses where it keeps none."""
    if inside.gateway.books is None:
        raise Refusal(404, "no_ledger", f'{_NO_LEDGER}: its [ledger] has kind = "none"')
    return inside.gateway.books


async def from_ledger(asking: Awaitable[T]) -> T:
    """Return what a ledger says; refuses (503) when it does not.  ValueError is the asker's own fault."""
    try:
        return await asking
    except CancelledError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, msgspec.MsgspecError):
            raise
        _log.error("the ledger does not answer: {error!r}", error=error)
        raise Refusal(
            503, "ledger_unavailable", f"{_AWAY}; ask again", headers={"retry-after": "1"}
        ) from error


def _microseconds(text: str | None) -> int | None:
    return None if text is None else microseconds(unix_time(text))
