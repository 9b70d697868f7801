"""Keys as the store keeps them, and what opens them while they are rotated."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.keys import KeyRing, KeyTerms
from crabtwist.settings import read
from crabtwist.stored_keys import HINT_LETTERS, MOST_SECRETS, StoredKey, decode, issue, table_of
from crabtwist.terms import KeyBudgetSettings, LimitSettings

DIGEST_KEY = b"k" * 32
NOW = 1_800_000_000.0

TERMS = KeyTerms(
    models=("small", "large"),
    expires_at="2027-01-31T18:00:00Z",
    disabled=True,
    limits=LimitSettings(requests_per_minute=10),
    budget=KeyBudgetSettings(dollars=1.5, per="day"),
    metadata={"team": "blue"},
)


def opens(key: StoredKey, secret: str, at: float) -> bool:
    """Say whether a secret opens a key."""
    ring = KeyRing([], DIGEST_KEY, [(key.virtual, key.digests)])
    return ring.authenticate(secret.encode(), at) is not None


class KeepingTests(SynchronousTestCase):
    """What is kept of a key."""

    def test_whole(self) -> None:
        """A key is the same after it was kept, whatever its terms."""
        for terms in (KeyTerms(), TERMS, KeyTerms(limits=LimitSettings(), metadata={"": "ü"})):
            key, _ = issue("ann", terms, DIGEST_KEY, NOW)
            key, _ = key.rotated(DIGEST_KEY, NOW, 60)
            kept = decode(key.encode())
            self.assertEqual(key.secrets, kept.secrets)
            self.assertEqual(key.virtual.models, kept.virtual.models)
            self.assertEqual(table_of(key.terms), table_of(kept.terms))

    def test_table(self) -> None:
        """Terms as a table read as they are, however often."""
        table = table_of(TERMS)
        for _ in range(2):
            complaints: list[str] = []
            terms = read(KeyTerms, table, "", complaints)
            self.assertEqual([], complaints)
            assert terms is not None
            self.assertEqual(TERMS, terms)
            table = table_of(terms)

    def test_no_secret(self) -> None:
        """Nothing of a secret is kept but its digest and its last letters."""
        key, secret = issue("ann", KeyTerms(), DIGEST_KEY, NOW)
        kept = key.encode().decode()
        self.assertIn(secret[-HINT_LETTERS:], kept)
        for start in range(len(secret) - 8):
            self.assertNotIn(secret[start : start + 8], kept)

    def test_unreadable(self) -> None:
        """What this version cannot read says why."""
        for data in (b"", b"{}", b"[]", b'{"name":"a","terms":{"x":1},"secrets":[],"created_at":0}'):
            self.assertRaises(ValueError, decode, data)


class RotationTests(SynchronousTestCase):
    """A key with a new secret."""

    def test_overlap(self) -> None:
        """The old secret opens the key until the overlap ends, the new one from the start and for ever."""
        key, old = issue("ann", KeyTerms(), DIGEST_KEY, NOW)
        key, new = key.rotated(DIGEST_KEY, NOW, 60)
        self.assertTrue(opens(key, old, NOW + 59.9) and opens(key, new, NOW))
        self.assertFalse(opens(key, old, NOW + 60))
        self.assertTrue(opens(key, new, NOW + 1e9))

    def test_at_once(self) -> None:
        """Without an overlap the old secret is not even kept."""
        key, old = issue("ann", KeyTerms(), DIGEST_KEY, NOW)
        key, _ = key.rotated(DIGEST_KEY, NOW, 0)
        self.assertEqual(1, len(key.secrets))
        self.assertFalse(opens(key, old, NOW))

    def test_never_longer(self) -> None:
        """A second rotation does not lengthen the life of a secret that was to end before."""
        key, old = issue("ann", KeyTerms(), DIGEST_KEY, NOW)
        key, _ = key.rotated(DIGEST_KEY, NOW, 60)
        key, _ = key.rotated(DIGEST_KEY, NOW + 30, 600)
        self.assertFalse(opens(key, old, NOW + 60))

    @given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=12))
    @settings(deadline=None, max_examples=40)
    def test_bounded(self, steps: list[tuple[float, float]]) -> None:
        """However often it is rotated it has few secrets, the newest first, and that one opens it."""
        now = NOW
        key, secret = issue("ann", KeyTerms(), DIGEST_KEY, now)
        for pause, overlap in steps:
            now += pause
            key, secret = key.rotated(DIGEST_KEY, now, overlap)
        self.assertLessEqual(len(key.secrets), MOST_SECRETS)
        self.assertIsNone(key.secrets[0].digest.until)
        self.assertTrue(all(old.digest.until is not None for old in key.secrets[1:]))
        self.assertTrue(opens(key, secret, now))
