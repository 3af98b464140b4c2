"""Answers of web servers, mangled in thousands of ways: a file, or one clear line."""

import gzip
import random
import socket
from email.utils import formatdate

from minisd.prepare.fetch import Fetcher, FetchError, Limits

MUTANTS = 5_000
SEEDS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 11\r\n\r\nhello world",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX-A: b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"hello world" * 40, mtime=0),
    b"HTTP/1.0 302 Found\r\nLocation: https://cats.example/\xc3\xa9?a=b#c\r\nRetry-After: 7\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: //[2606:4700::1111]:80/../x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: "
    + formatdate(2e9, usegmt=True).encode()
    + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-Robots-Tag: noai\r\n X-Folded: yes\r\nX-Robots-Tag:noimageai\r\nContent-Length: 2\r\n\r\nhi",
]
PIECES = [
    b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xe2\x80\xae", b"\x1b[31m", b":", b" ", b"[", b"]", b"@", b"%", b"-1",
    b"0", b"9" * 5000, b"ffffffffffffffff", b"chunked", b"gzip", b"deflate", b"HTTP/1.1 200 OK\r\n", b"http://127.0.0.1/",
    b"Content-Length: 99999999999\r\n", b"Content-Length: -5\r\n", b"Transfer-Encoding: chunked\r\n", b"Location: \r\n",
]  # fmt: skip


def _mutant(draws: random.Random) -> bytes:
    content = bytearray(draws.choice(SEEDS))
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(content) + 1)
        kind = draws.randrange(5)
        if kind == 0:
            content[at:at] = draws.choice(PIECES)
        elif kind == 1:
            content[at : at + draws.randint(1, 8)] = b""
        elif kind == 2:
            content[at : at + 1] = bytes([draws.randrange(256)])
        elif kind == 3:
            content[at:at] = content[at : at + draws.randint(1, 40)]
        else:
            del content[at:]
    return bytes(content)


def test_every_answer_is_a_file_or_a_failure_in_one_clear_line() -> None:
    draws = random.Random(0)
    sent = b""
    ends: list[socket.socket] = []

    def connect(address: str, port: int, seconds: float) -> socket.socket:
        assert address == "8.8.8.8" or address.startswith("2")
        ours, theirs = socket.socketpair()
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        ends.append(theirs)
        return ours

    fetcher = Fetcher(resolve=lambda host: ["8.8.8.8"], connect=connect)
    files, refusals = 0, []
    for _ in range(MUTANTS):
        sent = _mutant(draws)
        try:
            response = fetcher.fetch("http://cats.example/1.jpg", Limits(max_bytes=200, seconds=5.0))
        except FetchError as error:  # any other exception is a failure of this test
            refusals.append(error)
            continue
        finally:
            while ends:
                ends.pop().close()
        assert 0 < len(response.body) <= 200
        files += 1
    assert MUTANTS / 20 < files < MUTANTS / 2
    assert [str(error) for error in refusals if not str(error).isprintable() or len(str(error)) > 400] == []
    assert {error.status for error in refusals} == {"refused", "unreachable", "too large"}
    assert {error.again for error in refusals} == {True, False}
    assert all("took more than" not in error.reason for error in refusals)
