"""collect with the real package on a loopback that plays Bing and the picture hosts: B1-B23 and K6-K10.

A test of a fault of the package shows it with the package alone, too: else it would prove nothing.
"""

import errno
import inspect
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from minisd.errors import DataError, DiskError, NetworkError, UsageError
from minisd.prepare import bing_search
from minisd.prepare.collect import collect
from minisd.prepare.fetch import Limits
from minisd.prepare.journal import KEPT, NAME, read_journal
from minisd.prepare.options import Collect, Crawl, Rules
from tests.bing_pages import BING, SEARCH, bing, lead_the_package_to, package_alone, page, picture
from tests.hostile_server import FakeInternet, HostileServer, body, cut, endless, gzipped, redirect, slow, status

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def server():
    with HostileServer() as server:
        yield server


def run(server, output, *, query="8bit", limit=5, rules=None, pause=lambda _: None, **crawl):
    """Collect, and return the journal."""
    options = Collect(crawl=Crawl(query=query, limit=limit, **crawl), output=output, rules=rules or Rules())
    collect(options, fetcher=FakeInternet(server).fetcher(), pause=pause)
    return read_journal(output / "raw")


def serve(server, contents, per_page=35):
    """Let Bing find these answers, each on a host of its own; returns the links."""
    links = [f"https://h{number}.example/{number}.jpg" for number in range(len(contents))]
    for link, content in zip(links, contents, strict=True):
        server.on(link.removeprefix("https://"), body(content) if isinstance(content, bytes) else content)
    server.on(SEARCH, bing(links, per_page))
    return links


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != NAME}


# --- one crawl over links of every kind ---
AVIF = picture(12, kind="AVIF")
SMALL = picture(13, size=(200, 90))
ESCAPES = "https://esc.example/\x1b[2J\u202e.jpg"


def cases(port):
    """link -> (what it is answered with, the status in the journal)."""
    jpeg, png = picture(1), picture(2, kind="PNG")
    return {
        "https://good.example/1.jpg": (body(jpeg), KEPT),
        "https://mirror.example/same.jpg": (body(jpeg), "duplicate"),
        "https://good.example/half-size.jpg": (body(picture(1, size=(640, 600))), "near-duplicate"),
        "https://good.example/a%20b%2Bc.png": (body(png, "text/html"), KEPT),
        "https://good.example/caf\xe9.jpg": (body(picture(3)), KEPT),
        "https://good.example/gif-named.jpg": (body(picture(4, kind="GIF"), "image/jpeg"), KEPT),
        "https://good.example/5.avif": (body(AVIF, "image/avif"), KEPT),
        "https://good.example/zipped.jpg": (gzipped(picture(6)), KEPT),
        "https://good.example/here?a=1&b=2": (body(picture(7)), KEPT),
        "https://good.example/moved.jpg": (redirect("https://other.example/8.jpg"), KEPT),
        "https://small.example/1.jpg": (body(SMALL), "too small"),
        "https://bad.example/page.jpg": (body(b"<html>no picture</html>"), "not a picture"),
        "https://bad.example/text.bmp": (body(b"BM is how it begins"), "damaged"),
        "https://bad.example/cut.jpg": (body(jpeg[:200]), "damaged"),
        "https://bad.example/cut.png": (body(png[:40]), "not a picture"),
        "https://bad.example/closed.jpg": (cut(jpeg[:500], len(jpeg)), "unreachable"),
        "https://bad.example/404.jpg": (status(404), "unreachable"),
        "https://bad.example/500.jpg": (status(500), "unreachable"),
        "https://bad.example/nothing.jpg": (status(204), "unreachable"),
        "https://bad.example/endless.jpg": (endless(), "too large"),
        "https://slow.example/1.jpg": (slow(jpeg[:60], 0.05), "unreachable"),
        "https://shy.example/noai.jpg": (body(picture(9), headers={"X-Robots-Tag": "noindex, noai"}), "refused"),
        "https://shy.example/noimageai.jpg": (body(picture(10), headers={"X-Robots-Tag": "x: NoImageAI"}), "refused"),
        "file:///etc/hosts": (None, "refused"),
        "data:image/png;base64,AAAA": (None, "refused"),
        "ftp://files.example/1.jpg": (None, "refused"),
        "https://me:secret@good.example/2.jpg": (None, "refused"),
        f"http://127.0.0.1:{port}/secret.jpg": (None, "refused"),
        "http://127.0.0.1/secret.jpg": (None, "refused"),
        "http://2130706433/secret.jpg": (None, "refused"),
        "https://sly.example/1.jpg": (redirect("http://127.0.0.1/secret.jpg"), "refused"),
        ESCAPES: (None, "refused"),
    }


class World:
    """What came of the crawl."""

    def __init__(self, folder):
        with HostileServer() as server:
            self.cases = cases(server.ports[80])
            for link, (answer, _) in self.cases.items():
                if answer is not None:
                    address = link.removeprefix("https://").replace("\xe9", "%C3%A9").partition("?")[0]
                    server.on(address, answer)
            server.on("127.0.0.1/secret.jpg", body(picture(11)))
            server.on("other.example/8.jpg", body(picture(8)))
            server.on(SEARCH, bing(list(self.cases), 10))
            self.journal = {found.url: found for found in run(server, folder, limit=50)}
            self.hits, self.requests, self.headers = server.hits, server.requests, server.headers
        self.raw = folder / "raw"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bing_search, "_PICTURE", Limits(max_bytes=2**20, seconds=1.0))
        yield World(tmp_path_factory.mktemp("world"))


def test_every_link_ends_as_it_must_and_with_a_reason(world):
    # Which of three that are alike came first is a matter of threads.
    alike = [f"https://{name}.jpg" for name in ("good.example/1", "good.example/half-size", "mirror.example/same")]
    ended = {url: found.status for url, found in world.journal.items()}
    assert ended == {url: expected for url, (_, expected) in world.cases.items()} | {url: ended[url] for url in alike}
    assert "duplicate" in {ended[alike[0]], ended[alike[2]]}
    assert all(found.reason for found in world.journal.values() if found.status != KEPT)
    # One of them counts; of the other sizes clean keeps the better.
    assert [ended[url] for url in alike].count(KEPT) in (1, 2)


def test_files_are_untouched_whole_and_named_after_their_content_b7_b17(world):
    for name, data in files(world.raw).items():
        found = next(found for found in world.journal.values() if found.file_name == name)
        assert name.startswith(found.sha256[:16])
        assert found.size_bytes == len(data)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert (found.width, found.height) == image.size
    suffix = {url: Path(found.file_name).suffix for url, found in world.journal.items() if found.file_name}
    assert suffix["https://good.example/gif-named.jpg"] == ".gif"
    assert suffix["https://good.example/5.avif"] == ".avif"
    assert suffix["https://good.example/a%20b%2Bc.png"] == ".png"
    assert len(files(world.raw)) == len(suffix)


def test_the_package_alone_takes_what_only_begins_like_a_picture_and_its_name_b7_b17(server, monkeypatch, tmp_path):
    jpeg, png = picture(1), picture(2, kind="PNG")
    serve(server, [b"BM is how it begins", jpeg[:200], png[:40], picture(4, kind="GIF"), AVIF])
    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 5, tmp_path)
    assert len(list(tmp_path.glob("*.jpg"))) == 4  # a GIF under that name among them, and no AVIF


def test_provenance_is_noted_and_files_are_known_by_their_content_b23(world):
    first = world.journal["https://good.example/a%20b%2Bc.png"]
    assert first.query == "8bit"
    assert abs(time.time() - time.mktime(time.strptime(first.fetched_at[:19], "%Y-%m-%dT%H:%M:%S"))) < 86_400
    assert first.fetched_at.endswith("+00:00")
    assert len(first.sha256) == 64
    same = [world.journal[url] for url in ("https://good.example/1.jpg", "https://mirror.example/same.jpg")]
    assert same[0].sha256 == same[1].sha256
    assert {found.status for found in same} & {"duplicate"}


def test_the_package_alone_notes_nothing_and_keeps_copies_b23(server, monkeypatch, tmp_path):
    serve(server, [picture(1), picture(1)])
    lead_the_package_to(server, monkeypatch)
    assert package_alone("8bit", 2, tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Image_1.jpg", "Image_2.jpg"]


def test_only_public_web_addresses_are_opened_also_after_a_redirect_b3_b4(world):
    assert not [request for request in world.requests if "secret" in request]
    assert world.hits["sly.example/1.jpg"] == 1  # the redirect was seen, and not followed


def test_the_package_alone_reads_local_files_and_local_servers_b3_b4(server, monkeypatch, tmp_path):
    (tmp_path / "private.bmp").write_bytes(b"BM private")
    server.on(f"127.0.0.1:{server.ports[80]}/secret.jpg", body(picture(1)))
    secret = f"http://127.0.0.1:{server.ports[80]}/secret.jpg"
    server.on("sly.example/1.jpg", redirect(secret))
    server.on(SEARCH, bing([f"file://{tmp_path}/private.bmp", secret, "https://sly.example/1.jpg"]))
    lead_the_package_to(server, monkeypatch)
    (tmp_path / "taken").mkdir()
    package_alone("8bit", 3, tmp_path / "taken")
    assert len(list((tmp_path / "taken").iterdir())) == 3
    assert server.hits[secret.removeprefix("http://")] == 2


def test_a_body_is_bounded_in_size_and_in_time_b5_b6(world):
    assert "1048576 bytes" in world.journal["https://bad.example/endless.jpg"].reason
    assert world.journal["https://slow.example/1.jpg"].reason == "took more than 1 s"
    assert world.hits["slow.example/1.jpg"] == 1  # its time was spent


def test_the_package_alone_takes_any_size_and_any_time_b5_b6(server, monkeypatch, tmp_path):
    serve(server, [b"BM" + bytes(26 * 2**20), slow(b"BM slow, slow, slow", 0.1)])
    lead_the_package_to(server, monkeypatch)
    began = time.monotonic()
    package_alone("8bit", 2, tmp_path, timeout=1)
    assert time.monotonic() - began > 1.5
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [19, 26 * 2**20 + 2]


def test_escapes_in_an_address_stay_escapes_b8(world):
    assert world.hits["good.example/a%20b%2Bc.png"] == 1
    assert world.hits["good.example/caf%C3%A9.jpg"] == 1
    assert "good.example/here?a=1&b=2" in world.requests


def test_the_package_alone_escapes_them_again_b8(server, monkeypatch, tmp_path):
    server.on("good.example/a%20b.jpg", body(picture(1)))
    server.on(SEARCH, bing(["https://good.example/a%20b.jpg"]))
    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 1, tmp_path)
    assert server.hits["good.example/a%2520b.jpg"] == 1
    assert list(tmp_path.iterdir()) == []


def test_we_say_who_we_are_and_take_what_a_server_packs_b22(world, server, monkeypatch, tmp_path):
    agents = {headers["User-Agent"] for headers in world.headers}
    assert len(agents) == 1
    assert agents.pop().startswith("minisd")

    serve(server, [gzipped(picture(6))])
    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 1, tmp_path)
    assert "Chrome/23" in server.headers[-1]["User-Agent"]
    assert list(tmp_path.iterdir()) == []


def test_failures_are_tried_again_where_that_may_help_and_no_more_than_thrice(world):
    assert world.hits["bad.example/500.jpg"] == world.hits["bad.example/closed.jpg"] == 3
    assert world.hits["bad.example/404.jpg"] == world.hits["bad.example/nothing.jpg"] == 1
    assert world.hits["shy.example/noai.jpg"] == 1


def test_a_hostile_address_reaches_no_terminal_b20_k10(world, server, monkeypatch, tmp_path, capfd, caplog):
    assert world.journal[ESCAPES].status == "refused"
    text = (world.raw / NAME).read_text("ascii")
    assert all(line.isprintable() for line in text.splitlines())

    raw = page(["https://esc.example/HERE.jpg"]).replace(b"HERE", b"\x1b[2J\xe2\x80\xae")
    server.on(SEARCH, body(raw))
    caplog.set_level(logging.DEBUG)
    with pytest.raises(DataError):
        run(server, tmp_path, limit=1)
    shown = capfd.readouterr()
    assert "\x1b[2J" not in shown.out + shown.err + caplog.text
    assert "\u202e" not in shown.out + shown.err + caplog.text

    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 1, tmp_path)
    assert "\x1b[2J" in capfd.readouterr().out


# --- a crawl from begin to end ---
@pytest.mark.parametrize("query", ["..", "...", ". .", "/", "a/../../b", "x" * 300, "caf\xe9 \U0001f600", "a\udce9"])
def test_no_query_is_a_folder_and_nothing_is_deleted_b1_b18(server, tmp_path, query):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("years")
    serve(server, [picture(1)])
    assert [found.query for found in run(server, tmp_path, query=query, limit=1)] == [query]
    assert (tmp_path / "mine" / "work.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "raw"]


def test_the_package_alone_deletes_the_output_and_mixes_queries_b1_b18(server, monkeypatch, tmp_path):
    from bing_image_downloader import download

    monkeypatch.setattr(BING, "run", lambda self: (self.output_dir / "Image_1.jpg").touch())
    (tmp_path / "work.txt").write_text("years")
    download("a:b", output_dir=str(tmp_path))
    download("a*b", output_dir=str(tmp_path))
    assert [path.name for path in tmp_path.glob("a*/*")] == ["Image_1.jpg"]
    with pytest.raises(SystemExit):
        download("x" * 300, output_dir=str(tmp_path))
    download("..", output_dir=str(tmp_path), force_replace=True)
    assert not (tmp_path / "work.txt").exists()


def test_queries_share_a_dataset_and_each_has_its_limit(server, tmp_path):
    links = serve(server, [picture(number) for number in range(6)])
    first = run(server, tmp_path, query="a:b", limit=2)
    server.on(SEARCH, bing(links[::-1]))
    both = run(server, tmp_path, query="a*b", limit=3)
    assert Counter(found.query for found in both) == {"a:b": 2, "a*b": 3}
    assert both[:2] == first
    assert len(files(tmp_path / "raw")) == 5


def test_a_page_of_dead_links_does_not_end_the_search_b10(server, monkeypatch, tmp_path):
    contents = [*[status(404)] * 5, *[picture(number) for number in range(3)]]
    serve(server, contents, per_page=5)
    journal = run(server, tmp_path / "ours", limit=3)
    assert Counter(found.status for found in journal) == {"unreachable": 5, KEPT: 3}

    lead_the_package_to(server, monkeypatch)
    (tmp_path / "alone").mkdir()
    package_alone("8bit", 3, tmp_path / "alone")
    assert list((tmp_path / "alone").iterdir()) == []


def test_a_crawl_has_a_limit_of_requests_b11_k8(server, tmp_path):
    links = (f"https://h{number}.example/{number}.jpg" for number in range(1000))
    server.on(SEARCH, lambda handler: handler.send(page([next(links) for _ in range(4)])))
    with pytest.raises(DataError, match=r"^0 of 4 pictures for '8bit', .*32 requests were made.* unreachable"):
        run(server, tmp_path, limit=4)
    assert len(server.requests) == 32  # 3 x 4 + 20


def test_a_crawl_has_a_limit_of_time_b11_k8(server, tmp_path):
    serve(server, [picture(1), *[slow(picture(2), 0.5)] * 12])
    began = time.monotonic()
    journal = run(server, tmp_path, limit=9, max_minutes=1.5 / 60)
    assert time.monotonic() - began < 4
    assert [found.status for found in journal if found.status == KEPT] == [KEPT]


def test_a_crawl_asks_one_host_twice_a_second_at_most_and_several_at_once_b11_b22_k8(server, tmp_path):
    at_once, most, times = [0], [0], []

    def slowly(content):
        def answer(handler):
            times.append((time.monotonic(), handler.host))
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            handler.wait(0.2)
            at_once[0] -= 1
            handler.send(content)

        return answer

    serve(server, [slowly(picture(number)) for number in range(6)])
    own = [f"https://one.example/{number}.jpg" for number in range(10, 13)]
    for number, link in enumerate(own):
        server.on(link.removeprefix("https://"), slowly(picture(10 + number)))
    server.on(SEARCH, bing([f"https://h{number}.example/{number}.jpg" for number in range(6)] + own))
    run(server, tmp_path, limit=9, pause=time.sleep)
    assert most[0] >= 4
    at_one = sorted(moment for moment, host in times if host == "one.example")
    assert min(b - a for a, b in pairwise(at_one)) > 0.4


def test_a_full_disk_ends_the_crawl_and_leaves_nothing_half_written_b15(server, monkeypatch, tmp_path):
    serve(server, [picture(number) for number in range(40)])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(bing_search, "write_synced", full)
        with pytest.raises(DiskError, match="No space left on device"):
            run(server, tmp_path / "ours", limit=30)
    assert len(server.requests) < 15
    for thread in threading.enumerate():
        if thread.name == "download":  # left behind
            thread.join(30)
    assert files(tmp_path / "ours" / "raw") == {}

    server.requests.clear()
    lead_the_package_to(server, monkeypatch)
    monkeypatch.setattr(sys.modules[BING.__module__], "open", full, raising=False)
    package_alone("8bit", 30, tmp_path)  # goes on through all links, and returns
    assert len([request for request in server.requests if "images/async" not in request]) >= 30


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_connections_are_closed_b21(server, monkeypatch, tmp_path):
    serve(server, [picture(1), picture(2), status(404)])
    before = _open_files()
    run(server, tmp_path, limit=2)
    deadline = time.monotonic() + 5
    while _open_files() > before + 4 and time.monotonic() < deadline:  # those of the server
        time.sleep(0.05)
    assert _open_files() <= before + 4
    for method in (BING.save_image, BING.run):  # the package alone never does, by its source
        assert ".close()" not in inspect.getsource(method)
        assert "with urllib" not in inspect.getsource(method)


def test_no_network_is_one_line_and_zero_is_never_success_k7(server, tmp_path):
    internet = FakeInternet(server)
    internet.names["www.bing.com"] = OSError(errno.ENETUNREACH, "Network is unreachable")
    options = Collect(crawl=Crawl(query="8bit"), output=tmp_path)
    pauses = []
    with pytest.raises(NetworkError, match=r"www.bing.com.*Network is unreachable") as refusal:
        collect(options, fetcher=internet.fetcher(), pause=pauses.append)
    assert "\n" not in str(refusal.value)
    assert sum(pauses) < 10
    server.on(SEARCH, body(b"<html></html>"))
    with pytest.raises(DataError, match=r"^0 of 5 pictures .*shows no pictures"):
        run(server, tmp_path)


@pytest.mark.parametrize(("least", "code"), [(12, None), (13, 3)])
def test_fewer_than_asked_for_are_counted_and_too_few_are_a_failure_k7(server, tmp_path, caplog, least, code):
    caplog.set_level(logging.INFO)
    serve(server, [*[picture(number) for number in range(12)], SMALL, SMALL, b"text", status(404)])
    if code is None:
        run(server, tmp_path, limit=100, min_images=least)
        assert "100 wanted, 12 kept; left out: 2 too small, 1 not a picture, 1 unreachable" in caplog.text
        assert "12 of 100 pictures: Bing has no more results" in caplog.text
    else:
        with pytest.raises(DataError, match=r"^12 of 100 pictures for '8bit', expected at least 13") as refusal:
            run(server, tmp_path, limit=100, min_images=least)
        assert refusal.value.exit_code == code


def test_a_search_that_fails_later_keeps_what_there_is_k7(server, tmp_path, caplog):
    links = serve(server, [picture(1), picture(2)])
    server.on(
        SEARCH, lambda handler: handler.send(page(links)) if handler.query["first"] == ["0"] else status(429)(handler)
    )
    assert len(run(server, tmp_path)) == 2
    assert "2 of 5 pictures: the search at https://www.bing.com/images/async failed: HTTP status 429" in caplog.text


# --- again ---
def test_no_more_than_the_limit_are_kept_and_what_is_there_is_not_asked_for_again_b16_k9(server, tmp_path):
    serve(server, [picture(number) for number in range(20)], per_page=7)
    first = run(server, tmp_path, limit=5)
    assert len(first) == len(files(tmp_path / "raw")) == 5
    before, kept = server.hits.copy(), files(tmp_path / "raw")
    assert run(server, tmp_path, limit=5) == first
    assert server.hits == before
    assert run(server, tmp_path, limit=9)[:5] == first
    assert kept.items() <= files(tmp_path / "raw").items()
    assert len(files(tmp_path / "raw")) == 9
    done = {found.url.removeprefix("https://") for found in first}
    assert all(server.hits[address] == before[address] for address in done)


def test_the_package_alone_overwrites_what_is_there_b16(server, monkeypatch, tmp_path):
    lead_the_package_to(server, monkeypatch)
    serve(server, [picture(1)])
    package_alone("8bit", 1, tmp_path)
    before = files(tmp_path)
    serve(server, [picture(2)])
    package_alone("8bit", 1, tmp_path)
    assert files(tmp_path).keys() == before.keys()
    assert files(tmp_path) != before


def test_what_could_not_be_reached_is_tried_again_another_time_and_other_rules_are_heeded(server, tmp_path):
    links = serve(server, [status(404), SMALL, picture(1), b"text"])
    run(server, tmp_path, limit=3)
    server.on("h0.example/0.jpg", body(picture(2)))
    again = {found.url: found.status for found in run(server, tmp_path, limit=3, rules=Rules(min_side=64))}
    assert again == {links[0]: KEPT, links[1]: KEPT, links[2]: KEPT, links[3]: "not a picture"}
    assert server.hits["h2.example/2.jpg"] == server.hits["h3.example/3.jpg"] == 1
    with pytest.raises(DataError, match=r"^0 of 3 pictures"):  # nor do those count that are there
        run(server, tmp_path, limit=3, rules=Rules(min_side=301))


def test_what_a_person_deleted_does_not_count_and_does_not_come_back(server, tmp_path):
    serve(server, [picture(number) for number in range(3)])
    first = run(server, tmp_path, limit=3)
    unwanted = next(found for found in first if found.url == "https://h0.example/0.jpg")
    (tmp_path / "raw" / unwanted.file_name).unlink()
    serve(server, [picture(number) for number in range(3)] + [picture(0)])
    journal = run(server, tmp_path, limit=3, min_images=2)
    assert journal[-1].url == "https://h3.example/3.jpg"
    assert journal[-1].status == "duplicate"
    assert not (tmp_path / "raw" / unwanted.file_name).exists()
    assert sum(found.status == KEPT for found in journal) == 3


def test_a_near_duplicate_is_saved_and_does_not_count_whichever_comes_first(server, tmp_path):
    for name, sizes in {"better-last": [(300, 300), (600, 600)], "better-first": [(600, 600), (300, 300)]}.items():
        serve(server, [picture(1, size=size) for size in sizes])
        journal = run(server, tmp_path / name, limit=2)
        assert Counter(found.status for found in journal) == {KEPT: 1, "near-duplicate": 1}
        assert len(files(tmp_path / name / "raw")) == 2
        assert len(run(server, tmp_path / name, limit=2, rules=Rules(duplicate_distance=-1))) == 2


def test_a_file_in_the_place_of_the_folder_is_said(server, tmp_path):
    (tmp_path / "raw").write_text("")
    with pytest.raises(UsageError, match="expected a folder, got a file"):
        run(server, tmp_path)


KILLED = """
import socket, sys
from pathlib import Path
from minisd.prepare.collect import collect
from minisd.prepare.fetch import Fetcher
from minisd.prepare.options import Collect, Crawl

def connect(address, port, seconds):
    return socket.create_connection(("127.0.0.1", int(sys.argv[2])), seconds)

if __name__ == "__main__":
    collect(
        Collect(crawl=Crawl(query="8bit", limit=30), output=Path(sys.argv[1])),
        fetcher=Fetcher(resolve=lambda host: ["93.184.1.1"], connect=connect),
        search_url="http://www.bing.com/images/async",
        pause=lambda _: None,
    )
"""


@pytest.mark.parametrize("lines", [1, 12])
def test_kill_9_in_the_middle_then_again_nothing_lost_nothing_twice_nothing_torn_b16_k9(server, tmp_path, lines):
    links = [link.replace("https:", "http:") for link in serve(server, [picture(number) for number in range(35)])]
    server.on(SEARCH, bing(links, 12))
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), str(server.ports[80])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    journal = tmp_path / "raw" / NAME
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before, asked = read_journal(tmp_path / "raw"), server.hits.copy()
    assert lines <= len(before) < 30, "it was killed too late"

    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    after = read_journal(tmp_path / "raw")
    assert after[: len(before)] == before
    assert sum(found.status == KEPT for found in after) == 30
    assert files(tmp_path / "raw").keys() == {found.file_name for found in after}  # nor half a file
    wanted = {found.sha256: picture(int(Path(found.url).stem)) for found in after}
    assert files(tmp_path / "raw") == {found.file_name: wanted[found.sha256] for found in after}
    for found in before:
        address = found.url.removeprefix("http://")
        assert server.hits[address] == asked[address] == 1


def test_the_journal_is_what_its_readers_expect(world):
    lines = (world.raw / NAME).read_text("ascii").splitlines()
    assert len(lines) == len(world.cases)
    assert {frozenset(json.loads(line)) for line in lines} == {frozenset(vars(next(iter(world.journal.values()))))}
    assert urllib.request.urlopen.__module__ == "urllib.request"  # the controls have put it back
