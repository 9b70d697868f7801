"""
The way to the upstreams: an `IAgent` with its own kept connections, whose every failure is one of ours.

Written because twisted's pool loses POSTs on connections that the peer has closed meanwhile, sets no
bound on live connections and cannot abort one.  Timeouts of answers are not here: the gateway has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from cryptography import x509
from OpenSSL import crypto
from twisted.internet import ssl
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.python.failure import Failure
from twisted.web.client import BrowserLikePolicyForHTTPS
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.iweb import IAgent, IBodyProducer, IPolicyForHTTPS, IResponse
from zope.interface import implementer

from crabtwist.connection_pool import DEFAULT_PORTS, ConnectionLimits, ConnectionPool, Origin
from crabtwist.errors import ConfigurationError, ConnectionBroken, NoConnectionFree
from crabtwist.http_client import HTTP1ClientProtocol
from crabtwist.http_request import HTTP1Request, render_head

__all__ = ["ConnectionLimits", "UpstreamAgent", "parse_uri"]

#: What of RFC 3986 an upstream's URI may be: no credentials, no fragment, no escapes in the host.
_URI = re.compile(
    rb"(?P<scheme>https?)://"
    rb"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_.-]*[a-z0-9_.]))"
    rb"(?::(?P<port>[0-9]{1,5}))?"
    rb"(?P<target>(?:[/?][!\"$-~]*)?)",
    re.IGNORECASE,
)


@lru_cache(maxsize=1024)  # few paths, but the query is a client's
def parse_uri(uri: bytes) -> tuple[Origin, bytes]:
    """
    Return where a request goes, and its target: path and query as they stand.

    Raises ValueError, without the URI in it, for anything but an absolute `http` or `https` URI of
    visible ASCII; a host name of other letters must come in its `xn--` form.
    """
    parts = _URI.fullmatch(uri)
    if (
        parts is None
        or int(parts["port"] or 1) > 65535
        or not isIPv6Address((parts["address"] or b"::").decode())
    ):
        raise ValueError(
            "not a URI that an upstream can have: http:// or https://, a host name or address, "
            "perhaps a port, a path and a query; no credentials, no fragment, visible ASCII only"
        )
    scheme = parts["scheme"].decode().lower()
    host = (parts["address"] or parts["name"]).decode().lower()
    port = int(parts["port"] or DEFAULT_PORTS[scheme])
    target = parts["target"]
    return Origin(scheme, host, port), target if target.startswith(b"/") else b"/" + target


def trust_only(ca_file: str) -> Any:
    """
    Return a trust root (for `optionsForClientTLS`) of the PEM certificates in a file, and of no others.

    Raises ConfigurationError if it cannot be read or holds none.
    """
    try:
        with open(ca_file, "rb") as file:
            certificates = x509.load_pem_x509_certificates(file.read())
    except (OSError, ValueError) as why:
        raise ConfigurationError(
            [f"no certificates can be read from the ca_file {ca_file!r}: {why}"]
        ) from why
    roots = [ssl.Certificate(crypto.X509.from_cryptography(each)) for each in certificates]
    return ssl.trustRootFromCertificates(roots)


#: How long a dead connection may take to show that it is dead: a round trip, and some patience.
STALE_SECONDS = 2.0


@implementer(IAgent)
class UpstreamAgent:
    """
    Sends requests over kept connections.

    `ca_file` is the path of a PEM file with the only certificates to trust; None means the platform's.
    `policy` makes TLS's settings for each host, in `ca_file`'s place.  `stale_retries` counts requests
    sent a second time because a kept connection turned out to be dead; `on_stale_retry` is called for each.
    """

    def __init__(
        self,
        reactor: Any,
        limits: ConnectionLimits | None = None,
        *,
        ca_file: str | None = None,
        policy: IPolicyForHTTPS | None = None,
        on_stale_retry: Callable[[], object] | None = None,
    ) -> None:
        self.stale_retries = 0
        self._reactor = reactor
        self._limits = limits or ConnectionLimits()
        self._policy: Any = policy or BrowserLikePolicyForHTTPS(
            None if ca_file is None else trust_only(ca_file)
        )
        self._on_stale_retry = on_stale_retry
        self._pools: dict[Origin, ConnectionPool] = {}
        self._closed = False

    @property
    def connections(self) -> int:
        """How many connections are open or being opened, kept ones included."""
        return sum(pool.taken for pool in self._pools.values())

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: HeaderMap | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """
        Send a request; the Deferred fires when the answer's head has come, with a `HTTP1Response`.

        Fields go out in the order and spelling of an `OrderedHeaders`; nothing is added but `Host` (if
        absent) and the body's framing.  Fails with a `crabtwist.errors.UpstreamError`, or with ValueError
        for what cannot be sent.  Cancelling it gives the connection back, or closes it, at once.
        """
        try:
            origin, target = parse_uri(uri)
            pool = self._pools.get(origin) or self._new_pool(origin)
            head = render_head(method, target, pool.host_field, headers, bodyProducer)
        except ValueError as why:
            return fail(why)
        if self._closed:
            return fail(NoConnectionFree("the gateway is stopping"))
        if headers is None:
            headers = HeaderMap()
        request = HTTP1Request(method, uri, headers, head, bodyProducer)
        kept = pool.kept()
        if kept is None:
            return Deferred.fromCoroutine(self._send(pool, request))
        return self._send_over(kept, pool, request)

    async def _send(self, pool: ConnectionPool, request: HTTP1Request) -> IResponse:
        freed = await pool.lease()
        if freed is not None:
            return await self._send_over(freed, pool, request)
        return await self._send_over_new(pool, request)

    async def _send_over_new(self, pool: ConnectionPool, request: HTTP1Request) -> IResponse:
        connection = await pool.open()
        return await connection.request(request)

    def _send_over(
        self, kept: HTTP1ClientProtocol, pool: ConnectionPool, request: HTTP1Request
    ) -> Deferred[IResponse]:
        head: Deferred[Any] = kept.request(request)
        head.addErrback(self._not_answered, kept, pool, request, self._reactor.seconds())
        return head

    def _not_answered(
        self,
        reason: Failure,
        kept: HTTP1ClientProtocol,
        pool: ConnectionPool,
        request: HTTP1Request,
        sent_at: float,
    ) -> Any:
        # What was dead shows at once; what took longer may have been at work, and be billed.
        late = self._reactor.seconds() - sent_at > STALE_SECONDS
        if late or kept.answered or request.whole_body is None:
            return reason
        if not isinstance(reason.value, ConnectionBroken) or not pool.inherit(kept):
            return reason
        # Closed while it was kept, most likely; only a new connection can tell.
        self._count_stale_retry()
        return Deferred.fromCoroutine(self._send_over_new(pool, request))

    def _count_stale_retry(self) -> None:
        self.stale_retries += 1
        if self._on_stale_retry is not None:
            self._on_stale_retry()

    def close(self) -> Deferred[None]:
        """
        Take no more requests and close the kept connections; the Deferred fires when they are closed.

        Answers under way are not touched; their connections are closed after them.
        """
        self._closed = True
        closing = [gone for pool in self._pools.values() for gone in pool.close()]
        return DeferredList(closing).addCallback(lambda _: None)

    def _new_pool(self, origin: Origin) -> ConnectionPool:
        pool = ConnectionPool(self._reactor, origin, self._limits, self._endpoint(origin))
        self._pools[origin] = pool
        return pool

    def _endpoint(self, origin: Origin) -> IStreamClientEndpoint:
        # Addresses need no resolver, which would cost a turn in its threads.
        kinds = ((isIPAddress, TCP4ClientEndpoint), (isIPv6Address, TCP6ClientEndpoint))
        kind: Any = next((kind for fits, kind in kinds if fits(origin.host)), HostnameEndpoint)
        endpoint: IStreamClientEndpoint = kind(
            self._reactor, origin.host, origin.port, self._limits.connect_timeout_seconds
        )
        if origin.scheme == "http":
            return endpoint
        options = self._policy.creatorForNetloc(origin.host.encode(), origin.port)
        return wrapClientTLS(options, endpoint, clock=self._reactor)
