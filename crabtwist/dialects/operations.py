"""The operations that the gateway serves: which dialect, and where on the wire."""

from __future__ import annotations

import attrs

from crabtwist.dialects.anthropic import ANTHROPIC
from crabtwist.dialects.base import Dialect
from crabtwist.dialects.openai import OPENAI


@attrs.frozen
class Operation:
    """
    One endpoint that takes a body naming a model.

    `path` is the caller's, after `/v1`; `streams` says whether its answer may be an event stream, and
    `counts` whether its answer is billed in tokens.
    """

    name: str
    dialect: Dialect
    path: str
    streams: bool = True
    counts: bool = True


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("messages", ANTHROPIC, "/messages"),
        Operation("messages.count_tokens", ANTHROPIC, "/messages/count_tokens", streams=False, counts=False),
        Operation("chat.completions", OPENAI, "/chat/completions"),
        Operation("embeddings", OPENAI, "/embeddings", streams=False),
    )
}

DIALECTS = {dialect.name: dialect for dialect in (ANTHROPIC, OPENAI)}


def dialect_of(path: bytes, *, anthropic_client: bool) -> Dialect:
    """
    Return the dialect in which to speak to the caller of `path`.

    Where both APIs have the path (`/v1/models`) or neither, `anthropic_client` decides: whether the
    request carried an `anthropic-version` header, or an `x-api-key` and no `Authorization`.
    """
    if path.startswith(b"/v1/messages"):
        return ANTHROPIC
    if path.startswith((b"/v1/chat/", b"/v1/embeddings")):
        return OPENAI
    return ANTHROPIC if anthropic_client else OPENAI
