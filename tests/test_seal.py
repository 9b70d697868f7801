"""What keeps the store's contents from those who read the store."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from crabtwist.seal import Seal
from crabtwist.settings import Secret

HERE, THERE = Secret("a" * 64), Secret("b" * 64)


class SealTests(SynchronousTestCase):
    """What one `secret_key` closes, and another cannot open."""

    def test_opens(self) -> None:
        """What was closed with a key is opened by it, also by another node that has the same."""
        self.assertEqual(b"credential", Seal(HERE).open(Seal(Secret("a" * 64)).close(b"credential")))

    def test_hidden(self) -> None:
        """What is closed shows nothing of what it was, and not even that it was the same before."""
        closed = Seal(HERE).close(b"credential")
        self.assertNotIn(b"credential", closed)
        self.assertNotEqual(closed, Seal(HERE).close(b"credential"))

    def test_other_key(self) -> None:
        """Another key opens nothing, and neither does this one what was changed."""
        closed = Seal(HERE).close(b"credential")
        self.assertRaises(ValueError, Seal(THERE).open, closed)
        for damaged in (closed[:-2] + b"AA", b"", b"plain", "ü".encode()):
            self.assertRaises(ValueError, Seal(HERE).open, damaged)

    def test_purposes(self) -> None:
        """The digests' key and the mark are the key's own, differ from one another and do not tell it."""
        seal, other = Seal(HERE), Seal(THERE)
        self.assertEqual((seal.mark, seal.digest_key), (Seal(HERE).mark, Seal(HERE).digest_key))
        self.assertEqual(4, len({seal.mark, other.mark, seal.digest_key.hex().encode(), other.digest_key}))
        self.assertNotIn(HERE.reveal().encode(), seal.mark)
