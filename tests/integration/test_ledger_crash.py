"""A process that keeps journal and ledger is killed again and again: nothing is lost, nothing doubled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.trial.unittest import TestCase

from crabtwist.delivery import Delivery
from crabtwist.journal import Journal
from crabtwist.ledger.sqlite import SQLiteLedger, SQLiteLedgerSettings
from crabtwist.records import INTERRUPTED, Record, Reservation, Tokens, Total
from tests.integration.running import CHECKOUT

ROUNDS = 10
START_SECONDS = 30.0
#: How many requests are under way at once.
OPEN = 20
ESTIMATED_COST = 1000


@attrs.frozen
class Services:
    clock: Any
    directory: Path


@attrs.frozen
class Books:
    """Journal, ledger, and the way between them, as a node has them."""

    journal: Journal
    ledger: SQLiteLedger
    delivery: Delivery


def books(reactor: Any, folder: Path) -> Books:
    def in_thread(work: Any) -> Deferred[Any]:
        return deferToThreadPool(reactor, reactor.getThreadPool(), work)

    journal = Journal(folder / "journal", reactor, in_thread, segment_bytes=20_000)
    ledger = SQLiteLedger(SQLiteLedgerSettings(), Services(reactor, folder))
    return Books(journal, ledger, Delivery(journal, ledger, reactor, interval_seconds=0.02, batch_records=50))


class Load:
    """Requests without end; what was noted of each is reported in a file, but never before it was noted."""

    def __init__(self, folder: Path, name: str) -> None:
        self._random = Random(name)
        self._name = name
        self._number = 0
        self._open: list[str] = []
        self._settled: list[str] = []
        self._report = os.open(folder / "report", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def some(self, journal: Journal) -> None:
        # A settlement is noted at the end of the reactor's turn.
        while self._settled:
            os.write(self._report, f"S {self._settled.pop()}\n".encode())
        while len(self._open) < OPEN:
            self._number += 1
            reserved = f"{self._name}-{self._number}"
            journal.reserve(
                Reservation(
                    id=reserved,
                    principal="alice",
                    provider="acme",
                    estimated_cost=ESTIMATED_COST,
                    prompt_tokens=3,
                )
            )
            self._open.append(reserved)
            os.write(self._report, f"R {reserved}\n".encode())
        for _ in range(OPEN // 2):
            settled = self._open.pop(self._random.randrange(OPEN // 2))
            usage = Tokens(input_tokens=self._random.randrange(100))
            cost = self._random.randrange(10**13)
            journal.settle(
                Record(
                    id=settled, principal="alice", provider="acme", reason="complete", usage=usage, cost=cost
                )
            )
            self._settled.append(settled)


def main(folder: Path, name: str) -> None:
    """Recover what the last process left, and work until somebody kills this one."""
    from twisted.internet import reactor

    kept, load = books(reactor, folder), Load(folder, name)

    async def work() -> None:
        os.write(sys.stdout.fileno(), b"started\n")
        await kept.ledger.open()
        kept.journal.open()
        kept.delivery.start()
        LoopingCall(load.some, kept.journal).start(0.001)

    running: Any = reactor
    running.callWhenRunning(lambda: Deferred.fromCoroutine(work()).addErrback(lambda _: os._exit(3)))
    running.run()


class TestKill(TestCase):
    timeout = 300

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.random = Random()

    def kill_one(self, name: str, seconds: float) -> None:
        """Start a process, and kill it so long after its start; it must not have ended by itself."""
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.folder), name], cwd=CHECKOUT, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"started\n")
            with self.assertRaises(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()

    def reported(self) -> tuple[set[str], set[str]]:
        """Return what was certainly reserved, and what was certainly settled."""
        lines = (self.folder / "report").read_text().splitlines()
        reserved, settled = ({line[2:] for line in lines if line.startswith(kind)} for kind in ("R ", "S "))
        return reserved, settled

    async def recovered(self) -> tuple[list[Record], list[Total]]:
        """Return all records and the totals, after one more start."""
        from twisted.internet import reactor

        kept = books(reactor, self.folder)
        await kept.ledger.open()
        kept.journal.open()
        self.assertTrue(await kept.delivery.flush())
        records: list[Record] = []
        page = await kept.ledger.records(limit=1000)
        records += page.records
        while page.before is not None:
            page = await kept.ledger.records(limit=1000, before=page.before)
            records += page.records
        totals = await kept.ledger.totals(())
        await kept.journal.close()
        await kept.ledger.close()
        return records, totals

    def check_each(self, records: list[Record]) -> None:
        reserved, settled = self.reported()
        found = {record.id: record for record in records}
        self.assertEqual(len(found), len(records), "a request is there twice")
        self.assertEqual(reserved - found.keys(), set(), "reserved and lost")
        interrupted = {record.id for record in records if record.reason == INTERRUPTED}
        self.assertEqual(settled & interrupted, set(), "settled and taken for interrupted")
        for name in interrupted:
            self.assertEqual((found[name].estimated, found[name].cost), (True, ESTIMATED_COST))
        self.assertGreater(len(interrupted), OPEN // 2)
        self.assertGreater(len(settled), 100)

    def check_sums(self, records: list[Record], total: Total) -> None:
        used = [record.usage or Tokens() for record in records]
        self.assertEqual(total.requests, len(records))
        self.assertEqual(total.cost, sum(record.cost or 0 for record in records))
        self.assertEqual(total.input_tokens, sum(usage.input_tokens for usage in used))
        self.assertEqual(total.estimated, sum(record.estimated for record in records))

    async def test_kill(self) -> None:
        """Whenever a process is killed, each request is in the ledger once, settled or interrupted."""
        for number in range(ROUNDS):
            # Every third dies while it still recovers what the one before it left.
            most_seconds = 0.03 if number % 3 == 2 else 1.0
            self.kill_one(f"{number}", self.random.uniform(0.0, most_seconds))
        for _ in range(2):
            records, totals = await self.recovered()
            self.check_each(records)
            self.check_sums(records, totals[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
