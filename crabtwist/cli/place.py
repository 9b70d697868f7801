"""Where the gateway is and what opens it: from options, the environment, or the configuration beside us."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from crabtwist.cli.faults import Misused, NotAllowed

URL_VARIABLE = "CRABTWIST_URL"
TOKEN_VARIABLE = "CRABTWIST_ADMIN_TOKEN"  # noqa: S105 - the variable's name
CONFIGURATION = "crabtwist.toml"

#: Where a gateway listens whose configuration does not say.
USUAL_ADDRESS = "127.0.0.1:5632"

_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\s]+):(?P<port>\d+)")
_SCHEMES = {"tcp": "http", "tcp4": "http", "tcp6": "http", "ssl": "https", "tls": "https"}
#: Where one listens to be reached by everybody, and where oneself reaches it.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - read, not bound


@attrs.frozen
class Place:
    """
    A gateway's address, without a slash at its end, and the admin token, None if there is none.

    `url_from` and `token_from` say to people where each is from; `no_token` why there is none.
    """

    url: str
    url_from: str
    token: str | None = attrs.field(default=None, repr=False)
    token_from: str = ""
    no_token: str = ""

    @property
    def required_token(self) -> str:
        """The token; raises a `Fault` that says where one could be."""
        if self.token is None:
            raise NotAllowed(self.no_token, slug="no_admin_token")
        return self.token


class LocalFile:
    """
    The configuration file as far as a command needs it: two of its keys, whatever else is wrong with it.

    `named` tells whether somebody named it; one that nobody named need not be there.
    """

    def __init__(self, path: str | None, environ: Mapping[str, str]) -> None:
        self.path = Path(path or CONFIGURATION)
        self.named = path is not None
        self._environ = environ

    @cached_property
    def document(self) -> dict[str, Any] | None:
        """What stands in it; None if it is not there and nobody named it."""
        import tomllib

        if not self.named and not self.path.exists():
            return None
        try:
            return tomllib.loads(self.path.read_bytes().decode("utf-8-sig"))
        except OSError as error:
            raise self._fault(f"cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise self._fault(f"is not valid TOML: {error}") from error

    def value(self, key: str) -> Any:
        """Return the value of a key at its top, `${VAR}` replaced as the gateway does it; None without."""
        from crabtwist.settings import expand

        complaints: list[str] = []
        value = expand((self.document or {}).get(key), self._environ, key, complaints)
        if complaints:
            raise self._fault("; ".join(complaints))
        return value

    def _fault(self, words: str) -> Misused:
        options = f"--url and --token, or {URL_VARIABLE} and {TOKEN_VARIABLE}, do without it"
        return Misused(f"{self.path}: {words} ({options})", slug="configuration")


def find_place(
    url: str | None, token: str | None, file: LocalFile, environ: Mapping[str, str] = os.environ
) -> Place:
    """
    Return where the gateway is.

    A token that stands in a file goes to this machine or to where the same file says, and to another only
    if somebody named the file.  One of the environment goes wherever somebody said, but not to another
    machine that only a file says which nobody named.  Raises `Fault`.
    """
    address, url_from = _address(url, file, environ)
    given, token_from = token, "--token"
    if not given:
        given, token_from = environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    from_found_file = url_from == str(file.path) and not file.named and not is_this_machine(address)
    if given and token_from == TOKEN_VARIABLE and from_found_file:
        # Anybody may have put a file into the folder where the command is typed.
        why = f"{TOKEN_VARIABLE} is not sent to {address}, which only stands in {file.path}"
        return Place(address, url_from, no_token=f"{why}; name the file with --config, or give --url")
    if given:
        return Place(address, url_from, _sendable(given, token_from), token_from)
    if not (file.named or url_from == str(file.path) or is_this_machine(address)):
        why = f"the admin token of {file.path} is not sent to {address}; name the file with --config to do so"
        return Place(address, url_from, no_token=f"{why}, or give a token ({TOKEN_VARIABLE}, --token)")
    held = file.value("admin_token")
    if isinstance(held, str) and held:
        return Place(address, url_from, _sendable(held, str(file.path)), str(file.path))
    return Place(address, url_from, no_token=_no_token(file))


def _no_token(file: LocalFile) -> str:
    given = f"set {TOKEN_VARIABLE}, or give --token"
    if file.document is None:
        folder = f"run this in the folder of the gateway's {CONFIGURATION}"
        return f"no admin token: {given}, or {folder} (the first `twistd -n crabtwist` writes one)"
    return f"no admin token: {file.path} has no `admin_token`; add one and restart the gateway, or {given}"


def _sendable(token: str, said_by: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        words = f"the token ({said_by}) has spaces, newlines or letters that no header can carry"
        raise Misused(words, slug="token")
    return token


def _address(url: str | None, file: LocalFile, environ: Mapping[str, str]) -> tuple[str, str]:
    if url:
        return checked_url(url, "--url"), "--url"
    if environ.get(URL_VARIABLE):
        return checked_url(environ[URL_VARIABLE], URL_VARIABLE), URL_VARIABLE
    if file.document is None:
        return f"http://{USUAL_ADDRESS}", "the usual address"
    return listening_url(file.value("listen") or USUAL_ADDRESS, str(file.path)), str(file.path)


def checked_url(url: str, said_by: str) -> str:
    """Return an address without the slash at its end; raises `Fault` for what is none."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not url.isprintable() or " " in url:
        raise Misused(f"{said_by}: has to be like http://127.0.0.1:5632", slug="url")
    if parts.query or parts.fragment or "@" in parts.netloc:
        words = f"{said_by}: has to be an address alone, without a password, query or fragment"
        raise Misused(words, slug="url")
    return url.rstrip("/").removesuffix("/v1")


def listening_url(listen: object, said_by: str) -> str:
    """Return the address of whoever listens there: of the first entry that has one."""
    for entry in [listen] if isinstance(listen, str) else listen if isinstance(listen, list) else []:
        url = _entry_url(entry) if isinstance(entry, str) else None
        if url:
            return url
    words = f"{said_by}: `listen` names no address and port that could be asked; give --url"
    raise Misused(words, slug="url")


def _entry_url(entry: str) -> str | None:
    """Return the address of an entry of `listen`: "host:port", or one of Twisted's endpoint strings."""
    kind, *words = [word.replace("\\:", ":") for word in re.split(r"(?<!\\):", entry)]
    if kind in _SCHEMES and words:
        named = dict(word.split("=", 1) for word in words if "=" in word)
        port = next((word for word in words if word.isdigit()), named.get("port", ""))
        host = named.get("interface", "")
        return _url(_SCHEMES[kind], f"[{host}]" if ":" in host else host, port)
    match = _HOST_AND_PORT.fullmatch(entry)
    return None if match is None else _url("http", match["host"], match["port"])


def _url(scheme: str, host: str, port: str) -> str | None:
    if not port.isdigit() or not 0 < int(port) < 65536:
        return None
    return f"{scheme}://{_EVERYWHERE.get(host, host)}:{port}"


def is_this_machine(url: str) -> bool:
    """Tell whether what is sent there stays on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
