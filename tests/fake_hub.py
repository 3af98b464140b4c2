"""A Hub on the loopback: one repository out of a folder, or one failure for every request."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" + "0" * 34


class FakeHub(ThreadingHTTPServer):
    """Serves `folder` as the repository `repo` at COMMIT.

    Args:
        folder: the repository's files.
        repo: its id.
        failure: a status (with the Hub's X-Error-Code for it, if any) for every request; "html" for a page in place
            of JSON; "slow" for no answer within ten seconds; "cut" for files that end halfway.
    """

    daemon_threads = True

    def __init__(self, folder: Path, repo: str, failure: int | tuple[int, str] | str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repo, self.failure = folder, repo, failure
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


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
        if hub.failure == "slow":
            time.sleep(10)
        elif hub.failure == "html":
            self.send(200, b"<!doctype html><title>Log in to the proxy</title>", {"Content-Type": "text/html"})
        elif isinstance(hub.failure, int | tuple):
            status, code = hub.failure if isinstance(hub.failure, tuple) else (hub.failure, "")
            self.send(status, b"{}", {"X-Error-Code": code} if code else {})
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": etag(f)} for n, f in files.items()]
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path in (f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"):
            info = {"id": hub.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{hub.repo}/revision/"):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif (name := path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")) in files:
            content = files[name].read_bytes()
            cut = len(content) // 2 if hub.failure == "cut" and name.endswith(".safetensors") else None
            headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
            self.send(200, content[:cut], headers)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub(folder: Path, repo: str, failure: int | tuple[int, str] | str | None = None) -> Iterator[FakeHub]:
    hub = FakeHub(folder, repo, failure)
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
