"""What the admin API shows of a node besides its keys and providers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from crabtwist.config import Config
from crabtwist.discovery import Makers
from crabtwist.gateway import Gateway
from crabtwist.web.admin.follow import Tail


def _nowhere() -> list[str]:
    return []


@attrs.frozen(kw_only=True)
class Inside:
    """
    The inside of one node, to be looked at.

    `config` returns the configuration as it runs now, `listening` the addresses that are served, `nodes`
    how many nodes are alive on the same store.  `started_at` is Unix time in seconds.
    """

    gateway: Gateway
    config: Callable[[], Config]
    makers: Makers
    storage: Any
    tail: Tail
    started_at: float
    extensions: Sequence[Any] = ()
    listening: Callable[[], Sequence[str]] = _nowhere
    nodes: Callable[[], int] = lambda: 1

    def extension(self, name: str) -> Any:
        """Return the extension of this name, None if it is not configured."""
        return next((each for each in self.extensions if each.name == name), None)
