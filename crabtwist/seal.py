"""What is kept in the store is kept so that nobody who reads the store can use it."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode

from cryptography.fernet import Fernet, InvalidToken

from crabtwist.settings import Secret


class Seal:
    """
    What `secret_key` protects: all nodes on one store need the same.

    `digest_key` is the key of the digests of virtual keys.  Others' credentials have to be sent to them
    one day, so they are encrypted (Fernet: AES-128-CBC and HMAC-SHA256).
    """

    def __init__(self, secret_key: Secret) -> None:
        self.digest_key = _derived(secret_key, b"crabtwist digests of keys")
        self._fernet = Fernet(urlsafe_b64encode(_derived(secret_key, b"crabtwist providers")))
        self._mark = _derived(secret_key, b"crabtwist mark").hex().encode()

    @property
    def mark(self) -> bytes:
        """What tells one `secret_key` from another, and does not tell what it is."""
        return self._mark

    def close(self, data: bytes) -> bytes:
        """Encrypt."""
        return self._fernet.encrypt(data)

    def open(self, sealed: bytes) -> bytes:
        """Decrypt; raises ValueError for what was not encrypted with this key."""
        try:
            return self._fernet.decrypt(sealed)
        except InvalidToken:
            raise ValueError("was encrypted with another secret_key, or is damaged") from None


def _derived(secret_key: Secret, purpose: bytes) -> bytes:
    # One step of HKDF (RFC 5869, 2.3): the secret has as many random bits as are wanted of it.
    return hmac.digest(secret_key.reveal().encode(), purpose + b"\x01", "sha256")
