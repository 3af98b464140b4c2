import email.utils
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from minisd.prepare import addresses
from minisd.prepare.fetch import Fetcher, FetchError, Limits, Response
from tests.hostile_server import (
    Answer,
    FakeInternet,
    Handler,
    HostileServer,
    body,
    bomb,
    cut,
    endless,
    gzipped,
    raw,
    redirect,
    slow,
    slow_headers,
    stalled,
    status,
)

ROOT = Path(__file__).resolve().parents[2]
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40
QUICK = Limits(seconds=0.4)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture
def internet(server: HostileServer) -> FakeInternet:
    return FakeInternet(server)


def _failure(internet: FakeInternet, url: str, limits: Limits | None = None) -> FetchError:
    with pytest.raises(FetchError) as failure:
        internet.fetcher().fetch(url, limits or Limits())
    assert str(failure.value).isprintable()
    return failure.value


def test_a_file_comes_whole_with_where_it_was_and_what_was_said_of_it(server, internet) -> None:
    server.on("cats.example/a%20b.jpg", body(JPEG, "image/jpeg", {"X-Robots-Tag": "noai", "x-robots-tag": "noimageai"}))
    for scheme in ("http", "https"):
        response = internet.fetcher().fetch(f"{scheme}://Cats.example/a b.jpg?x=1#top")
        assert response == Response(f"{scheme}://cats.example/a%20b.jpg?x=1", 200, response.headers, JPEG)
        assert response.headers["content-type"] == "image/jpeg"
        assert response.headers["x-robots-tag"] == "noai, noimageai"
    assert server.requests == ["cats.example/a%20b.jpg?x=1"] * 2
    assert [port for _, port in internet.connected] == [80, 443]


def test_we_say_who_we_are_and_nothing_of_who_uses_us(server, internet) -> None:
    server.on("cats.example/1.jpg", redirect("https://dogs.example/1.jpg"))
    server.on("dogs.example/1.jpg", body(JPEG, headers={"Set-Cookie": "you=known"}))
    for _ in range(2):
        internet.fetcher().fetch("http://cats.example/1.jpg", accept="image/*")
    for headers in server.headers:
        assert headers.pop("Host") in ("cats.example", "dogs.example")
        assert headers.pop("User-Agent").startswith("minisd ")  # no browser (B22)
        assert headers == {"Accept": "image/*", "Accept-Encoding": "gzip", "Connection": "close"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (gzipped(JPEG), None),
        (body(zlib.compress(JPEG), headers={"Content-Encoding": "deflate"}), None),
        (body(JPEG, headers={"Content-Encoding": "identity"}), None),
        (body(JPEG, headers={"Content-Encoding": "br"}), "packed as 'br'"),
        (body(JPEG, headers={"Content-Encoding": "gzip"}), "not an answer"),
        (body(zlib.compress(JPEG)[:-9], headers={"Content-Encoding": "gzip"}), "cut short"),
        (body(zlib.compress(b""), headers={"Content-Encoding": "gzip"}), "no content"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"), b"hello"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"), "cut short"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nhello\r\n"), "not an answer"),
        (raw(b"HTTP/1.0 200 OK\r\n\r\nhello"), b"hello"),
        (raw(b"HTTP/1.1 103 Early Hints\r\n\r\n"), "HTTP status 103"),
        (raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello"), b"hello"),
        (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "not an answer"),
        (raw(b""), "no connection"),
        (raw(b"<html>hello</html>"), "not an answer"),
        (cut(JPEG, len(JPEG) + 1), "cut short"),
        (cut(JPEG, 100), JPEG[:100]),  # more than promised is not read
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nhello"), b"hello"),
        (status(200), "no content"),
    ],
)  # fmt: skip
def test_a_body_is_unpacked_and_must_be_whole(server, internet, answer, reason: str | bytes | None) -> None:
    server.on("cats.example/1.jpg", answer)
    if isinstance(reason, str):
        error = _failure(internet, "http://cats.example/1.jpg")
        assert reason in error.reason
        assert (error.status, error.again) == ("unreachable", reason in ("cut short", "no connection"))
    else:
        assert internet.fetcher().fetch("http://cats.example/1.jpg").body == (reason or JPEG)


@pytest.mark.parametrize(
    ("code", "again"),
    [(code, False) for code in (204, 205, 206, 300, 304, 400, 401, 403, 404, 410, 451, 999)]
    + [(code, True) for code in (408, 425, 429, 500, 502, 503, 504, 599)],
)
def test_other_answers_than_a_file_are_failures_that_say_whether_to_ask_again(server, internet, code, again) -> None:
    server.on("cats.example/1.jpg", status(code, {"Retry-After": "7"}, JPEG))
    error = _failure(internet, "http://cats.example/1.jpg")
    assert str(error) == f"'http://cats.example/1.jpg': HTTP status {code}."
    assert (error.status, error.again, error.retry_after) == ("unreachable", again, 7.0)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0.0), ("120", 120.0), (email.utils.formatdate(time.time() - 99, usegmt=True), 0.0)]
    + [(junk, None) for junk in ("", "-5", "1.5", "nan", "1e9", "9" * 400, "soon", "Wed, 99 Foo 2026", "\xb2")],
)
def test_how_long_to_wait_is_a_number_of_seconds_or_unknown(
    server, internet, value: str, seconds: float | None
) -> None:
    server.on("cats.example/", status(429, {"Retry-After": value}))
    assert _failure(internet, "http://cats.example/").retry_after == seconds
    server.on("cats.example/", status(429, {"Retry-After": email.utils.formatdate(time.time() + 100, usegmt=True)}))
    later = _failure(internet, "http://cats.example/").retry_after
    assert later is not None
    assert 90 < later <= 100


def test_three_redirects_are_followed_and_no_fourth(server, internet) -> None:
    server.on("cats.example/0", redirect("/1"))
    server.on("cats.example/1", redirect("//dogs.example/2", 308))
    server.on(
        "dogs.example/2", redirect("https://b\u00fccher.example/\u00c5 \u00e0%20.jpg", 301)
    )  # UTF-8, as many send
    server.on("xn--bcher-kva.example/%C3%85%20%C3%A0%20.jpg", body(JPEG))
    server.on("cats.example/loop", redirect("/loop"))
    server.on("cats.example/4", redirect("/0"))
    response = internet.fetcher().fetch("http://cats.example/0")
    assert (response.url, response.body) == ("https://xn--bcher-kva.example/%C3%85%20%C3%A0%20.jpg", JPEG)
    for path in ("loop", "4"):
        error = _failure(internet, f"http://cats.example/{path}")
        assert (error.reason, error.status, error.again) == ("more than 3 redirects", "unreachable", False)
    assert server.hits["cats.example/loop"] == 4
    assert server.hits["xn--bcher-kva.example/%C3%85%20%C3%A0%20.jpg"] == 1


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1/", "//127.0.0.1/", "http://localhost/", "http://[::1]/", "http://2130706433/", "http://evil.example/",
     "http://8.8.8.8:8080/", "http://me@8.8.8.8/", "file:///etc/passwd", "ftp://8.8.8.8/", "data:image/png;base64,AAAA",
     "http://[::1", "http://8.8.8.8/\x1b", "http://8.8\t.8.8/", "http://169.254.169.254/latest/meta-data/"],
)  # fmt: skip
def test_a_redirect_to_what_is_refused_is_refused_before_a_connection(server, internet, location: str) -> None:
    internet.names["evil.example"] = ["10.0.0.1"]
    server.on("cats.example/1.jpg", redirect(location))
    error = _failure(internet, "http://cats.example/1.jpg")
    assert (error.status, error.again) == ("refused", False)
    assert server.connections == len(internet.connected) == 1


def test_a_redirect_does_not_take_security_away(server, internet) -> None:
    server.on("cats.example/down", redirect("http://dogs.example/1.jpg"))
    server.on("cats.example/up", redirect("https://dogs.example/1.jpg"))
    server.on("cats.example/up-down", redirect("https://cats.example/down"))
    server.on("dogs.example/1.jpg", body(JPEG))
    assert internet.fetcher().fetch("http://cats.example/up").body == JPEG
    for url in ("https://cats.example/down", "http://cats.example/up-down"):
        error = _failure(internet, url)
        assert error.status == "refused"
        assert "redirected from https to" in error.reason
    assert server.hits["dogs.example/1.jpg"] == 1


LOCAL = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "017700000001", "0177.0.0.1", "127.0.0.1.",
    "127.9.9.9", "0.0.0.0", "0", "10.0.0.1", "167772161", "172.16.0.1", "172.31.255.254", "192.168.1.1", "0xc0a80101",
    "169.254.169.254", "100.64.0.1", "192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "255.255.255.255",
    "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[fd00:ec2::254]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
    "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[ff02::1]", "[2001:db8::1]", "\uff11\uff12\uff17.0.0.1",
    "127\u30020\u30020\u30021", "loopback.example", "private.example", "link.example", "mixed.example", "six.example",
    "mapped.example",
]  # fmt: skip
NAMES = {
    "loopback.example": ["127.0.0.1"],
    "private.example": ["10.1.2.3"],
    "link.example": ["fe80::1%eth0"],
    "mixed.example": ["93.184.215.14", "192.168.0.1"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
}


def _open_carelessly(internet: FakeInternet, url: str) -> None:
    """What a fetcher does that checks nothing: it looks up the name, and connects."""
    host = (urlsplit(url).hostname or "").encode("idna").decode()
    try:
        answers = [host] if ":" in host else [socket.inet_ntoa(socket.inet_aton(host))]
    except OSError:
        answers = list(internet.resolve(host))
    internet.connect(answers[-1], 80, 1.0).close()


def test_no_connection_is_opened_to_the_local_network(server, internet, monkeypatch) -> None:
    internet.names.update(NAMES)
    urls = [f"http://{host}/" for host in LOCAL]
    assert len(urls) >= 40
    assert {_failure(internet, url).status for url in urls} == {"refused"}
    assert server.connections == len(internet.connected) == 0
    assert _failure(internet, "http://cats.example/").reason == "HTTP status 404"  # the control: the listener listens
    assert server.connections == 1
    for url in urls:  # and what was refused would have reached it
        _open_carelessly(internet, url)
    assert len(internet.connected) == 1 + len(urls)
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    assert _failure(internet, "http://private.example/").reason == "HTTP status 404"


def test_a_name_is_looked_up_once_for_each_hop_so_that_no_second_answer_counts(server, internet) -> None:
    internet.names["rebinding.example"] = [["93.184.215.14"], ["127.0.0.1"]]
    server.on("rebinding.example/1.jpg", body(JPEG))
    assert internet.fetcher().fetch("http://rebinding.example/1.jpg").body == JPEG
    assert internet.resolved == ["rebinding.example"]
    assert internet.connected == [("93.184.215.14", 80)]
    assert _failure(internet, "http://rebinding.example/1.jpg").status == "refused"
    internet.names["rebinding.example"] = [["93.184.215.14"]] * 3 + [["127.0.0.1"]]
    server.on("rebinding.example/1.jpg", redirect("/2.jpg"))
    assert "leads to 127.0.0.1" in _failure(internet, "http://rebinding.example/1.jpg").reason
    assert server.hits["rebinding.example/2.jpg"] == 0


@pytest.mark.parametrize("fault", ["expired", "another name", "unknown authority"])
def test_a_server_that_does_not_prove_its_name_is_not_asked(server, internet, fault: str) -> None:
    server.wrong_certificates["cats.example"] = fault
    server.on("cats.example/1.jpg", body(JPEG))
    error = _failure(internet, "https://cats.example/1.jpg")
    assert (error.status, error.again) == ("unreachable", False)
    assert error.reason.startswith("no secure connection: ")
    assert not server.requests


def test_the_default_trusts_only_whom_the_system_trusts(server, internet) -> None:
    server.on("cats.example/1.jpg", body(JPEG))
    fetcher = Fetcher(resolve=internet.resolve, connect=internet.connect)
    with pytest.raises(FetchError, match="no secure connection"):
        fetcher.fetch("https://cats.example/1.jpg")
    assert fetcher.fetch("http://cats.example/1.jpg").body == JPEG


def test_a_name_that_is_not_there_is_not_asked_for_again_and_a_failing_name_server_is(internet) -> None:
    internet.names["gone.example"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    internet.names["later.example"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    internet.names["none.example"] = []
    gone, later = (_failure(internet, f"http://{name}.example/") for name in ("gone", "later"))
    assert (gone.reason, gone.status, gone.again) == ("no connection: Name or service not known", "unreachable", False)
    assert (later.reason, later.again) == ("no connection: Temporary failure in name resolution", True)
    assert "no address" in _failure(internet, "http://none.example/").reason


def test_an_address_where_nobody_answers_leaves_time_for_another_one(server, internet) -> None:
    internet.names["cats.example"] = ["2606:4700::1", "2606:4700::2", "2606:4700::3", "93.184.215.1", "93.184.215.2"]
    internet.down = {"93.184.215.1"}
    server.on("cats.example/1.jpg", body(JPEG))
    assert internet.fetcher().fetch("http://cats.example/1.jpg", Limits(seconds=2.0)).body == JPEG
    assert [address for address, _ in internet.connected] == ["93.184.215.1", "93.184.215.2"]
    internet.down |= {"93.184.215.2", "2606:4700::1", "2606:4700::2"}
    assert _failure(internet, "http://cats.example/1.jpg", QUICK).again
    assert len(internet.connected) == 2 + 4


def _silent_listener(stack: list[socket.socket]) -> Callable[[str, int, float], socket.socket]:
    """Connections to one who accepts them and says nothing, not even hello to TLS."""
    listener = socket.create_server(("127.0.0.1", 0))
    stack.append(listener)
    return lambda address, port, seconds: socket.create_connection(listener.getsockname(), seconds)


@pytest.mark.parametrize(
    "what",
    ["name server", "connection", "handshake", "headers", "slow headers", "continue", "slow redirects", "stalled body",
     "slow body", "slow body over TLS", "slow chunks"],
)  # fmt: skip
def test_time_is_up_for_all_of_it_together(server, internet, what: str, monkeypatch) -> None:
    opened: list[socket.socket] = []
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 10 + b"00"
    server.on("cats.example/", {
        "headers": stalled(),
        "slow headers": slow_headers(0.05),
        "slow body": slow(JPEG, 0.05),
        "slow body over TLS": slow(JPEG, 0.05),
        "slow chunks": stalled(chunks),
        "stalled body": stalled(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"),
        "continue": stalled(b"HTTP/1.1 100 Continue\r\n\r\n"),
        "slow redirects": lambda handler: handler.wait(0.15) and redirect("/")(handler),
    }.get(what, body(JPEG)))  # fmt: skip
    if what == "name server":
        monkeypatch.setattr(internet, "resolve", lambda host: time.sleep(3) or ["8.8.8.8"])
    elif what == "connection":
        internet.names["cats.example"] = ["8.8.8.8"]
        internet.down = {"8.8.8.8"}
    elif what == "handshake":
        monkeypatch.setattr(internet, "connect", _silent_listener(opened))
    scheme = "https" if what in ("handshake", "slow body over TLS") else "http"
    start = time.monotonic()
    error = _failure(internet, f"{scheme}://cats.example/", QUICK)
    assert time.monotonic() - start < 1.5
    assert (error.reason, error.status, error.again) == ("took more than 0.4 s", "unreachable", True)
    for listener in opened:
        listener.close()


def _flood(start: bytes, again: bytes) -> Answer:
    """Something small, over and over: to the other end it is the beginning of an answer that is to come."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(start)
        while handler.wait(0):
            handler.wfile.write(again * 1000)

    return answer


_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        endless(),
        endless(chunked=True),
        endless(headers={"Content-Length": str(2**62)}),
        stalled(b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n"),  # left by what it says
        body(bomb(64), headers={"Content-Encoding": "gzip"}),
        _flood(_CHUNKED, b"1\r\nx\r\n"),
        _flood(_CHUNKED + b"0\r\n", b"X-Trailer: x\r\n"),
        _flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["endless", "chunked", "announced", "announced, then silent", "bomb", "chunks of 1", "trailers",
         "continue"],
)  # fmt: skip
def test_what_is_too_large_is_left_and_what_just_fits_is_taken(server, internet, answer: Answer) -> None:
    limits = Limits(max_bytes=2**20, seconds=20.0)
    server.on("cats.example/", answer)
    error = _failure(internet, "http://cats.example/", limits)
    assert (error.status, error.again) == ("too large", False)
    server.on("cats.example/", body(bytes(2**20)))
    assert len(internet.fetcher().fetch("http://cats.example/", limits).body) == 2**20


_WEIGH = """
import socket, sys
from minisd.prepare.fetch import Fetcher, FetchError

def weight(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1024

fetcher = Fetcher(
    resolve=lambda host: ["8.8.8.8"],
    connect=lambda address, port, seconds: socket.create_connection(("127.0.0.1", int(sys.argv[1])), seconds),
)
before = weight("VmRSS")
for path in sys.argv[2:]:
    try:
        print(path, len(fetcher.fetch("http://cats.example/" + path).body), file=sys.stderr)
    except FetchError as error:
        assert error.status == "too large" or path == "chunk", error
print(weight("VmHWM") - before)
"""


def test_memory_stays_bounded_with_the_largest_of_bodies(server) -> None:
    for path, answer in {
        "endless": endless(chunked=True),
        "bomb": body(bomb(256), headers={"Content-Encoding": "gzip"}),
        "continue": _flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "chunk": _flood(_CHUNKED + b"-1\r\n", b"x" * 64),
        "fits": body(bytes(25 * 2**20)),
    }.items():
        server.on(f"cats.example/{path}", answer)
    command = [sys.executable, "-c", _WEIGH, str(server.ports[80]), "endless", "bomb", "continue", "chunk", "fits"]
    weighed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert weighed.stderr == f"fits {25 * 2**20}\n"
    assert float(weighed.stdout) < 64  # MiB


def test_nothing_stays_open_however_a_fetch_ends(server, internet) -> None:
    server.wrong_certificates["evil.example"] = "expired"
    answers = {
        "1": body(JPEG),
        "2": cut(JPEG, 10**5),
        "3": endless(),
        "4": status(404),
        "5": redirect("/1"),
        "6": raw(b"x"),
    }
    for path, answer in {**answers, "7": redirect("http://127.0.0.1/")}.items():
        server.on(f"cats.example/{path}", answer)
    urls = [f"{scheme}://cats.example/{path}" for scheme in ("http", "https") for path in range(1, 8)]

    def ours() -> int:
        """Our ends of the connections: the server's are its own matter."""
        return sum(connection.fileno() != -1 for connection in opened)

    opened: list[socket.socket] = []
    connect, wrap = internet.connect, ssl.SSLContext.wrap_socket

    def counted(address: str, port: int, seconds: float) -> socket.socket:
        opened.append(connect(address, port, seconds))
        return opened[-1]

    class Context(ssl.SSLContext):
        def wrap_socket(self, *arguments, **options) -> ssl.SSLSocket:
            opened.append(wrap(self, *arguments, **options))
            return opened[-1]

    tls = Context(ssl.PROTOCOL_TLS_CLIENT)
    server.authority.configure_trust(tls)
    fetcher = Fetcher(resolve=internet.resolve, connect=counted, tls=tls)
    for url in [*urls, "https://evil.example/"]:
        with suppress(FetchError):
            fetcher.fetch(url, Limits(max_bytes=10**5))
    assert len(opened) > 20
    assert ours() == 0


def test_threads_share_a_fetcher(server, internet) -> None:
    fetcher = internet.fetcher()
    for index in range(60):
        server.on(f"h{index % 7}.example/{index}", slow(b"%d" % index, 0.01))
    with ThreadPoolExecutor(12) as pool:
        bodies = pool.map(lambda i: fetcher.fetch(f"{('http', 'https')[i % 2]}://h{i % 7}.example/{i}").body, range(60))
        assert list(bodies) == [b"%d" % index for index in range(60)]
