"""The report in a browser, and the server that edits a dataset: from Chromium, and from who should not."""

import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minisd.pocket import scenes
from minisd.prepare.editor import Editor
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Report, Serve
from minisd.prepare.report import report
from minisd.prepare.serve import MAX_BODY_BYTES, Server
from minisd.prepare.table import Picture, read_pictures, read_rejected, write_pictures, write_rejected
from minisd.run_lock import output_lock

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CAPTIONS = [
    "8bit castle",
    "8bit cat with a cat with a cat",
    "a dog",
    "",
    "8bit <b>boat</b>",
    "8bit caf\u00e9 \U0001f408",
]
# Rejects if one of the pictures cannot be shown.
LOAD_ALL = """Promise.all([...document.images].map((image) => {
  image.loading = "eager";
  return image.decode();
}))"""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian's package of that name)")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six captioned pictures of several shapes, and a near-duplicate that was left out."""
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "left_out").mkdir()
    pictures = []
    for index, caption in enumerate(CAPTIONS):
        width, height = 192 + 32 * index, 192
        image = scenes.draw(scenes.scene_at(index, 0), "8bit").resize((width, height), Image.Resampling.NEAREST)
        name = f"{index:06d}-0123abcd.png"
        image.save(folder / "train" / name)
        pictures.append(Picture(file_name=name, text=caption, width=width, height=height, status="ok"))
    write_pictures(folder, pictures)
    sha = "ab" * 32
    image.resize((80, 40)).save(folder / "left_out" / f"{sha[:16]}.jpg")
    near = Picture(status="near-duplicate", reason="looks the same", original="c.jpg", original_sha256=sha)
    write_rejected(folder, [Picture(**{**vars(near), "duplicate_of": pictures[5].file_name})])
    return folder


@pytest.fixture(scope="module")
def pool() -> Iterator[GuardedPool]:
    with GuardedPool(1) as pool:
        yield pool


@pytest.fixture
def server(data: Path, pool: GuardedPool) -> Iterator[Server]:
    with Server(Editor(Serve(data=data, resolution=64, trigger="8bit"), pool), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page of the browser that remembers what it asked for and complained about."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def shown(self) -> list[str]:
        return [card.get_attribute("data-name")[:6] for card in self.page.locator(".card:visible").all()]


def _captions(data: Path) -> list[str]:
    return [picture.text for picture in read_pictures(data)]


# --- the file ---


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (380, "dark")])
def test_the_report_draws_filters_and_fetches_nothing(
    browser: Any, data: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    url = report(Report(data=data, resolution=64, trigger="8bit")).as_uri()
    tab = Tab(browser, url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = tab.page
    assert len(tab.shown()) == 6
    page.get_by_label("trigger missing").check(force=True)
    assert tab.shown() == ["000002", "000003"]
    page.get_by_label("repeated phrase").check(force=True)
    assert tab.shown() == ["000001", "000002", "000003"]
    page.locator("#search").fill("dog")
    page.get_by_text("1 of 6 pictures").wait_for()
    page.locator("#search").fill("nothing has this")
    page.get_by_role("button", name="Show all").click()
    assert len(tab.shown()) == 6
    page.locator("#sort").select_option("-tokens")
    assert tab.shown()[-1] == "000003"
    page.locator("h1").click()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Every picture is drawn, and the page is not a blank one.
    page.evaluate(LOAD_ALL)
    assert page.locator("img").count() == 9
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    with Image.open(shot) as image:
        colours = image.convert("RGB").resize((200, 200)).getcolors(40_000)
        assert colours is not None
        assert len(colours) > 500
        corner = image.convert("L").getpixel((3, 3))
        assert isinstance(corner, int)
        assert (corner < 60) == (scheme == "dark")
    # chromium counts the pictures in the page as requests.
    assert [request for request in tab.requests if not request.startswith("data:")] == [url]
    assert tab.complaints == []
    page.close()


# --- the editor, as it is meant to be used ---


@needs_chromium
def test_captions_are_edited_and_pictures_dropped_and_restored_in_the_browser(
    browser: Any, data: Path, server: Server
) -> None:
    tab = Tab(browser, server.address)
    page = tab.page
    card = page.locator(".card").nth(2)
    card.locator("textarea").fill("8bit  dog,\n\u202eold\u202c")
    card.locator("textarea").press("Control+Enter")
    card.get_by_text("Saved", exact=True).wait_for()
    assert _captions(data)[2] == "8bit dog, old"
    assert card.locator(".flags").inner_text() == ""
    assert card.locator("textarea").input_value() == "8bit dog, old"
    first = page.locator(".card").nth(0)
    first.locator("textarea").fill("castle")
    first.locator("textarea").press("Tab")  # leaving the field saves, too
    first.get_by_text("Saved", exact=True).wait_for()
    assert first.locator(".flags").inner_text() == "trigger missing"
    row = read_pictures(data)[0]
    assert (row.text, row.caption_source, row.status, row.reason) == ("castle", "edited", "check", "trigger missing")
    first.locator("textarea").fill("not wanted")
    first.locator("textarea").press("Escape")
    assert first.locator("textarea").input_value() == "castle"

    card.get_by_role("button", name="Drop").click()
    card.get_by_role("button", name="Restore").wait_for()
    assert len(read_pictures(data)) == 5
    assert page.locator("#kept").inner_text() == "5"
    page.reload()
    assert page.locator(".card").count() == 5
    page.locator(".outs").get_by_role("button", name="Restore").click()
    page.get_by_text("Restored.").wait_for()
    page.reload()
    assert _captions(data) == ["castle", CAPTIONS[1], "8bit dog, old", *CAPTIONS[3:]]
    assert page.locator(".card textarea").nth(2).input_value() == "8bit dog, old"
    assert [row.status for row in read_rejected(data)] == ["near-duplicate"]
    page.evaluate(LOAD_ALL)
    assert all(request.startswith((server.address, "data:")) for request in tab.requests)
    assert tab.complaints == []
    page.close()


@needs_chromium
def test_two_windows_do_not_overwrite_each_other_unasked(browser: Any, data: Path, server: Server) -> None:
    tabs = [Tab(browser, server.address) for _ in range(2)]
    fields = [tab.page.locator(".card textarea").nth(1) for tab in tabs]
    outputs = [tab.page.locator(".card output").nth(1) for tab in tabs]
    fields[0].fill("8bit mine")
    fields[0].press("Control+Enter")
    tabs[0].page.get_by_text("Saved", exact=True).wait_for()
    fields[1].fill("8bit yours")
    fields[1].press("Control+Enter")
    tabs[1].page.get_by_text("Changed elsewhere").wait_for()
    assert "8bit mine" in outputs[1].inner_text()
    assert _captions(data)[1] == "8bit mine"
    fields[1].press("Control+Enter")
    tabs[1].page.get_by_text("Saved", exact=True).wait_for()
    assert _captions(data)[1] == "8bit yours"
    for tab in tabs:
        tab.page.close()


# --- the editor, as it is not ---


def _ask(
    server: Server, method: str, path: str, body: bytes = b"", token: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Ask as our page would, but for what is given; "" leaves a header out."""
    host = f"127.0.0.1:{server.server_port}"
    token = server.token if token is None else token
    sent = {"Host": host}
    if method == "POST":
        sent |= {"Origin": f"http://{host}", "X-Minisd-Token": server.token, "Content-Type": "application/json"}
        sent |= {"Content-Length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, f"/{token}/{path}" if token else path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    answer = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    connection.close()
    return answer


def _edit(server: Server, index: int = 0, text: str = "changed", **changes: Any) -> bytes:
    name = f"{index:06d}-0123abcd.png"
    return json.dumps({"file_name": name, "before": CAPTIONS[index], "text": text, **changes}).encode()


def test_who_is_not_our_page_changes_nothing(server: Server, data: Path) -> None:
    port = server.server_port
    before = {path: path.read_bytes() for path in data.rglob("*.*") if path.is_file() and path.name != "run.lock"}
    edit = _edit(server)
    attacks: list[tuple[int, str, dict[str, Any]]] = [
        (403, "the Host of a rebound name", {"Host": f"evil.example:{port}"}),
        (403, "no Host", {"Host": ""}),
        (403, "another port's Host", {"Host": "127.0.0.1:1"}),
        (403, "another page", {"Origin": "https://evil.example"}),
        (403, "another server here", {"Origin": f"http://127.0.0.1:{port + 1}"}),
        (403, "a name that begins like ours", {"Origin": f"http://127.0.0.1:{port}.evil.example"}),
        (403, "a page without a name", {"Origin": "null"}),
        (403, "no Origin", {"Origin": ""}),
        (403, "no token in the header", {"X-Minisd-Token": ""}),
        (403, "a wrong token in the header", {"X-Minisd-Token": "x" * 43}),
        (403, "a wrong token in the address", {"token": "x" * 43}),
        (403, "no token in the address", {"token": "", "path": "/caption"}),
        (415, "a form", {"Content-Type": "text/plain"}),
        (413, "a huge body", {"Content-Length": str(MAX_BODY_BYTES + 1)}),
        (413, "a length of many digits", {"Content-Length": "9" * 5000}),
        (411, "no length", {"Content-Length": ""}),
        (411, "a negative length", {"Content-Length": "-1"}),
        (404, "no such action", {"path": "delete"}),
        (404, "a name that leads outside", {"path": "drop", "body": b'{"file_name": "../metadata.csv"}'}),
        (404, "no such picture", {"body": _edit(server, file_name="metadata.csv")}),
        (400, "not JSON", {"body": b"file_name=a"}),
        (400, "JSON without end", {"body": b"[" * 60_000}),
        (400, "a number for a caption", {"body": _edit(server, text=7)}),  # type: ignore[arg-type]
        (400, "more than was asked for", {"body": _edit(server, more="x")}),
    ]
    for status, what, changes in attacks:
        sent: dict[str, Any] = {"path": "caption", "body": edit, **changes}
        sent = {name.replace("-", "_"): value for name, value in sent.items()}
        got, _, answer = _ask(server, "POST", **sent)
        assert (got, what) == (status, what)
        assert "\n" not in json.loads(answer)["error"]
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        assert _ask(server, method, "caption")[0] == 501, method
    assert _ask(server, "GET", "caption?text=x")[0] == 404
    assert _ask(server, "GET", "drop/000000-0123abcd.png")[0] == 404
    assert {
        path: path.read_bytes() for path in data.rglob("*.*") if path.is_file() and path.name != "run.lock"
    } == before
    # The same request as our page sends it does change something.
    assert _ask(server, "POST", "caption", edit)[0] == 200
    assert _captions(data)[0] == "changed"


def test_only_pictures_of_the_dataset_go_out_and_only_as_pictures(server: Server, data: Path) -> None:
    (data / "train" / "page.png").write_text("<script>alert(1)</script>")
    (data.parent / "secret.png").write_bytes((data / "train" / "000000-0123abcd.png").read_bytes())
    (data / "train" / "link.png").symlink_to(data.parent / "secret.png")
    for kind in ("picture", "thumbnail", "left-out"):
        for name in ("metadata.csv", "page.png", "link.png", "../../secret.png", "..%2F..%2Fsecret.png", "/etc/passwd",
                     "%2Fetc%2Fpasswd", "%00", "%ff", "", ".", "..", "a" * 5000, "..%5c..%5csecret.png"):  # fmt: skip
            status, _, answer = _ask(server, "GET", f"{kind}/{name}")
            assert (status, name) == (404, name)
            assert b"PNG" not in answer
    status, headers, answer = _ask(server, "GET", "picture/000000-0123abcd.png")
    assert (status, headers["content-type"]) == (200, "image/png")
    assert answer == (data / "train" / "000000-0123abcd.png").read_bytes()
    status, headers, answer = _ask(server, "GET", "thumbnail/000005-0123abcd.png")
    assert (status, headers["content-type"], headers["x-content-type-options"]) == (200, "image/jpeg", "nosniff")
    assert Image.open(io.BytesIO(answer)).size == (352, 192)
    assert _ask(server, "GET", "left-out/" + "ab" * 32)[0] == 200
    for attack in ({"token": "", "path": "/"}, {"token": "x" * 43, "path": ""}, {"path": "", "Host": "evil.example"}):
        assert _ask(server, "GET", **attack)[0] == 403  # type: ignore[arg-type]
    _, headers, _ = _ask(server, "GET", "")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert server.server_address[0] == "127.0.0.1"


def test_edits_at_the_same_time_are_all_kept(server: Server, data: Path) -> None:
    def edit(index: int) -> None:
        assert _ask(server, "POST", "caption", _edit(server, index, f"new {index}"))[0] == 200

    threads = [threading.Thread(target=edit, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _captions(data) == [f"new {index}" for index in range(6)]


def test_a_dataset_that_another_command_writes_is_left_alone(
    server: Server, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisd.prepare.editor._PATIENCE", 0.2)
    holder = "import sys; from pathlib import Path; from minisd.run_lock import output_lock\n"
    holder += "with output_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(data)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        status, _, answer = _ask(server, "POST", "caption", _edit(server))
        assert (status, _captions(data)) == (503, CAPTIONS)
        assert f"in use by process {process.pid}" in json.loads(answer)["error"]
        process.communicate()
    assert _ask(server, "POST", "caption", _edit(server))[0] == 200
    with output_lock(data):  # let go of when the edit is done
        pass


def test_ctrl_c_ends_it_with_a_line(data: Path) -> None:
    script = """
import sys
from pathlib import Path
from minisd.prepare.options import Serve
from minisd.prepare.serve import serve
if __name__ == "__main__":
    serve(Serve(data=Path(sys.argv[1]), browser=False))
"""
    path = data.parent / "serve.py"
    path.write_text(script)
    command = [sys.executable, str(path), str(data)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" ")[0]
        port = int(address.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)):  # of a request that never comes
            process.send_signal(signal.SIGINT)
            said, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert said.startswith("\nended; the captions are in ")
