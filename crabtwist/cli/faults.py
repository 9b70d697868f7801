"""What can go wrong with a command, and the exit status that tells scripts of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import IO, Any

import click

#: The exit status of a command that was ended by Ctrl-C, as shells have it.
INTERRUPTED = 130


class Fault(click.ClickException):
    """
    Ends a command with words for whoever typed it: what is wrong, and what to do.

    `slug` is a stable word for programs, and `http_status` the gateway's, None where it did not answer.  The
    exit status tells scripts of it: 1 for what the gateway refuses, or what is wrong with it.
    """

    def __init__(self, message: str, *, slug: str, http_status: int | None = None) -> None:
        super().__init__(message)
        self.slug = slug
        self.http_status = http_status


class Misused(Fault):
    """The command itself is wrong: an option, an argument, or a file that was named."""

    exit_code = 2

    def __init__(self, message: str, *, slug: str = "usage") -> None:
        super().__init__(message, slug=slug)


class Unreachable(Fault):
    """No gateway answers where it should be."""

    exit_code = 3


class NotAllowed(Fault):
    """The gateway does not let whoever asks, or would not."""

    exit_code = 4


def tell(error: click.ClickException, *, as_json: bool, file: IO[Any] | None = None) -> None:
    """Say on stderr what went wrong: in words, or as one JSON object."""
    if as_json:
        click.echo(json.dumps({"error": described(error)}), file=file or sys.stderr)
    elif isinstance(error, Fault):
        click.echo(f"crabtwist: {error.message}", file=file or sys.stderr)
    else:
        error.show(file)


def described(error: click.ClickException) -> Mapping[str, Any]:
    """Return what programs are told of an error."""
    slug = error.slug if isinstance(error, Fault) else "usage"
    status = error.http_status if isinstance(error, Fault) else None
    return {
        "slug": slug,
        "message": error.format_message(),
        "http_status": status,
        "exit_code": error.exit_code,
    }
