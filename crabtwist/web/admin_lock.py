"""Who may administer the gateway: whoever has the admin token, and has not guessed at it too often."""

from __future__ import annotations

import hmac
from hashlib import sha256
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from typing import Any

import attrs
from twisted.internet.interfaces import IReactorTime

from crabtwist.errors import Refusal
from crabtwist.keys import credential
from crabtwist.settings import Secret
from crabtwist.web.answers import path_not_found

#: Wrong tokens from one address within a minute, before no more are looked at.
MOST_WRONG_TOKENS = 10
MINUTE_SECONDS = 60.0
#: Addresses that are remembered for their wrong tokens; beyond these the one heard of longest ago is not.
MOST_ADDRESSES = 10_000
#: What one household or rented machine may have of IPv6 addresses.
IPV6_PREFIX = 64

#: The word for a wrong token.
NOT_THE_TOKEN = "not_the_admin_token"  # noqa: S105 - a word, and no secret


@attrs.frozen
class Administrator:
    """Stands on a request, as its `admission`, for whoever showed the admin token."""


class AdminLock:
    """
    Looks at the token of a request for what is behind it; without a token nothing is there.

    It is sent as keys are: `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`.
    """

    def __init__(self, token: Secret | None, clock: IReactorTime) -> None:
        self._digest = None if token is None else sha256(token.reveal().encode()).digest()
        self._clock = clock
        #: When each address sent its latest wrong tokens; least recent address first.
        self._wrong: dict[str, list[float]] = {}

    def admit(self, request: Any) -> Administrator:
        """
        Return who it is.

        Raises `Refusal`: 404 where there is no admin token, 429 after too many wrong ones, whatever is
        sent then, else 401.
        """
        if self._digest is None:
            raise path_not_found(request.path)
        address = _network(getattr(request.getClientAddress(), "host", ""))
        self._refuse_guessing(address)
        fields = request.requestHeaders
        secret = credential(
            fields.getRawHeaders(b"authorization", []), fields.getRawHeaders(b"x-api-key", [])
        )
        if not hmac.compare_digest(sha256(secret).digest(), self._digest):
            self._note(address)
            raise Refusal(
                401,
                NOT_THE_TOKEN,
                "this needs the admin token",
                headers={"www-authenticate": "Bearer"},
            )
        return Administrator()

    def _refuse_guessing(self, address: str) -> None:
        recent = self._recent(address)
        if len(recent) >= MOST_WRONG_TOKENS:
            wait_seconds = ceil(recent[0] + MINUTE_SECONDS - self._clock.seconds())
            raise Refusal(
                429,
                "too_many_wrong_tokens",
                f"too many wrong tokens came from this address; try again in {wait_seconds} s",
                headers={"retry-after": str(wait_seconds)},
            )

    def _recent(self, address: str) -> list[float]:
        since = self._clock.seconds() - MINUTE_SECONDS
        return [at for at in self._wrong.get(address, ()) if at > since]

    def _note(self, address: str) -> None:
        recent = [*self._recent(address), self._clock.seconds()]
        self._wrong.pop(address, None)
        self._wrong[address] = recent
        if len(self._wrong) > MOST_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]


def _network(host: str) -> str:
    """Return what one client's addresses have in common; "" for a Unix socket's, which has none."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if not isinstance(address, IPv6Address):
        return host
    return str(address.ipv4_mapped or ip_network((address, IPV6_PREFIX), strict=False))
