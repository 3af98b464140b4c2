"""A Hub on the loopback: one repository out of a folder, which can be written to, and ways in which it can fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep  # the name, for tests take the waiting out of the module
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
LICENSES = ("creativeml-openrail-m", "openrail++", "cc-by-4.0")
Failure = int | tuple[int, str] | str | None


class FakeHub(ThreadingHTTPServer):
    """Serves `folder` as the repository `repo` at `commit`.

    Args:
        folder: the repository's files.
        repo: its id.
        failure: a status (with the Hub's X-Error-Code for it, if any); "html" for a page in place of JSON; "slow" for
            no answer within ten seconds. For weights alone: "cut" for files that end halfway, "cut once" for the first
            answer alone, "cut once, no ranges" for a server that then starts again from the beginning; "short" for half
            a file that says so; "stall" for a kilobyte and silence; "corrupt" for other bytes, as many. For uploads,
            "cut" is a connection that is closed without an answer.
        only: the failure is for requests whose path contains this.
        token: that may write. A commit writes into `folder`.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, repo: str, failure: Failure = None, only: str = "", token: str | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repo, self.failure, self.only, self.token = folder, repo, failure, only, token
        self.commit = COMMIT
        self.created: list[dict[str, Any]] = []  # what was asked for
        self.commits: list[list[str]] = []  # the names of their files
        self.large: dict[str, bytes] = {}  # content by its sha256
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
        if self.fail(failure):
            return
        if path == f"/api/models/{hub.repo}/auth-check/write":
            self.send(200 if hub.created else 404, b"{}", {})
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

    def fail(self, failure: Failure) -> bool:
        """Answer with the failure, if it is one of any request; returns whether it is."""
        if failure == "slow":
            sleep(10)
        elif failure == "html":
            self.send(200, b"<!doctype html><title>Log in to the proxy</title>", {"Content-Type": "text/html"})
        elif isinstance(failure, int | tuple):
            status, code = failure if isinstance(failure, tuple) else (failure, "")
            self.send(status, b"{}", {"X-Error-Code": code} if code else {})
        else:
            return False
        return True

    def do_PUT(self) -> None:
        self.take()

    def do_POST(self) -> None:
        self.take()

    def take(self) -> None:
        """An upload: a repository is made; the Hub says which files go where; large files; one commit."""
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(f"{self.command} {path}")
        failure = hub.failure if hub.only in path else None
        if self.fail(failure):
            return
        if failure == "cut":
            self.close_connection = True
        elif path.startswith("/large/") and self.command == "PUT":  # a signed address: there is no token in the request
            hub.large[path.removeprefix("/large/")] = body
            self.send_json({})
        elif path == "/api/validate-yaml":
            license_name = re.search(r"^license: (.+)$", json.loads(body)["content"], re.MULTILINE)
            known = license_name is None or license_name[1] in LICENSES
            error = {"message": f'"license" must be one of {LICENSES}'}
            self.send_json({"errors": [] if known else [error], "warnings": []}, 200 if known else 400)
        elif self.headers["Authorization"] != f"Bearer {hub.token}":
            self.send(401, b'{"error": "Invalid username or password."}', {})
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.send_json({"url": f"{hub.endpoint}/{hub.repo}"}, 200 if len(hub.created) == 1 else 409)
        elif path == f"/api/models/{hub.repo}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".png")
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(large) else "regular"} for n in names]
            self.send_json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path == f"/{hub.repo}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            self.send_json({"objects": [o | {"actions": self.actions(o["oid"])} for o in objects]})
        elif path == "/verify":
            self.send(200 if json.loads(body)["oid"] in hub.large else 404, b"{}", {})
        elif path == f"/api/models/{hub.repo}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def actions(self, oid: str) -> dict[str, Any]:
        endpoint = self.server.endpoint
        return {"upload": {"href": f"{endpoint}/large/{oid}"}, "verify": {"href": f"{endpoint}/verify"}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        files = {line["value"]["path"]: line["value"] for line in lines if line["key"] in ("file", "lfsFile")}
        for name, value in files.items():
            content = base64.b64decode(value["content"]) if "content" in value else hub.large[value["oid"]]
            (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (hub.folder / name).write_bytes(content)
        hub.commits.append(sorted(files))
        self.send_json(
            {"success": True, "commitOid": hub.commit, "commitUrl": f"{hub.endpoint}/{hub.repo}/commit/{hub.commit}"}
        )

    def send_json(self, answer: Any, status: int = 200) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

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
def fake_hub(
    folder: Path, repo: str, failure: Failure = None, only: str = "", token: str | None = None
) -> Iterator[FakeHub]:
    hub = FakeHub(folder, repo, failure, only, token)
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def log_in(token: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client have this token and no other, keep its files in a folder, and not wait before a retry."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


def send_to(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client ask this Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
