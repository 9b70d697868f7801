"""What a doctor looks at without a gateway: the configuration, its folder, and the stores."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred

from crabtwist.administration import has_other_mark
from crabtwist.cli.findings import Finding, fine, problem, warning
from crabtwist.config import Config, load
from crabtwist.discovery import Makers
from crabtwist.errors import ConfigurationError
from crabtwist.generation import Services
from crabtwist.settings import Secret

#: How long a store may take to be opened, or closed.
STORE_SECONDS = 15.0

_OTHERS = 0o077


@attrs.frozen
class Looked:
    """What was found in a configuration's folder; `config` is None if it cannot be served."""

    findings: list[Finding]
    config: Config | None = None


def look_at_folder(path: Path, environ: Mapping[str, str], makers: Makers) -> Looked:
    """Look at the configuration at `path` and its folder; nothing is opened."""
    if not path.exists():
        return Looked([_no_file(path)])
    try:
        config = load(path, environ, makers)
    except ConfigurationError as error:
        return Looked([_complaint(path, words) for words in error.complaints])
    return Looked(
        [
            fine(f"{path}: can be served"),
            *_permissions(path),
            *_access(path, config),
            *_folder(path.absolute().parent, config),
        ],
        config,
    )


def _no_file(path: Path) -> Finding:
    return warning(
        f"{path} is not there",
        "The configuration, its folder and the stores are not looked at.",
        "Run this in the gateway's folder, or name the file with --config; a first start writes one.",
    )


def _complaint(path: Path, words: str) -> Finding:
    return problem(
        f"{path}: {words}",
        "A gateway does not start with it; one that runs keeps the configuration that it has.",
        "Put it right (`twistd crabtwist --check` tells); variables have to be set where this runs, too.",
    )


def _permissions(path: Path) -> Iterator[Finding]:
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS:
        yield warning(
            f"{path} can be read by others (mode {mode:o})",
            "It holds the admin token, and the secrets of keys and providers.",
            f"chmod 600 {path}",
        )


def _access(path: Path, config: Config) -> Iterator[Finding]:
    if config.admin_token is None:
        yield warning(
            f"{path} has no `admin_token`",
            "There is no admin API, and most of this command has nobody to ask.",
            "Add one of 64 random letters, and restart.",
        )
    if config.secret_key is None:
        yield warning(
            f"{path} has no `secret_key`",
            "No keys and providers can be made while the gateway runs.",
            "Add one of 64 random letters, the same on all nodes, and restart.",
        )
    if config.allow_anonymous and any(map(_is_for_others, config.listen)):
        yield warning(
            "everybody who can connect is served (`allow_anonymous`)",
            "Whoever reaches the gateway's address spends your money.",
            "Use [[keys]] in its place, or listen on 127.0.0.1.",
        )


def _is_for_others(listen: str) -> bool:
    """Tell whether other machines can connect to an entry of `listen`, as far as it says so."""
    here = ("127.", "localhost:", "[::1]:", "unix:", "systemd:", "fd:")
    return not (listen.startswith(here) or "interface=127." in listen or r"interface=\:\:1" in listen)


def _folder(folder: Path, config: Config) -> Iterator[Finding]:
    local = [kind for kind, path in _local_paths(config) if folder in (folder / path).parents]
    if local and not os.access(folder, os.W_OK | os.X_OK):
        yield problem(
            f"{folder} cannot be written to by whoever runs this",
            f"The {' and the '.join(local)} are kept there.",
            "Run this as the gateway's user; if you did, give that user the folder.",
        )


def _local_paths(config: Config) -> Iterator[tuple[str, str]]:
    for kind, configured in (("storage", config.storage), ("ledger", config.ledger)):
        path = getattr(configured and configured.settings, "path", None)
        if path is not None:
            yield kind, str(path)
    if config.ledger is not None:
        yield "journal", config.ledger.common.journal


# --- stores ------------------------------------------------------------------------------------------


async def look_at_stores(folder: Path, config: Config, clock: Any) -> list[Finding]:
    """Open and close the storage and the ledger; files that are not there yet are not made."""
    found = [await _look_at(folder, "storage", config.storage, clock, config.secret_key)]
    if config.ledger is not None:
        found.append(await _look_at(folder, "ledger", config.ledger, clock))
    return found


async def _look_at(
    folder: Path, sort: str, configured: Any, clock: Any, secret_key: Secret | None = None
) -> Finding:
    name = f"the {sort} ({configured.kind})"
    path = getattr(configured.settings, "path", None)
    if path is not None and not (folder / path).exists():
        return fine(f"{name} is not there yet; the gateway makes it when it starts")
    try:
        store = configured.maker.make(configured.settings, Services(clock=clock, directory=folder))
        await _within(store.open, clock)
        strange = secret_key and await _within(lambda: _other_mark(store, secret_key), clock)
        await _within(store.close, clock)
    except CancelledError:
        raise
    except Exception as error:
        # A stranger's store may fail in any way, and that is what is asked here.
        return problem(
            f"{name} cannot be opened: {_words(error)}",
            "The gateway does not start without it.",
            f"See whether it runs and can be reached from here, and that [{sort}] says so.",
        )
    if strange:
        return problem(
            f"{name} was written with another `secret_key`",
            "The gateway does not start: nothing that was made while it ran would open anything.",
            "Put the old one back; the page on keys says how it is changed.",
        )
    return fine(f"{name} can be opened")


def _other_mark(store: Any, secret_key: Secret) -> Deferred[bool]:
    return Deferred.fromCoroutine(has_other_mark(store, secret_key))


def _within(action: Callable[[], Awaitable[object]], clock: Any) -> Deferred[Any]:
    return maybeDeferred(action).addTimeout(STORE_SECONDS, clock, _too_slow)


def _too_slow(_result: object, seconds: float) -> Any:
    raise TimeoutError(f"it took more than {seconds:g} seconds")


def _words(error: Exception) -> str:
    if isinstance(error, ConfigurationError):
        return "; ".join(error.complaints)
    return str(error) or type(error).__name__
