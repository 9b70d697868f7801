"""
How often Python looks for garbage that refers to itself.

Its own rules suit short programs: they look at everything that was ever loaded, hundreds of thousands of
objects, again and again while requests wait.  What is there once a gateway serves stays until its end, and
what a request leaves behind is young; so only the young are looked at, and not after every few requests.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: So many more containers than were let go have to be there before the young are looked at: what about
#: a hundred requests that end well leave behind, or fifty that end in an exception, their bodies among it.
YOUNG_OBJECTS = 5_000
#: So many of those looks, before those who survived one are looked at again, and of these before the rest.
LOOKS_AT_YOUNG, LOOKS_AT_MIDDLE = 20, 50


@contextmanager
def growing() -> Iterator[None]:
    """Look at nothing meanwhile: for a time in which nearly all that comes stays, as in a start."""
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def settle() -> None:
    """Take all that is there now for what stays; once, when a process is ready to serve."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, LOOKS_AT_YOUNG, LOOKS_AT_MIDDLE)
