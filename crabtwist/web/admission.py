"""What can be refused from a request's head, before any of its body is taken."""

from __future__ import annotations

from typing import Any

from crabtwist.errors import Refusal
from crabtwist.gateway import Gateway
from crabtwist.keys import VirtualKey, credential

#: A drain lasts seconds; another node, or the next process, will answer by then.
DRAINING_RETRY_AFTER_SECONDS = 1


class Admission:
    """
    Looks at each head: whether the gateway still takes work, whose key it is, how the body is encoded.

    Called with the request; returns the `Refusal`, or None after having set the request's `admission` to
    the `VirtualKey`, or to None where nobody needs one.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def __call__(self, request: Any) -> Refusal | None:
        """Admit or refuse."""
        request.admission = None
        if not request.path.startswith(b"/v1/"):
            return None
        try:
            self._refuse_while_draining()
            request.admission = self._authenticated(request.requestHeaders)
            _refuse_encoded(request.requestHeaders)
        except Refusal as refusal:
            self._gateway.metrics.refused(refusal.slug)
            return refusal
        return None

    def _refuse_while_draining(self) -> None:
        if self._gateway.draining:
            raise Refusal(
                503,
                "draining",
                "the gateway is being stopped and takes no new work; ask again",
                headers={"retry-after": str(DRAINING_RETRY_AFTER_SECONDS)},
            )

    def _authenticated(self, headers: Any) -> VirtualKey | None:
        keys = self._gateway.keys
        if keys is None:
            return None
        secret = credential(
            headers.getRawHeaders(b"authorization", []), headers.getRawHeaders(b"x-api-key", [])
        )
        key = keys.authenticate(secret)
        if key is None:
            raise Refusal(401, "unknown_key", "this key is not known here; check the key and the base URL")
        return key


def _refuse_encoded(headers: Any) -> None:
    encodings = headers.getRawHeaders(b"content-encoding", [])
    if any(encoding.strip().lower() not in (b"", b"identity") for encoding in encodings):
        raise Refusal(415, "content_encoding", "send the body as it is, without Content-Encoding")
