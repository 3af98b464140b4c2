"""Read one answer of a web server that may send anything, for ever, as slowly as it likes (RFC 9110, RFC 9112).

http.client takes the answer apart; what it reads from ends at a moment and after a number of bytes, whatever the
server says about its answer's length.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

FetchStatus = Literal["refused", "unreachable", "too large"]

_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}  # beside 5xx: too slow, too early, too many
_CHUNK = 2**16
_OVERHEAD = 2**18  # bytes of headers and chunk sizes, above those of the body


class Deadline:
    """A moment, by the clock that nobody sets."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, above 0. Raises TimeoutError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class AnswerError(Exception):
    """An answer that is no file: another status, no content, too large, cut short, not HTTP.

    Args:
        reason: why, as a sentence.
        status: "unreachable" or "too large".
        again: it may be another one later.
        retry_after: seconds to wait, if the server said so; as many as it likes.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: FetchStatus = "unreachable",
        again: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.again, self.retry_after = reason, status, again, retry_after


@dataclass(frozen=True)
class Answer:
    """What a server sent.

    Attributes:
        headers: names in lower case; of several with one name the values joined by ", ".
        body: unpacked, at least one byte; empty if it redirects.
        location: where it redirects to, as it was sent; None if it does not.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    location: str | None


def read_answer(connection: socket.socket, deadline: Deadline, max_bytes: int) -> Answer:
    """Read the answer to a GET.

    Args:
        connection: the request was sent, with "Connection: close".
        deadline: for the last byte.
        max_bytes: of the body, before and after unpacking.

    Raises:
        AnswerError: see there.
        OSError: the connection failed; TimeoutError at the deadline.
    """
    wire = _Wire(connection, deadline, max_bytes + _OVERHEAD)
    answer = http.client.HTTPResponse(wire, method="GET")  # type: ignore[arg-type]  # of a socket it wants makefile
    try:
        answer.begin()
        headers = _headers(answer)
        location = headers.get("location") if answer.status in _REDIRECTS else None
        if location:
            return Answer(answer.status, headers, b"", _as_utf8(location))
        _check_status(answer.status, headers)
        return Answer(answer.status, headers, _read(answer, headers, max_bytes), None)
    except http.client.IncompleteRead as error:
        raise AnswerError("cut short", again=True) from error
    except OSError:  # also RemoteDisconnected, which is an HTTPException, too
        raise
    # ValueError: http.client on numbers that are none
    except (http.client.HTTPException, ValueError, zlib.error) as error:
        raise AnswerError(f"not an answer of a web server ({type(error).__name__})") from error


class _Wire(io.RawIOBase):
    """What http.client reads from in place of a socket: each read ends in time, and all of them after so many bytes.

    The timeout of a socket alone starts anew with every byte.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline, max_bytes: int) -> None:
        self._connection, self._deadline, self._left = connection, deadline, max_bytes

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._connection.settimeout(self._deadline.left())
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise AnswerError("an answer without an end", status="too large")
        return count

    def readall(self) -> bytes:
        """Never wanted by us, but http.client believes a chunk of size -1, and would read all there is at once."""
        raise ValueError("a chunk of negative size")


def _headers(answer: http.client.HTTPResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in answer.getheaders():
        key, value = name.lower(), value.strip(" \t\r\n")  # not strip(): it takes bytes of UTF-8 for white space
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return headers


def _as_utf8(value: str) -> str:
    """A header's value as text: http.client takes it for Latin-1, and it is UTF-8 more often."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def _check_status(status: int, headers: dict[str, str]) -> None:
    if 200 <= status < 204:  # those above say that they have nothing, or a part
        return
    again = status in _PASSING or 500 <= status < 600
    raise AnswerError(f"HTTP status {status}", again=again, retry_after=_retry_after(headers.get("retry-after", "")))


def _retry_after(value: str) -> float | None:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); None for anything else."""
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return None


def _read(answer: http.client.HTTPResponse, headers: dict[str, str], max_bytes: int) -> bytes:
    too_large = f"more than {max_bytes} bytes"
    if answer.length is not None and answer.length > max_bytes:
        raise AnswerError(too_large, status="too large")
    # BytesIO gives its bytes away without a copy; closed, or an error's traceback would keep them.
    with io.BytesIO() as body:
        for piece in _unpacked(answer, headers.get("content-encoding", "identity").lower()):
            body.write(piece)
            if body.tell() > max_bytes:
                raise AnswerError(too_large, status="too large")
        if answer.length:  # what is missing of it; http.client itself says so in later Pythons only
            raise http.client.IncompleteRead(b"")
        if not body.tell():
            raise AnswerError("no content")
        return body.getvalue()


def _unpacked(answer: http.client.HTTPResponse, encoding: str) -> Iterator[bytes]:
    """The body in pieces of at most 64 KiB."""
    if encoding == "identity":
        while piece := answer.read(_CHUNK):
            yield piece
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise AnswerError(f"packed as {encoding[:20]!r}, which was not asked for")
    unpack = zlib.decompressobj(wbits=47)  # gzip or zlib, as the data says
    while packed := answer.read(_CHUNK):
        while packed and not unpack.eof:
            yield unpack.decompress(packed, _CHUNK)
            packed = unpack.unconsumed_tail
    if not unpack.eof:
        raise http.client.IncompleteRead(b"")
