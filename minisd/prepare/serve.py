"""The report in the browser of this machine, with captions to edit and pictures to drop and restore.

Any page that is open in the same browser can send requests to 127.0.0.1, and any user of the machine can connect. So
the address has a random token, which a change must also bring in a header of its own; Host and Origin must be ours,
which a page elsewhere cannot claim; and pictures go out as pictures, never as pages.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from minisd.errors import DataError, MinisdError, UsageError, one_line, translate
from minisd.prepare.editor import Editor
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Serve
from minisd.prepare.table import table_path

MAX_BODY_BYTES = 64 * 1024
_SECONDS = 30  # for a request to be sent
_HEADERS = {
    "Cache-Control": "no-store",
    # Another address learns nothing of this one, whose path is the secret.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Beside the page's own policy: not in a frame of another page, where clicks could be led astray.
    "Content-Security-Policy": "frame-ancestors 'none'",
}


def serve(options: Serve) -> None:
    """Show the dataset at http://127.0.0.1:PORT/TOKEN/ until Ctrl-C; every change is in its files at once.

    Raises:
        DataError: there is no table.
        UsageError: the port is taken.
    """
    table = table_path(options.data)
    with GuardedPool() as pool:
        editor = Editor(options, pool)
        try:
            server = Server(editor, options.port)
        except OSError as error:
            raise UsageError(
                f"--port {options.port}: {error.strerror}. Choose another, or leave it out for any that is free."
            ) from error
        with server:
            try:
                print(f"{server.address} (for this machine only; Ctrl-C ends it)", flush=True)
                if options.browser:
                    threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
                server.serve_forever()
            except KeyboardInterrupt:
                with editor.writing:  # what is being saved is saved
                    print(f"\nended; the captions are in {one_line(str(table))}", flush=True)


class Server(ThreadingHTTPServer):
    """A server on 127.0.0.1.

    Args:
        editor: the dataset.
        port: 0 for any that is free.

    Raises OSError if the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, editor: Editor, port: int) -> None:
        self.editor, self.token = editor, secrets.token_urlsafe(32)
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away; of anything else the traceback is wanted."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """What to open."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    @property
    def names(self) -> tuple[str, ...]:
        """What Host may say. Names that lead here from elsewhere are not among them."""
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers requests; see the module."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    server_version, sys_version = "minisd", ""

    def do_GET(self) -> None:
        """The page, or a picture of it. Nothing is changed by a GET."""
        path = self._path_behind_token()
        if path is None:
            return
        editor = self.server.editor
        kinds: dict[str, Callable[[str], tuple[str, bytes] | None]] = {
            "thumbnail": editor.thumbnail,
            "picture": editor.picture,
            "left-out": editor.left_out,
        }
        kind, _, name = path.partition("/")
        try:
            if path == "":
                found: tuple[str, bytes] | None = ("text/html; charset=utf-8", editor.page().encode())
            else:
                found = kinds[kind](unquote(name)) if kind in kinds else None
        except (MinisdError, OSError) as error:
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(translate(error)))
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
        else:
            self._answer(HTTPStatus.OK, *found, keep=path != "")

    def do_POST(self) -> None:
        """A change: /TOKEN/caption, drop or restore, with JSON, and answered so; with "error" if it was refused."""
        path = self._path_behind_token()
        if path is None:
            return
        # Origin is in every POST of a browser; the headers cannot be set from another page without our consent.
        if (self.headers.get("Origin") or "").removeprefix("http://") not in self.server.names:
            return self._refuse(HTTPStatus.FORBIDDEN, "The request is from another page.")
        if not secrets.compare_digest(self.headers.get("X-Minisd-Token", "").encode(), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "The token is missing or wrong.")
        if self.headers.get("Content-Type") != "application/json":
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected application/json.")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length.isascii() or not length.isdigit():
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "Expected a Content-Length.")
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Expected at most {MAX_BODY_BYTES} bytes.")
        self._change(path, self.rfile.read(int(length)))

    def _change(self, action: str, body: bytes) -> None:
        editor = self.server.editor
        actions: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
            "caption": (editor.set_caption, ("file_name", "before", "text")),
            "drop": (editor.drop, ("file_name",)),
            "restore": (editor.restore, ("file_name",)),
        }
        if action not in actions:
            return self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
        change, names = actions[action]
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or set(content) != set(names):
            return self._refuse(HTTPStatus.BAD_REQUEST, f"Expected a JSON object of {', '.join(names)}.")
        if not all(isinstance(value, str) for value in content.values()):
            return self._refuse(HTTPStatus.BAD_REQUEST, "Expected texts.")
        try:
            answer = change(**content)
        except (MinisdError, OSError) as error:
            # The caption or the picture is not as the page says, or the dataset is in use, or the disk is full.
            status = HTTPStatus.NOT_FOUND if isinstance(error, DataError) else HTTPStatus.SERVICE_UNAVAILABLE
            return self._refuse(status, f"Not saved: {translate(error)}")
        status = HTTPStatus.CONFLICT if "error" in answer else HTTPStatus.OK
        self._answer(status, "application/json", json.dumps(answer).encode())

    def _path_behind_token(self) -> str | None:
        """What is asked for, without the token; None if the request was refused."""
        token, slash, path = self.path.removeprefix("/").partition("/")
        if self.headers.get("Host") not in self.server.names:
            self._refuse(HTTPStatus.FORBIDDEN, "The name of the server is wrong. Open the address that was printed.")
        elif not secrets.compare_digest(token.encode(), self.server.token.encode()) or not slash:
            self._refuse(HTTPStatus.FORBIDDEN, "The token is missing or wrong. Open the address that was printed.")
        else:
            return path
        return None

    def _refuse(self, status: HTTPStatus, error: str) -> None:
        """Say why, and hang up: there may be a body that was not read."""
        self.close_connection = True
        self._answer(status, "application/json", json.dumps({"error": one_line(error)}).encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes, *, keep: bool = False) -> None:
        self.send_response(status)
        headers = _HEADERS | {"Content-Type": kind, "Content-Length": str(len(content))}
        if keep:  # a picture of the page, which the browser asks for once
            headers["Cache-Control"] = "private, max-age=600"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the address, which would be in each line, is a secret."""
