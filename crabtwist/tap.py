"""`twistd crabtwist`: its options, and the service they make."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from twisted.application.service import IService
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.python import usage

from crabtwist import heap

# The whole gateway is loaded here: a tenth of a start would go by in looking for garbage among it.
with heap.growing():
    from crabtwist.config import NO_LEDGER, Config, load
    from crabtwist.discovery import discover
    from crabtwist.errors import ConfigurationError
    from crabtwist.first_start import welcome, write_first_config
    from crabtwist.listener import parse_listen
    from crabtwist.node import Node

DEFAULT_PATH = "crabtwist.toml"


class Options(usage.Options):
    """The words after `twistd crabtwist`."""

    synopsis = "[options]"
    longdesc = (
        "An LLM API gateway: virtual keys, faithful streams, exact accounting. "
        "Without a configuration file the first start writes one and says how to use it. "
        "SIGHUP reads it again; SIGTERM lets running requests finish."
    )
    optParameters = [
        ["config", "c", DEFAULT_PATH, "The configuration file (TOML)."],
    ]
    optFlags = [
        ["check", None, "Validate the configuration, print what would be served, and exit."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, where: str) -> None:
        """Listen on host:port or a Twisted endpoint string, in place of the file's; repeatable."""
        self["listen"].append(where)

    opt_l = opt_listen


def makeService(options: Options) -> IService:
    """Return the service; ends the process with status 1 and every complaint if it cannot be."""
    from twisted.internet import reactor

    try:
        return make_node(options, reactor, os.environ)
    except ConfigurationError as error:
        for complaint in error.complaints:
            print(f"crabtwist: {complaint}", file=sys.stderr)  # noqa: T201 - for whoever typed the command
        raise SystemExit(1) from None


def make_node(options: Options, reactor: Any, environ: Mapping[str, str]) -> Node:
    """Return the node that the options ask for; raises `ConfigurationError`."""
    path = Path(options["config"]).absolute()
    makers = discover()
    # First of all: a slip in them must not cost the one showing of a first start's secrets.
    endpoints = _endpoints(options["listen"], "--listen", reactor)
    first_start = None
    if not path.exists():
        if options["check"]:
            raise ConfigurationError(
                [f"{path}: cannot be read: No such file; a start without --check writes one"]
            )
        first_start = write_first_config(path, environ)
    config = load(path, environ, makers)
    listen = options["listen"] or config.listen
    endpoints = endpoints or _endpoints(listen, "listen", reactor)
    node = Node(
        config,
        reactor,
        endpoints,
        directory=path.parent,
        load=lambda: load(path, environ, makers),
        makers=makers,
        start_failed=lambda: _end_with_failure(reactor),
    )
    if options["check"]:
        _report(config, listen)
    if first_start is not None:
        print(welcome(first_start, _url(listen[0])), flush=True)  # noqa: T201 - shown once, never logged
    return node


def _endpoints(listen: Sequence[str], said_by: str, reactor: Any) -> list[IStreamServerEndpoint]:
    complaints, endpoints = [], []
    for index, where in enumerate(listen):
        try:
            endpoints.append(parse_listen(where, reactor))
        except ValueError as error:
            complaints.append(f"{said_by}[{index}]: {error}")
    if complaints:
        raise ConfigurationError(complaints)
    return endpoints


def _url(listen: str) -> str:
    """Return where a client finds the first place that is listened on, as well as can be told."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit():
        return "http://127.0.0.1:5632"
    return f"http://{'127.0.0.1' if host in ('', '0.0.0.0', 'tcp') else host}:{port}"  # noqa: S104 - read, not bound


def _report(config: Config, listen: Sequence[str]) -> NoReturn:
    """Print what would be served, and exit."""
    lines = [f"would listen on {', '.join(listen)}"]
    for provider in config.providers:
        names = ", ".join(model.name for model in provider.common.models)
        lines.append(f"provider {provider.name} ({provider.common.kind}): {names}")
    lines += [f"alias {alias}: {model}" for alias, model in config.aliases.items()]
    lines += [f"key {key.name}: {', '.join(key.models)}" for key in config.keys]
    lines += [f"extension {extension.name}" for extension in config.extensions]
    lines.append(f"storage {config.storage.kind}")
    lines.append(f"ledger {NO_LEDGER if config.ledger is None else config.ledger.kind}")
    print("\n".join(lines))  # noqa: T201 - this is the option's purpose
    raise SystemExit(0)


def _end_with_failure(reactor: Any) -> None:
    """Stop, with exit status 1: twistd has no other way to say that a start failed late."""
    atexit.register(_exit_with_failure)
    # Services are started before the reactor is, and only a running one can be stopped.
    reactor.callWhenRunning(_stop_once, reactor)


def _stop_once(reactor: Any) -> None:
    # Somebody may have stopped it while the start was under way.
    with contextlib.suppress(ReactorNotRunning):
        reactor.stop()


def _exit_with_failure() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
