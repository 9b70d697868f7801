"""What can be refused from a request's head, before any of its body is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from crabtwist.errors import Refusal
from crabtwist.exchange import STOPPING_RETRY_AFTER_SECONDS
from crabtwist.gateway import Gateway
from crabtwist.keys import VirtualKey, credential
from crabtwist.settings import Secret
from crabtwist.values import AdminAction
from crabtwist.web.admin_lock import NOT_THE_TOKEN, Administrator, AdminLock
from crabtwist.web.answers import ADMIN, is_for_admin, path_not_found, send_refusal

#: The values of header fields by names in lower case.
Named = Mapping[bytes, Sequence[bytes]]

#: Where everything is that needs a key.
LOCKED = b"/v1/"

#: What anybody may ask for.  What is neither this nor locked leads nowhere, as it is spelled: a router that
#: reads `/%761/messages` or `//v1/messages` as `/v1/messages` must not lead around the lock.
OPEN_PATHS = frozenset({b"/", b"/api/hello", b"/health", b"/metrics", b"/ready"})

#: What anybody may read who knows that there is an admin API; it is not told where there is none.
DOCUMENT_PATHS = frozenset({b"/docs", b"/openapi.json"})

#: How much is told of where somebody knocked with a wrong token.
LONGEST_TARGET = 200


class Admission:
    """
    Looks at each head: whether the gateway still takes work, whose key it is, how the body is encoded.

    Called with the request; returns the `Refusal`, or None after having set the request's `admission` to
    the `VirtualKey`, or to None in a gateway that serves anybody.  `OPEN_PATHS` are for all, what is `LOCKED`
    for those with a key, and nothing else is there.  What is for administrators no key opens, but the
    admin token alone: `admission` is an `Administrator` there, and nowhere else.  Without one, `admin_token`
    None, there is nothing for them, and no `DOCUMENT_PATHS` for all.
    """

    def __init__(self, gateway: Gateway, admin_token: Secret | None = None) -> None:
        self._gateway = gateway
        self._admin_lock = AdminLock(admin_token, gateway.clock)
        self._open_paths = OPEN_PATHS if admin_token is None else OPEN_PATHS | DOCUMENT_PATHS

    def __call__(self, request: Any) -> Refusal | None:
        """Admit or refuse."""
        try:
            if request.path in self._open_paths:
                _refuse_body(request.named)
                return None
            if not request.path.startswith(LOCKED):
                raise path_not_found(request.path)
            self._refuse_while_draining()
            _refuse_unreadable(request.path)
            if is_for_admin(request.path):
                if not (request.path + b"/").startswith(ADMIN):
                    # A rule of some proxy's for this path would not see it in another spelling.
                    raise path_not_found(request.path)
                request.admission = self._administrator(request)
            else:
                request.admission = self._authenticated(request.named)
            _refuse_encoded(request.named)
        except Refusal as refusal:
            return refusal
        return None

    def refuse(self, request: Any, refusal: Refusal) -> None:
        """Count and send a refusal: one of these, or of a body that is too large, too slow or malformed."""
        self._gateway.metrics.refused(refusal.slug)
        send_refusal(request, refusal)

    def _administrator(self, request: Any) -> Administrator:
        try:
            return self._admin_lock.admit(request)
        except Refusal as refusal:
            if refusal.slug == NOT_THE_TOKEN:
                self._tell_of_wrong_token(request, refusal)
            raise

    def _tell_of_wrong_token(self, request: Any, refusal: Refusal) -> None:
        # Only of these: there are few of them from one address, and who sends none at all guesses nothing.
        host = getattr(request.getClientAddress(), "host", "a Unix socket")
        method, path = (text.decode("latin-1")[:LONGEST_TARGET] for text in (request.method, request.path))
        self._gateway.hooks.administered(
            AdminAction(
                at=self._gateway.clock.seconds(),
                actor="unknown",
                action="admin.admit",
                target=f"{method} {path}",
                outcome="refused",
                detail=f"{refusal.message}; from {host}",
            )
        )

    def _refuse_while_draining(self) -> None:
        if self._gateway.draining:
            raise Refusal(
                503,
                "draining",
                "the gateway is being stopped and takes no new work; ask again",
                headers={"retry-after": str(STOPPING_RETRY_AFTER_SECONDS)},
            )

    def _authenticated(self, named: Named) -> VirtualKey | None:
        keys = self._gateway.keys
        if keys is None:
            return None
        secret = credential(named.get(b"authorization", ()), named.get(b"x-api-key", ()))
        now = self._gateway.clock.seconds()
        key = keys.authenticate(secret, now)
        if key is None:
            raise Refusal(401, "unknown_key", "this key is not known here; check the key and the base URL")
        key.check(now)
        return key


def _refuse_body(named: Named) -> None:
    """Refuse what somebody without a key would make the gateway keep."""
    length = named.get(b"content-length", (b"0",))[0]
    if b"transfer-encoding" in named or int(length):
        raise Refusal(413, "body_not_wanted", "this path takes no body")


def _refuse_unreadable(path: bytes) -> None:
    if b"%" not in path:
        # A target is ASCII as it is sent.
        return
    try:
        unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise Refusal(400, "invalid_path", "the path is not UTF-8") from None


def _refuse_encoded(named: Named) -> None:
    for encoding in named.get(b"content-encoding", ()):
        if encoding.strip().lower() not in (b"", b"identity"):
            raise Refusal(415, "content_encoding", "send the body as it is, without Content-Encoding")
