"""Virtual keys: whose they are, what they allow, and where a request carries them."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.errors import Refusal
from crabtwist.keys import (
    Digest,
    KeyRing,
    KeySettings,
    VirtualKey,
    allows,
    check_distinct,
    credential,
    digest_of,
    generate_key,
)
from crabtwist.settings import Secret
from crabtwist.terms import unix_time


def key(name: str, secret: str, *models: str) -> KeySettings:
    return KeySettings(name=name, key=Secret(secret), models=models or ("*",))


class TestKeyRing(SynchronousTestCase):
    def test_recognises_its_keys(self) -> None:
        """A secret leads to its key's name and models."""
        ring = KeyRing([key("ann", "secret-a", "m", "n"), key("bob", "secret-b")])
        self.assertEqual(ring.authenticate(b"secret-a"), VirtualKey("ann", frozenset({"m", "n"})))
        self.assertEqual(ring.authenticate(b"secret-b"), VirtualKey("bob", None))

    def test_recognises_no_other(self) -> None:
        """Anything but a whole secret is nobody's."""
        ring = KeyRing([key("ann", "secret-a")])
        for secret in (b"", b"secret-", b"secret-a ", b"SECRET-A", b"secret-aa", b"\xff\x00"):
            self.assertIsNone(ring.authenticate(secret))

    def test_every_key_among_many(self) -> None:
        """A large ring recognises each of its keys as itself."""
        ring = KeyRing(key(f"k{n}", f"secret-{n}") for n in range(500))
        names = [found and found.name for found in (ring.authenticate(b"secret-%d" % n) for n in range(500))]
        self.assertEqual(names, [f"k{n}" for n in range(500)])

    def test_digests_that_begin_alike(self) -> None:
        """Keys whose digests begin alike are told apart."""
        ring = KeyRing([key("ann", "secret-a"), key("bob", "secret-b")])
        entries = [entry for bucket in ring._buckets.values() for entry in bucket]
        ring._buckets = {digest.digest[:4]: entries for digest, _ in entries}
        found = [ring.authenticate(secret) for secret in (b"secret-a", b"secret-b")]
        self.assertEqual([each and each.name for each in found], ["ann", "bob"])

    def test_another_digest_key(self) -> None:
        """What was made with one key of digests is nobody's with another."""
        made = [(VirtualKey("eve", None), [Digest(digest_of("secret-e", b"one"))])]
        found = [KeyRing([], name, made).authenticate(b"secret-e") for name in (b"one", b"two")]
        self.assertEqual(found, [VirtualKey("eve", None), None])

    def test_rotated(self) -> None:
        """A key may have two secrets, one of them for some time only."""
        digests = [Digest(digest_of("old", b""), until=100.0), Digest(digest_of("new", b""))]
        ring = KeyRing([], b"", [(VirtualKey("eve", None), digests)])
        for now, old in ((99.9, VirtualKey("eve", None)), (100.0, None)):
            self.assertEqual(ring.authenticate(b"old", now), old)
            self.assertEqual(ring.authenticate(b"new", now), VirtualKey("eve", None))

    def test_each_once(self) -> None:
        """It tells its keys, each once, however many secrets one has."""
        other = key("bob", "secret-b").virtual
        ring = KeyRing([key("ann", "secret-a")], b"", [(other, [Digest(b"1" * 32), Digest(b"2" * 32)])])
        self.assertEqual(["ann", "bob"], sorted(each.name for each in ring))

    def test_empty_ring(self) -> None:
        """Without keys nobody is recognised."""
        self.assertIsNone(KeyRing([]).authenticate(b"secret"))

    def test_holds_no_secret(self) -> None:
        """Nothing in the ring holds a secret in clear."""
        ring = KeyRing([key("ann", "secret-a")])
        self.assertNotIn("secret-a", repr(vars(ring)))


class TestCheck(SynchronousTestCase):
    def test_expired(self) -> None:
        """From its moment on a key opens nothing, and is told so."""
        settings = KeySettings(name="ann", key=Secret("secret-a"), expires_at="2027-01-31T18:00:00+01:00")
        settings.virtual.check(1801414799.9)
        refusal = self.assertRaises(Refusal, settings.virtual.check, 1801414800.0)
        self.assertEqual((refusal.status, refusal.slug), (401, "key_expired"))

    def test_disabled(self) -> None:
        """A disabled key opens nothing."""
        refusal = self.assertRaises(Refusal, VirtualKey("ann", None, disabled=True).check, 0.0)
        self.assertEqual((refusal.status, refusal.slug), (401, "key_disabled"))

    def test_moments(self) -> None:
        """A moment has a date, a time and a zone."""
        for text in ("tomorrow", "2027-01-31", "2027-01-31T18:00:00", ""):
            self.assertRaises(ValueError, unix_time, text)
        self.assertEqual(unix_time("1970-01-01T00:00:01Z"), 1.0)


class TestAllows(SynchronousTestCase):
    def test_all(self) -> None:
        """A key for all models, and the absence of keys, allow everything."""
        self.assertTrue(allows(VirtualKey("ann", None), "m"))
        self.assertTrue(allows(None, "m"))

    def test_star_among_others(self) -> None:
        """A star beside other names means all as well."""
        ring = KeyRing([key("ann", "secret-a", "m", "*")])
        self.assertTrue(allows(ring.authenticate(b"secret-a"), "anything"))

    def test_listed_model(self) -> None:
        """A listed model may be used by its name and through an alias; others may not."""
        ann = VirtualKey("ann", frozenset({"m"}))
        self.assertTrue(allows(ann, "m", "m"))
        self.assertTrue(allows(ann, "alias", "m"))
        self.assertFalse(allows(ann, "n", "n"))
        self.assertFalse(allows(ann, "M", "M"))

    def test_listed_alias(self) -> None:
        """A listed alias may be used, though the model behind it may not be asked for by name."""
        ann = VirtualKey("ann", frozenset({"alias"}))
        self.assertTrue(allows(ann, "alias", "m"))
        self.assertFalse(allows(ann, "m", "m"))


class TestDistinct(SynchronousTestCase):
    def test_same_name_and_same_secret(self) -> None:
        """Names and secrets that are there already are complained of, without the secret."""
        complaints: list[str] = []
        check_distinct({"keys[0]": key("ann", "s3cret"), "keys[1]": key("ann", "s3cret")}, complaints)
        self.assertEqual(
            complaints,
            [
                'keys[1].name: keys[0] is called "ann" already',
                "keys[1].key: is the same as that of keys[0]; generate another",
            ],
        )


class TestCredential(SynchronousTestCase):
    def refusal(self, authorization: list[bytes], x_api_key: list[bytes]) -> Refusal:
        refusal: Refusal = self.assertRaises(Refusal, credential, authorization, x_api_key)
        self.assertEqual((refusal.status, refusal.headers), (401, {"www-authenticate": "Bearer"}))
        return refusal

    def test_either_header(self) -> None:
        """Both headers carry a key, the scheme in any case and with any space around."""
        self.assertEqual(credential([], [b" k "]), b"k")
        for value in (b"Bearer k", b"bearer k", b"BEARER   k ", b" Bearer\tk"):
            self.assertEqual(credential([value], []), b"k")

    def test_both_alike(self) -> None:
        """One key may be sent twice."""
        self.assertEqual(credential([b"Bearer k"], [b"k"]), b"k")
        self.assertEqual(credential([b"Bearer k", b"bearer k"], [b"k", b"k"]), b"k")

    def test_different(self) -> None:
        """Two keys that differ are refused, whichever headers they are in."""
        for authorization, x_api_key in (
            ([b"Bearer a"], [b"b"]),
            ([b"Bearer a", b"Bearer b"], []),
            ([], [b"a", b"b"]),
        ):
            refusal = self.refusal(authorization, x_api_key)
            self.assertEqual(refusal.slug, "credentials_differ")
            self.assertIn("differ", refusal.message)

    def test_missing(self) -> None:
        """A request without a key is told of both headers."""
        for authorization, x_api_key in (([], []), ([b"Bearer"], [b" "]), ([b""], []), ([b"Bearer "], [])):
            refusal = self.refusal(authorization, x_api_key)
            self.assertEqual(refusal.slug, "credential_missing")
            self.assertIn("x-api-key", refusal.message)
            self.assertIn("Authorization", refusal.message)

    def test_blank_beside_a_key(self) -> None:
        """An empty header beside a key means nothing."""
        self.assertEqual(credential([b"Bearer "], [b"k"]), b"k")
        self.assertEqual(credential([b"Bearer k"], [b""]), b"k")

    def test_other_schemes(self) -> None:
        """Another scheme is ignored beside an x-api-key, else told what is accepted."""
        self.assertEqual(credential([b"Basic a2V5"], [b"k"]), b"k")
        for authorization in ([b"Basic a2V5"], [b"k"], [b"Basic a2V5", b"Bearer k"], [b"Bearerk"]):
            refusal = self.refusal(authorization, [])
            self.assertEqual(refusal.slug, "credential_scheme")
            self.assertIn("Bearer KEY", refusal.message)

    def test_bounded(self) -> None:
        """A key of 1024 bytes is looked at, one of more is not."""
        self.assertEqual(len(credential([], [b"k" * 1024])), 1024)
        self.assertEqual(self.refusal([], [b"k" * 1025]).slug, "credential_too_long")

    def test_says_no_secret(self) -> None:
        """What was sent is not repeated."""
        for refusal in (
            self.refusal([b"Bearer hunter2"], [b"hunter3"]),
            self.refusal([b"Basic hunter2"], []),
            self.refusal([], [b"hunter2" * 500]),
        ):
            self.assertNotIn("hunter", refusal.message)

    @given(st.lists(st.binary(max_size=20), max_size=3), st.lists(st.binary(max_size=20), max_size=3))
    @settings(deadline=None)
    def test_any_bytes(self, authorization: list[bytes], x_api_key: list[bytes]) -> None:
        """Whatever is sent, there is one non-empty key out of what was sent, or a 401."""
        try:
            found = credential(authorization, x_api_key)
        except Refusal as refusal:
            self.assertEqual(refusal.status, 401)
        else:
            self.assertTrue(found and any(found in value for value in authorization + x_api_key))


class TestGenerating(SynchronousTestCase):
    def test_form(self) -> None:
        """A new key has the prefix and 256 bits, and is another each time."""
        keys = {generate_key() for _ in range(100)}
        self.assertEqual(len(keys), 100)
        for each in keys:
            self.assertTrue(re.fullmatch(r"sk-ct-[0-9a-f]{64}", each))
