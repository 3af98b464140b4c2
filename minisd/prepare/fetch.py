"""Fetch one file from a stranger's web server, with bounds on everything: where it is, how large, how long it takes.

No proxy is used, whatever the environment says: it would look up the names in our place, unchecked.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin

from minisd.errors import NetworkError
from minisd.prepare.addresses import (
    AddressError,
    Resolve,
    WebAddress,
    check_characters,
    check_url,
    public_addresses,
    quoted,
)
from minisd.prepare.http_answer import Answer, AnswerError, Deadline, FetchStatus, read_answer

Connect = Callable[[str, int, float], socket.socket]

_USER_AGENT = "minisd (dataset preparation)"
_ADDRESSES = 2  # tried, of each kind, of those that a name has


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    Attributes:
        max_bytes: of the body, before and after unpacking.
        seconds: from asking for the name to the last byte, redirects included.
        redirects: followed at most.
    """

    max_bytes: int = 25 * 2**20
    seconds: float = 30.0
    redirects: int = 3


@dataclass(frozen=True)
class Response:
    """A file.

    Attributes:
        url: where it was in the end, after redirects, percent-encoded.
        status: 200 to 203.
        headers: names in lower case; of several with one name the values joined by ", ".
        body: unpacked, at least one byte.
    """

    url: str
    status: int
    headers: dict[str, str]
    body: bytes


class FetchError(NetworkError):
    """A file that was not fetched.

    Args:
        url: what was asked for.
        reason: why not, as a sentence without that address and without a full stop.
        status: "refused" (by us: the address, or one it redirects to), "unreachable" or "too large".
        again: it may work later.
        retry_after: seconds to wait, if the server said so; as many as it likes.
    """

    def __init__(
        self, url: str, reason: str, *, status: FetchStatus, again: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{quoted(url)}: {reason}.")
        self.reason, self.status, self.again, self.retry_after = reason, status, again, retry_after


class Fetcher:
    """Fetches files from public web addresses. Several threads may share one.

    Args:
        resolve: a name to its IP addresses; raises OSError. The default asks the system.
        connect: opens a TCP connection to an IP address and port within so many seconds; raises OSError.
        tls: how servers are verified. The default trusts whom the system trusts.
    """

    def __init__(
        self, *, resolve: Resolve | None = None, connect: Connect | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._resolve = resolve or _system_resolve
        self._connect = connect or _system_connect
        self._tls = tls or ssl.create_default_context()

    def fetch(self, url: str, limits: Limits = Limits(), *, accept: str = "*/*") -> Response:
        """GET a file, following redirects; each hop is checked as the first one is.

        Args:
            url: as it was found.
            limits: what it may cost.
            accept: the media types wanted.

        Raises:
            FetchError: the address is refused, no connection, another status, no content, too large, too slow ...
        """
        try:
            return self._follow(url, limits, accept)
        except AddressError as error:
            raise FetchError(url, str(error), status="refused") from error
        except AnswerError as error:
            raise FetchError(
                url, error.reason, status=error.status, again=error.again, retry_after=error.retry_after
            ) from error
        except TimeoutError as error:
            raise FetchError(url, f"took more than {limits.seconds:g} s", status="unreachable", again=True) from error
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or "the connection was closed"
            again = isinstance(error, ssl.SSLEOFError)
            raise FetchError(
                url, f"no secure connection: {why.rstrip('.')}", status="unreachable", again=again
            ) from error
        except OSError as error:
            # A name that does not exist will not exist in a minute; whatever else goes wrong on the way may pass.
            again = not (isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME)
            why = error.strerror or str(error)
            raise FetchError(url, f"no connection: {why}", status="unreachable", again=again) from error

    def _follow(self, url: str, limits: Limits, accept: str) -> Response:
        deadline = Deadline(limits.seconds)
        address = check_url(url)
        for _ in range(limits.redirects + 1):
            answer = self._get(address, accept, deadline, limits.max_bytes)
            if answer.location is None:
                return Response(str(address), answer.status, answer.headers, answer.body)
            address = _redirected(address, answer.location)
        raise AnswerError(f"more than {limits.redirects} redirects")

    def _get(self, address: WebAddress, accept: str, deadline: Deadline, max_bytes: int) -> Answer:
        request = (
            f"GET {address.target} HTTP/1.1\r\nHost: {address.host_header}\r\nUser-Agent: {_USER_AGENT}\r\n"
            f"Accept: {accept}\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
        )
        with self._open(address, deadline) as connection:
            connection.settimeout(deadline.left())
            connection.sendall(request.encode("ascii"))
            return read_answer(connection, deadline, max_bytes)

    def _open(self, address: WebAddress, deadline: Deadline) -> socket.socket:
        """A connection to a checked IP address of the host; with TLS, to a server that proved the host's name."""
        checked = _in_time(lambda: public_addresses(address.host, self._resolve), deadline)
        connection = self._connect_to_one(checked, address.port, deadline)
        if address.scheme == "http":
            return connection
        try:
            connection.settimeout(deadline.left())
            return self._tls.wrap_socket(connection, server_hostname=address.host)
        except BaseException:
            connection.close()
            raise

    def _connect_to_one(self, checked: Sequence[str], port: int, deadline: Deadline) -> socket.socket:
        """To the first IP address where somebody answers; one where nobody does leaves time for the others.

        IPv4 first: networks whose IPv6 leads nowhere are many.
        """
        v4, v6 = ([one for one in checked if (":" in one) is kind][:_ADDRESSES] for kind in (False, True))
        *others, last = v4 + v6
        for tried, candidate in enumerate(others):
            with contextlib.suppress(OSError):
                return self._connect(candidate, port, deadline.left() / (len(others) + 1 - tried))
        return self._connect(last, port, deadline.left())


def _redirected(address: WebAddress, location: str) -> WebAddress:
    """Where a server sends us, checked like any other link. Raises AddressError."""
    try:
        check_characters(location)  # before urljoin takes them out
        target = check_url(urljoin(str(address), location))
    except AddressError as error:
        raise AddressError(f"redirected to {quoted(location)}: {error}") from error
    except ValueError as error:  # of urljoin: brackets that do not match
        raise AddressError(f"redirected to {quoted(location)}: a malformed address") from error
    if address.scheme == "https" and target.scheme == "http":
        raise AddressError(f"redirected from https to {quoted(location)}, which anybody on the way can change")
    return target


def _in_time(function: Callable[[], list[str]], deadline: Deadline) -> list[str]:
    """Call what cannot be told to hurry, such as the system's name server, and leave it behind when time is up."""
    results: list[list[str] | Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(deadline.left())
    if not results:
        raise TimeoutError
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _system_resolve(host: str) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _system_connect(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), seconds)
