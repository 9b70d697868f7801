"""
The records that travel: what is asked of a provider, who asks, and how it ended.

All frozen, but for `Context`, whose `deployment` names whoever is being asked *now*.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import attrs

from crabtwist.money import PriceRow
from crabtwist.terms import KeyBudgetSettings, LimitSettings

#: What a token takes in a request's body, on the average.
BYTES_PER_TOKEN = 4

#: Header fields in wire order, names as they were written.
Headers = tuple[tuple[bytes, bytes], ...]

EndedBy = Literal["upstream", "client", "gateway"]

NOTHING: Mapping[str, int] = MappingProxyType({})


@attrs.frozen
class Call:
    """
    What a provider is asked to send upstream; one attempt's worth.

    `model` is the upstream's own name for the model, already inside `body`.  `query` is the client's
    query string without its `?` (b"" for none).  `headers` are the client's end-to-end fields: no
    credentials, no cookies, nothing hop-by-hop; the provider adds its own credential.
    """

    operation: str
    dialect: str
    model: str
    stream: bool
    query: bytes
    headers: Headers
    body: bytes = attrs.field(repr=False)


@attrs.frozen
class Usage:
    """
    Tokens by class; the classes are disjoint, so their sum is the request's total.

    `input_tokens` excludes everything read from or written to a prompt cache.  `output_tokens` excludes
    `reasoning_tokens`.  `cache_write_tokens` are those kept for five minutes,
    `cache_write_1h_tokens` for an hour.  `server_tool_calls` counts the vendor's own tools by name.
    `raw` is the vendor's own usage object as JSON (of a stream, the last word on each member), so that a
    record can be priced again later; `complete` is False when the answer broke off before its last word on
    usage.
    """

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    server_tool_calls: Mapping[str, int] = NOTHING
    raw: bytes = attrs.field(default=b"", repr=False)
    complete: bool = True

    @property
    def prompt_tokens(self) -> int:
        """Everything that went in, cached or not."""
        return (
            self.input_tokens + self.cache_read_tokens + self.cache_write_tokens + self.cache_write_1h_tokens
        )

    @property
    def completion_tokens(self) -> int:
        """Everything that came out, thought or said."""
        return self.output_tokens + self.reasoning_tokens


@attrs.frozen
class Attempt:
    """
    One try at one deployment.

    `status` is the upstream's HTTP status, None when no head came.  `error` is the slug of what went
    wrong ("cancelled" when it was given up), None when the attempt was the one that answered.
    `duration_seconds` lasts until it was clear which; `started_after_seconds` runs from the request's start.
    """

    provider: str
    model: str
    status: int | None
    error: str | None
    started_after_seconds: float
    duration_seconds: float


@attrs.define(eq=False)
class Context:
    """
    One request as its extensions see it.

    `model_asked` is the client's word, `model` the name that aliases resolve it to.  `principal` is the
    name of the virtual key.  `started_at` is Unix time in seconds.  `provider` and `upstream_model` are
    those of the *current attempt* ("" before the first), so that labels and prices name who really
    answers.  `max_tokens` is the client's own bound, None if it set none, for each of as many answers as
    `choices` says; `body_bytes` is the request's size.
    `limits` and `budget` are the key's own, None where it has none.
    `query` and `headers` are the client's, as they go upstream: no credentials, no cookies.
    `prices` are the rows of all deployments that may answer, None for one whose price nobody knows.
    `answer_headers` are for extensions to fill: fields, by lower-case name, that the answer will carry,
    whoever makes it, in place of the upstream's of that name; names and values are bytes, as on the wire.
    """

    request_id: str
    operation: str
    dialect: str
    model_asked: str
    model: str
    principal: str | None
    stream: bool
    started_at: float
    max_tokens: int | None = None
    provider: str = ""
    upstream_model: str = ""
    choices: int = 1
    body_bytes: int = 0
    limits: LimitSettings | None = None
    budget: KeyBudgetSettings | None = None
    query: bytes = b""
    headers: Headers = attrs.field(default=(), repr=False)
    prices: tuple[PriceRow | None, ...] = ()
    answer_headers: dict[bytes, bytes] = attrs.field(factory=dict)

    def most_output_tokens(self, unbounded: int) -> int:
        """Return how long all answers together may be, each `unbounded` where the client set no bound."""
        return (unbounded if self.max_tokens is None else self.max_tokens) * self.choices

    @property
    def estimated_prompt_tokens(self) -> int:
        """About how many tokens the prompt has; nobody knows before the upstream has counted."""
        return self.body_bytes // BYTES_PER_TOKEN


@attrs.frozen
class Answer:
    """A whole, plain answer: what a cache gives back and what `on_response` is shown."""

    status: int
    headers: Headers
    body: bytes = attrs.field(repr=False)


@attrs.frozen
class Outcome:
    """
    How one request ended; there is exactly one for each.

    `status` is the HTTP status that the client was sent; 499 when the client left, and 0 when the answer
    broke after its head had gone.  `reason` is "complete", "upstream_status" when the upstream's own error
    was passed on, or the slug of what ended it ("client_left", "truncated", "refused", ...); `message` says
    it to people.  `usage` is None when nothing is known.  `model_answered` is the model's name in the
    answer, None if it said none.  Times are seconds from the request's start; `first_byte_seconds` is None
    when no byte of a body was sent.  `bytes_in` and `bytes_out` count bodies only.  `cost` is in picodollars,
    None where the usage or a price is unknown; `price` is the row of the model that answered, and
    `other_prices` those of the models that the usage names for parts of the answer.
    """

    status: int
    ended_by: EndedBy
    reason: str
    message: str | None
    usage: Usage | None
    attempts: tuple[Attempt, ...]
    model_answered: str | None
    first_byte_seconds: float | None
    duration_seconds: float
    bytes_in: int
    bytes_out: int
    cache_hit: bool = False
    cost: int | None = None
    price: PriceRow | None = None
    other_prices: Mapping[str, PriceRow] = MappingProxyType({})


@attrs.frozen
class AdminAction:
    """
    One thing that somebody did to the gateway itself, or tried to, and not through it.

    `at` is Unix time in seconds.  `actor` names who it was, and `target` what it was done to ("" for the
    gateway as a whole); `action` is a word of whoever tells of it, such as "keys.create".  `detail` says
    more to people.  None of them holds a secret: they are written down.
    """

    at: float
    actor: str
    action: str
    target: str
    outcome: Literal["done", "refused", "failed"]
    detail: str = ""


@attrs.frozen
class UsageEvent:
    """
    One request's usage, for programs that embed the gateway.

    The fields and the sentinel are those of crabllm, which this gateway re-implements: `status` 0 means
    that the answer broke after its head was sent; `endpoint` is the operation ("messages",
    "chat.completions", "embeddings", ...).
    """

    timestamp: float
    request_id: str
    principal: str | None
    model: str
    provider: str
    endpoint: str
    usage: Usage
    duration_ms: int
    status: int
    error: str | None
