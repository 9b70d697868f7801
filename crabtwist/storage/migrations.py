"""What the stores outside of this process have in common: their error, schemas, threads, prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Thread

from twisted.python.threadpool import ThreadPool

from crabtwist.errors import CrabtwistError

#: The SQL statements that lead from one version of a schema to the next.
Step = Sequence[str]

#: How many calls may wait in one store; what comes on top fails at once, for memory has an end.
MOST_WAITING = 10_000


class StorageError(CrabtwistError):
    """
    A store cannot do what it was asked to: out of reach, too slow, closed, or not ours.

    The words never hold a password, a key or a value.  An increment that failed on its way may have been
    counted or not; a value that was being set may be the old one or the new one.
    """


def closed(where: str) -> StorageError:
    """Return the error of a call before `open` or after `close`."""
    return StorageError(f"{where} is not open")


def overloaded(where: str) -> StorageError:
    """Return the error of a call that found `MOST_WAITING` others before it."""
    return StorageError(f"{where} is too slow: {MOST_WAITING} calls wait already")


def steps_after(version: int, steps: Sequence[Step], where: str) -> Sequence[Step]:
    """
    Return the steps that a schema of `version` still has to take; version 0 has nothing yet.

    Raises `StorageError` for a schema that is newer than the last step: nobody here knows what it means.
    """
    if not 0 <= version <= len(steps):
        raise StorageError(
            f"{where} has schema version {version}, and this crabtwist knows those up to {len(steps)}: "
            "use the newer crabtwist that wrote it, or another place"
        )
    return steps[version:]


def one_thread(name: str) -> ThreadPool:
    """Return a running pool of one thread, the same one for all that it is given; `stop` it at last."""
    pool = ThreadPool(1, 1, name)
    # A process that ends without `stop`, for its start failed half way, does not wait for the thread.
    pool.threadFactory = partial(Thread, daemon=True)  # type: ignore[assignment] # any maker will do
    pool.start()
    return pool


def end_of_prefix(prefix: bytes) -> bytes | None:
    """Return the least key after all keys that begin with `prefix`, None where there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None
