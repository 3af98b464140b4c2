"""An internet on the loopback: web servers that play any host by name, well or badly, and count who comes.

    with HostileServer() as server:
        internet = FakeInternet(server)
        server.on("cats.example/1.jpg", body(jpeg, "image/jpeg"))
        server.on("cats.example/2.jpg", in_turn(status(429, {"Retry-After": "1"}), body(jpeg, "image/jpeg")))
        server.on("www.bing.com/images/async", page)  # any function of the Handler: see `body`
        internet.fetcher().fetch("https://cats.example/1.jpg")
        assert server.hits["cats.example/1.jpg"] == 1

http and https alike. What has no answer is a 404. Names are resolved to public addresses, so that the checks of the
fetcher see what they would see in the world; every connection ends at this server.
"""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, count, repeat
from typing import Self
from urllib.parse import parse_qs, urlsplit

import trustme

from minisd.prepare.fetch import Fetcher


class Handler(BaseHTTPRequestHandler):
    """One request. `host`, `path` and `query` say what is asked for; `send` answers in the ordinary way."""

    protocol_version = "HTTP/1.1"
    server: _WebServer

    def do_GET(self) -> None:
        self.host = self.headers.get("Host", "")
        parts = urlsplit(self.path)
        self.path_only, self.query = parts.path, parse_qs(parts.query, keep_blank_values=True)
        self.close_connection = True
        home = self.server.home
        with home.lock:
            home.hits[self.host + parts.path] += 1
            home.requests.append(self.host + self.path)
            home.headers.append(dict(self.headers))
            answers = home.answers
            answer = answers.get(self.host + self.path) or answers.get(self.host + parts.path, status(404))
        answer(self)

    def send(self, content: bytes, headers: Mapping[str, str] | None = None, code: int = 200) -> None:
        """Answer with a body, and with Content-Length unless `headers` has its own (None: leave it out)."""
        self.start(code, {"Content-Length": str(len(content)), **(headers or {})})
        self.wfile.write(content)

    def start(self, code: int, headers: Mapping[str, str]) -> None:
        """Send the status line and the headers."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def wait(self, seconds: float) -> bool:
        """Sleep; False if the server is being closed, so that no thread is left behind."""
        return not self.server.home.closing.wait(seconds)

    def log_message(self, *_: object) -> None:
        pass


Answer = Callable[[Handler], None]


class HostileServer:
    """The servers, from `with` on.

    Attributes:
        hits: requests that came, by "host/path" (no query).
        requests: the same in order, with their queries.
        headers: their headers, in the same order.
        connections: accepted ones, whether or not a request came.
        authority: signs the certificates of all hosts but those in `wrong_certificates`.
        wrong_certificates: hosts whose certificate is "expired", "another name" or "unknown authority".
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.hits: Counter[str] = Counter()
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.wrong_certificates: dict[str, str] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.authority = _authority()

    def on(self, address: str, answer: Answer) -> None:
        """What "host/path" is answered with, or "host/path?query" in particular."""
        self.answers[address] = answer

    def __enter__(self) -> Self:
        self._http, self._https = _WebServer(self, None), _WebServer(self, self._server_tls())
        self.ports = {80: self._http.server_address[1], 443: self._https.server_address[1]}
        for server in (self._http, self._https):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in (self._http, self._https):
            server.shutdown()
            server.server_close()

    def _server_tls(self) -> ssl.SSLContext:
        def choose(connection: ssl.SSLSocket, host: str | None, _: ssl.SSLContext) -> None:
            connection.context = _certified(host or "no-name.example", self.wrong_certificates.get(host or "", ""))

        context = _certified("no-name.example", "")
        context.sni_callback = choose
        return context


class _WebServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, home: HostileServer, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.home, self.tls = home, tls

    def get_request(self) -> tuple[socket.socket, object]:
        connection, client = super().get_request()
        with self.home.lock:
            self.home.connections += 1
        return connection, client

    def process_request_thread(self, request: socket.socket, client_address: object) -> None:
        """The handshake is done in the connection's own thread: a client that stalls holds up nobody else."""
        if self.tls is not None:
            try:
                request = self.tls.wrap_socket(request, server_side=True)
            except OSError:
                request.close()
                return
        super().process_request_thread(request, client_address)

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what the tests are about."""


class FakeInternet:
    """A name server and a network that lead every public name and address to a HostileServer.

    Attributes:
        names: the addresses of some names, or the OSError that looking them up ends in; all other names get a public
            address of their own. A list of lists is a name that answers differently each time.
        resolved: the names that were asked for, in order.
        connected: the (address, port) pairs that connections were opened to, in order.
        down: addresses that nobody answers at: a connection to them times out.
    """

    def __init__(self, server: HostileServer) -> None:
        self.server = server
        self.names: dict[str, Sequence[str] | OSError | list[list[str]]] = {}
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.down: set[str] = set()
        self._next = count(1)
        self._lock = threading.Lock()

    def resolve(self, host: str) -> Sequence[str]:
        with self._lock:
            self.resolved.append(host)
            found = self.names.get(host)
            if isinstance(found, OSError):
                raise found
            if found is None:
                number = next(self._next)
                found = self.names[host] = [f"93.184.{number // 250}.{number % 250 + 1}"]
            if found and isinstance(found[0], list):
                turn = sum(name == host for name in self.resolved) - 1
                return found[min(turn, len(found) - 1)]
            return found

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        with self._lock:
            self.connected.append((address, port))
        if address in self.down:
            self.server.closing.wait(seconds)
            raise TimeoutError("timed out")
        return socket.create_connection(("127.0.0.1", self.server.ports[port]), seconds)

    def fetcher(self) -> Fetcher:
        """A Fetcher that lives in this internet and trusts the server's certificates."""
        return Fetcher(resolve=self.resolve, connect=self.connect, tls=_trusting())


@cache
def _authority() -> trustme.CA:
    return trustme.CA()


@cache
def _trusting() -> ssl.SSLContext:
    """As the default, and our own authority: to be ready for a thousand others takes a while, so it is done once."""
    tls = ssl.create_default_context()
    _authority().configure_trust(tls)
    return tls


@cache
def _certified(host: str, fault: str) -> ssl.SSLContext:
    authority = trustme.CA() if fault == "unknown authority" else _authority()
    name = "somebody-else.example" if fault == "another name" else host
    end = datetime(2021, 1, 1, tzinfo=UTC) if fault == "expired" else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_after=end).configure_cert(context)
    return context


def body(content: bytes, content_type: str = "image/jpeg", headers: Mapping[str, str] | None = None) -> Answer:
    """A file."""
    return lambda handler: handler.send(content, {"Content-Type": content_type, **(headers or {})})


def status(code: int, headers: Mapping[str, str] | None = None, content: bytes = b"") -> Answer:
    """Any status; with a body, if there is content (also where HTTP allows none)."""
    return lambda handler: handler.send(content, headers, code)


def redirect(location: str, code: int = 302) -> Answer:
    """To another address, sent as it is (UTF-8)."""
    return status(code, {"Location": location.encode().decode("latin-1")})


def in_turn(*answers: Answer) -> Answer:
    """One after the other; the last one for ever."""
    lock, left = threading.Lock(), chain(answers, repeat(answers[-1]))

    def answer(handler: Handler) -> None:
        with lock:
            now = next(left)
        now(handler)

    return answer


def endless(*, chunked: bool = False, headers: Mapping[str, str] | None = None) -> Answer:
    """A body without an end, as fast as it goes."""
    block = b"\xff\xd8\xff\xe0" * 2**14
    piece = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
    how = {"Transfer-Encoding": "chunked"} if chunked else {}

    def answer(handler: Handler) -> None:
        handler.start(200, {**how, **(headers or {})})
        while handler.wait(0):
            handler.wfile.write(piece)

    return answer


def slow(content: bytes, seconds: float, headers: Mapping[str, str] | None = None) -> Answer:
    """A body one byte at a time, with a pause after each (slow-loris)."""

    def answer(handler: Handler) -> None:
        handler.start(200, {"Content-Length": str(len(content)), **(headers or {})})
        for byte in content:
            handler.wfile.write(bytes([byte]))
            if not handler.wait(seconds):
                return

    return answer


def slow_headers(seconds: float) -> Answer:
    """Headers one byte at a time, never coming to an end."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
        while handler.wait(seconds):
            handler.wfile.write(b"x")

    return answer


def stalled(sent: bytes = b"") -> Answer:
    """So many bytes, as they are, then silence with the connection open."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(sent)
        handler.wait(60)

    return answer


def raw(sent: bytes) -> Answer:
    """These bytes in place of an HTTP answer, then the connection is closed."""
    return lambda handler: handler.wfile.write(sent) and None


def cut(content: bytes, length: int, content_type: str = "image/jpeg") -> Answer:
    """A body that ends before the length it promised."""
    return body(content, content_type, {"Content-Length": str(length)})


def gzipped(content: bytes, content_type: str = "image/jpeg") -> Answer:
    """A file packed with gzip, asked for or not."""
    return body(gzip.compress(content), content_type, {"Content-Encoding": "gzip"})


@cache
def bomb(mebibytes: int = 1024) -> bytes:
    """So much of nothing, packed with gzip: about a thousandth of it."""
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(2**20)
    return b"".join([*(packer.compress(block) for _ in range(mebibytes)), packer.flush()])
