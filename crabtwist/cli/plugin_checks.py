"""What a doctor looks at among plugins: drop-ins that cannot be loaded, and a cache that is behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import twisted.plugins
from twisted.plugin import IPlugin, getCache
from twisted.python.modules import getModule

from crabtwist.cli.findings import Finding, fine, problem
from crabtwist.discovery import Makers, discover
from crabtwist.errors import ConfigurationError

CACHE = "dropin.cache"


def look_at_plugins(package: ModuleType | None = None) -> tuple[list[Finding], Makers]:
    """Look at all drop-ins; returns what was found, and the makers, none if two have the same word."""
    package = package or twisted.plugins
    try:
        makers = discover(package)
    except ConfigurationError as error:
        why, do = "The gateway does not start.", "Remove one of the drop-ins."
        return [problem(words, why, do) for words in error.complaints], Makers()
    found = [*_failed(makers), *_stale(package)]
    return found or [fine("plugins: all can be loaded, and the cache is up to date")], makers


def _failed(makers: Makers) -> Iterator[Finding]:
    for module, why in makers.failed.items():
        yield problem(
            f"the drop-in {module} cannot be loaded: {why}",
            "What is in it cannot be used.",
            "Put it right, or remove its file from twisted/plugins.",
        )


def _stale(package: ModuleType) -> Iterator[Finding]:
    """Find the drop-ins whose file has other plugins than Twisted remembers."""
    cached: dict[str, Any] = getCache(package)
    for module in getModule(package.__name__).iterModules():
        dropin = cached.get(module.name.rpartition(".")[2])
        if dropin is None:
            continue
        try:
            loaded = vars(module.load())
        except Exception:  # noqa: S112 - told of as one that cannot be loaded, if it is one of ours
            continue
        there = {name for name, value in loaded.items() if IPlugin(value, None) is not None}
        remembered = {plugin.name for plugin in dropin.plugins}
        if there != remembered:
            yield _behind(Path(module.filePath.path), sorted(there ^ remembered))


def _behind(path: Path, names: list[str]) -> Finding:
    return problem(
        f"{path.parent / CACHE} is behind {path.name}: {', '.join(names)}",
        "twistd goes by the cache, so what is new is not found, and what is gone is looked for.",
        f"rm {path.parent / CACHE}",
    )
