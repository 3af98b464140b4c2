"""A Hub on the loopback: one repository out of a folder, and ways in which it can fail."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep  # the name, for tests take the waiting out of the module

COMMIT = "c0ffee" + "0" * 34
Failure = int | tuple[int, str] | str | None


class FakeHub(ThreadingHTTPServer):
    """Serves `folder` as the repository `repo` at `commit`.

    Args:
        folder: the repository's files.
        repo: its id.
        failure: a status (with the Hub's X-Error-Code for it, if any); "html" for a page in place of JSON; "slow" for
            no answer within ten seconds. For weights alone: "cut" for files that end halfway, "cut once" for the first
            answer alone, "cut once, no ranges" for a server that then starts again from the beginning; "short" for half
            a file that says so; "stall" for a kilobyte and silence; "corrupt" for other bytes, as many.
        only: the failure is for requests whose path contains this.
    """

    daemon_threads = True

    def __init__(self, folder: Path, repo: str, failure: Failure = None, only: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repo, self.failure, self.only = folder, repo, failure, only
        self.commit = COMMIT
        self.requests: list[str] = []
        self.ranges: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up in the middle is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if path != "/api/agent-harnesses":  # the library asks for it once a process, for its User-Agent
            hub.requests.append(f"{self.command} {path}")
        files = {file.relative_to(hub.folder).as_posix(): file for file in hub.folder.rglob("*") if file.is_file()}
        failure = hub.failure if hub.only in path else None
        if failure == "slow":
            sleep(10)
        elif failure == "html":
            self.send(200, b"<!doctype html><title>Log in to the proxy</title>", {"Content-Type": "text/html"})
        elif isinstance(failure, int | tuple):
            status, code = failure if isinstance(failure, tuple) else (failure, "")
            self.send(status, b"{}", {"X-Error-Code": code} if code else {})
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": etag(f)} for n, f in files.items()]
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path in (
            f"/api/models/{hub.repo}",
            *(f"/api/models/{hub.repo}/revision/{r}" for r in ("main", hub.commit)),
        ):
            info = {"id": hub.repo, "sha": hub.commit, "siblings": [{"rfilename": name} for name in files]}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{hub.repo}/revision/"):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif (name := path.removeprefix(f"/{hub.repo}/resolve/{hub.commit}/")) in files:
            self.send_file(files[name], failure if name.endswith(".safetensors") else None)
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"})

    def send_file(self, file: Path, failure: Failure) -> None:
        hub, content = self.server, file.read_bytes()
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": hub.commit, "Content-Length": str(len(content))}
        half, range_header = len(content) // 2, self.headers.get("Range")
        if range_header is not None:
            hub.ranges.append(range_header)
        again = hub.requests.count(f"GET {self.path.partition('?')[0]}") > 1
        if self.command == "HEAD":
            self.send(200, content, headers)
        elif failure == "short":
            self.send(200, content[:half], headers | {"Content-Length": str(half)})
        elif failure == "corrupt":
            self.send(200, content[:-4] + b"\0\1\2\3", headers)
        elif failure == "stall":
            self.send(200, content[:1000], headers)
            sleep(1)
        elif failure == "cut" or (failure in ("cut once", "cut once, no ranges") and not again):
            self.send(200, content[:half], headers)
        elif range_header is not None and failure != "cut once, no ranges":
            begin = int(re.fullmatch(r"bytes=(\d+)-", range_header)[1])  # type: ignore[index]
            where = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
            self.send(206, content[begin:], headers | where | {"Content-Length": str(len(content) - begin)})
        else:
            self.send(200, content, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(file: Path) -> str:
    """The Hub's: of large files the sha256, of others git's name."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def fake_hub(folder: Path, repo: str, failure: Failure = None, only: str = "") -> Iterator[FakeHub]:
    hub = FakeHub(folder, repo, failure, only)
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
