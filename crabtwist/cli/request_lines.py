"""How one request looks in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crabtwist.cli.shown import NOTHING, dollars, moment_of, or_nothing, plain, when

HEADS = ("TIME", "KEY", "MODEL", "PROVIDER", "STATUS", "TOKENS", "COST", "SECONDS")
NUMBERS = frozenset({"TOKENS", "COST", "SECONDS"})

#: How wide each column is at least where lines come one by one.
_WIDTHS = (20, 12, 20, 10, 18, 11, 12, 7)

_PROMPT = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens")
_COMPLETION = ("output_tokens", "reasoning_tokens")


def request_row(request: Mapping[str, Any]) -> list[str]:
    """Return what stands below `HEADS`."""
    estimated = bool(request.get("estimated"))
    return [
        when(request["accepted_at"]),
        request.get("principal") or NOTHING,
        request.get("model") or request.get("model_asked") or NOTHING,
        "(cache)" if request.get("cache_hit") else request.get("provider") or NOTHING,
        status_text(request),
        tokens_text(request.get("usage")),
        dollars(request.get("cost_dollars"), estimated=estimated),
        seconds_text(request),
    ]


def head_line() -> str:
    """Return the heads of lines that come one by one."""
    return _padded(HEADS)


def request_line(request: Mapping[str, Any]) -> str:
    """Return a request as one line, with its id at the end."""
    return f"{_padded([plain(cell) for cell in request_row(request)])}  {plain(str(request['id']))}"


def _padded(cells: Any) -> str:
    padded = [
        cell.rjust(width) if head in NUMBERS else cell.ljust(width)
        for head, cell, width in zip(HEADS, cells, _WIDTHS, strict=True)
    ]
    return "  ".join(padded)


def status_text(request: Mapping[str, Any]) -> str:
    """Return the status, and in a word how it ended if not well."""
    status, reason = or_nothing(request.get("status")), request.get("reason")
    return status if reason in (None, "", "complete") else f"{status} {reason}"


def tokens_text(usage: Mapping[str, Any] | None) -> str:
    """Return the tokens that went in and came out: "1200+340"."""
    if not usage:
        return NOTHING
    prompt = sum(usage.get(name) or 0 for name in _PROMPT)
    return f"{prompt}+{sum(usage.get(name) or 0 for name in _COMPLETION)}"


def seconds_text(request: Mapping[str, Any]) -> str:
    """Return how long it took."""
    begun, ended = moment_of(request.get("accepted_at")), moment_of(request.get("ended_at"))
    return NOTHING if begun is None or ended is None else f"{(ended - begun).total_seconds():.3f}"
