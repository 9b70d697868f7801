"""Which header fields travel up, and which down."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.headers import CREDENTIALS, HOP_BY_HOP, downward, first, upward

NAMES = st.sampled_from([b"X-A", b"x-a", b"Accept", b"Connection", b"TE", b"x-b"])


class UpwardTests(SynchronousTestCase):
    """From the client to the upstream."""

    def test_open_list(self) -> None:
        """Whatever is not known passes as it came: order, spelling, repetition, empty values."""
        fields = (
            (b"anthropic-beta", b"b,a"),
            (b"Anthropic-Beta", b"c"),
            (b"X-Brand-New", b""),
            (b"x-stainless-retry-count", b"1"),
            (b"User-Agent", b"claude-cli"),
            (b"anthropic-version", b"2023-06-01"),
        )
        self.assertEqual(fields, upward(fields))

    def test_credentials(self) -> None:
        """A client's credentials are not the upstream's business, however they are spelled."""
        fields = [(name.upper(), b"secret") for name in CREDENTIALS]
        self.assertEqual((), upward([*fields, (b"X-Api-Key", b"secret"), (b"Cookie", b"secret")]))

    def test_hop_by_hop(self) -> None:
        """What is about one connection stays on it."""
        self.assertEqual((), upward([(name.title(), b"x") for name in HOP_BY_HOP]))

    def test_named_by_connection(self) -> None:
        """So does what `Connection` names (RFC 9110, 7.6.1), in any of its fields."""
        fields = ((b"Connection", b"close, X-Mine"), (b"connection", b" x-yours "))
        self.assertEqual(
            ((b"x-kept", b"1"),), upward([*fields, (b"x-mine", b"1"), (b"X-Yours", b"1"), (b"x-kept", b"1")])
        )

    def test_made_anew(self) -> None:
        """Host, length and the accepted encodings are the gateway's to say."""
        self.assertEqual(
            (), upward([(b"Host", b"a"), (b"Content-Length", b"3"), (b"Accept-Encoding", b"br")])
        )

    def test_own(self) -> None:
        """Nobody sends fields in the gateway's name."""
        self.assertEqual((), upward([(b"X-Crabtwist-Request-Id", b"x"), (b"x-crabtwist-new", b"x")]))

    @given(st.lists(st.tuples(NAMES, st.sampled_from([b"close", b"x-a", b"x-b, te", b"", b",,"]))))
    @settings(deadline=None)
    def test_only_leaves_out(self, fields: list[tuple[bytes, bytes]]) -> None:
        """What arrives is what was sent, in order, with some left out; doing it twice changes nothing."""
        passed = upward(fields)
        remaining = iter(fields)
        self.assertTrue(all(field in remaining for field in passed))
        self.assertEqual(passed, upward(passed))


class DownwardTests(SynchronousTestCase):
    """From the upstream to the client."""

    def test_open_list(self) -> None:
        """Rate limits, ids and whatever else the vendor says pass as they came."""
        fields = (
            (b"content-type", b"application/json"),
            (b"request-id", b"req_1"),
            (b"Retry-After", b"3"),
            (b"anthropic-ratelimit-requests-remaining", b"7"),
            (b"x-should-retry", b"false"),
            (b"Server", b"vendor"),
            (b"content-encoding", b"gzip"),
        )
        self.assertEqual(fields, downward(fields))

    def test_not_for_the_client(self) -> None:
        """Cookies, other addresses and the length of this hop's body are not."""
        names = (b"Set-Cookie", b"set-cookie2", b"Alt-Svc", b"Content-Length", b"X-Crabtwist-Error")
        self.assertEqual((), downward([(name, b"x") for name in names]))

    def test_hop_by_hop(self) -> None:
        """What is about one connection stays on it, and what `Connection` names."""
        fields = [(name, b"x") for name in HOP_BY_HOP]
        self.assertEqual((), downward([*fields, (b"Connection", b"Keep-Alive, X-One"), (b"x-one", b"1")]))

    def test_credentials(self) -> None:
        """A name that would be a credential upwards is an ordinary one downwards."""
        self.assertEqual(((b"api-key", b"x"),), downward([(b"api-key", b"x")]))


class FirstTests(SynchronousTestCase):
    """Looking one field up."""

    def test_first(self) -> None:
        """The first of a name counts, in any spelling; None if there is none."""
        fields = ((b"a", b"1"), (b"Retry-After", b"2"), (b"retry-after", b"3"))
        self.assertEqual(b"2", first(fields, b"retry-after"))
        self.assertIsNone(first(fields, b"b"))
