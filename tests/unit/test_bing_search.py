"""The adapter of bing-image-downloader, page by page; B2, B9, B12-B14, B19 and K7 of the catalogue of faults.

A test of a fault of the package shows it with the package alone, too: else it would prove nothing.
"""

import inspect
import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from minisd.errors import NetworkError
from minisd.prepare import bing_search
from minisd.prepare.bing_search import BingSearch, links_on
from minisd.prepare.fetch import Limits
from minisd.prepare.options import Crawl, parse_options
from minisd.prepare.polite import CrawlOver, PoliteFetcher
from tests.bing_pages import BING, SEARCH, bing, lead_the_package_to, package_alone, page, picture
from tests.hostile_server import FakeInternet, HostileServer, body, in_turn, stalled, status

ROOT = Path(__file__).resolve().parent.parent.parent
LINKS = [f"https://h{number}.example/{number}.jpg" for number in range(10)]


@pytest.fixture
def server():
    with HostileServer() as server:
        yield server


class Searching:
    """A search of `server`, whose pauses take no time."""

    def __init__(self, server, *, requests=100, **crawl):
        self.pauses = []
        polite = PoliteFetcher(FakeInternet(server).fetcher(), requests=requests, seconds=60, pause=self.pauses.append)
        self.search = BingSearch(Crawl(query="8bit", **crawl), polite, f"https://{SEARCH}")

    @property
    def back_off(self):
        return [pause for pause in self.pauses if pause == round(pause)]


def offsets(server):
    return [int(request.partition("first=")[2].partition("&")[0]) for request in server.requests if SEARCH in request]


def test_b2_a_bing_py_in_the_current_folder_is_not_run(tmp_path):
    (tmp_path / "bing.py").write_text("print('the stranger runs'); Bing = None")

    def output_of(code):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert output_of("import bing_image_downloader") == "the stranger runs\n"  # the control
    own = "import sys, minisd.prepare.bing_search; print('bing' in sys.modules); import bing"
    assert output_of(own) == "False\nthe stranger runs\n"  # who wants that module has it still


def test_the_next_page_begins_after_the_results_that_were_seen_b9(server, monkeypatch, tmp_path):
    server.on(SEARCH, bing(LINKS, per_page=4))
    searching = Searching(server)
    assert list(searching.search.run()) == LINKS
    assert list(dict.fromkeys(offsets(server))) == [0, 4, 8, 10]
    assert searching.search.ended == "Bing has no more results"

    server.requests.clear()
    for number, link in enumerate(LINKS):
        server.on(link.removeprefix("https://"), body(picture(number)))
    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 10, tmp_path)
    assert offsets(server)[:3] == [0, 1, 2]


def test_results_that_only_repeat_end_the_search(server):
    server.on(SEARCH, body(page(LINKS)))
    searching = Searching(server)
    assert list(searching.search.run()) == LINKS
    assert searching.search.ended == "Bing only repeats its results"
    assert offsets(server) == [0, 10, 20]


def test_a_page_that_repeats_is_passed_over(server):
    server.on(SEARCH, in_turn(body(page(LINKS[:3])), body(page(LINKS[:3])), body(page(LINKS)), body(b" ")))
    assert list(Searching(server).search.run()) == LINKS


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_search_is_asked_again_after_pauses_on_any_page_b12(server, monkeypatch, tmp_path, code):
    pages = [body(page(LINKS[:5])), body(page(LINKS[5:])), status(200)]
    server.on(SEARCH, in_turn(status(code), status(code), pages[0], status(code), *pages[1:]))
    searching = Searching(server)
    assert list(searching.search.run()) == LINKS
    assert searching.back_off[:3] == [1, 2, 1]

    server.on(SEARCH, in_turn(status(code), pages[0]))
    lead_the_package_to(server, monkeypatch)
    with pytest.raises(urllib.error.HTTPError):
        package_alone("8bit", 10, tmp_path)


def test_a_search_that_stays_busy_is_one_line_after_few_requests(server):
    server.on(SEARCH, status(429))
    searching = Searching(server)
    with pytest.raises(NetworkError, match=r"the search at https://www.bing.com/images/async failed: HTTP status 429"):
        list(searching.search.run())
    assert (len(server.requests), searching.back_off) == (3, [1, 2])


def test_a_byte_that_is_no_utf8_costs_nothing_b12(server, monkeypatch, tmp_path):
    server.on(SEARCH, in_turn(body(b"\xff\xfe" + page(LINKS) + b"\x80"), status(200)))
    assert list(Searching(server).search.run()) == LINKS

    server.on(SEARCH, body(page(LINKS) + b"\x80"))
    lead_the_package_to(server, monkeypatch)
    with pytest.raises(UnicodeDecodeError):
        package_alone("8bit", 10, tmp_path)


PAGES_FOR_PEOPLE = [
    b"<html><body>One last step. Please solve the CAPTCHA challenge to continue.</body></html>",
    b"<html><div id='bnp_container'>We and our vendors ask for your consent</div></html>",
    b"<html>Our systems have detected unusual traffic from your network.</html>",
]


@pytest.mark.parametrize("content", PAGES_FOR_PEOPLE)
def test_a_captcha_or_consent_page_is_said_to_be_one_b13(server, monkeypatch, tmp_path, content):
    server.on(SEARCH, body(content, "text/html"))
    searching = Searching(server)
    with pytest.raises(NetworkError, match="a page for people"):
        list(searching.search.run())
    assert (len(server.requests), searching.back_off) == (3, [2, 4])

    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 10, tmp_path)  # as if all were well
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"  \n", b"<html><ul></ul></html>", b'<a m="{&quot;picture&quot;:1}">', b"\0"]
)
def test_an_empty_page_or_one_made_differently_is_asked_for_again_and_then_said_k7(server, content):
    server.on(SEARCH, body(content, "text/html"))
    searching = Searching(server)
    assert list(searching.search.run()) == []
    assert "shows no pictures" in searching.search.ended
    assert len(server.requests) == 3

    server.on(SEARCH, in_turn(body(content, "text/html"), bing(LINKS)))  # it was a hiccup
    assert list(Searching(server).search.run()) == LINKS


def test_addresses_are_as_they_were_before_json_and_html_escaped_them_b14(server, monkeypatch, tmp_path):
    links = [
        "https://a.example/x?a=1&b=2",
        'https://a.example/"quoted"',
        "https://a.example/\\",
        "https://a.example/\xe9",
    ]
    assert links_on(page(links).decode()) == links
    by_json = json.dumps({"murl": "https://a.example/x?a=1&b=2"}).replace("&", "\\u0026").replace('"', "&quot;")
    assert links_on(by_json) == links[:1]
    assert links_on('{"murl": "https://a.example/x?a=1\\u0026b=2"}') == links[:1]  # without entities, with a space
    assert links_on('"murl":"half') == links_on('"murl":"\\u12"') == []

    server.on(SEARCH, body(by_json.replace(" ", "").encode()))
    server.on("a.example/x", body(picture(1)))
    lead_the_package_to(server, monkeypatch)
    package_alone("8bit", 1, tmp_path)
    assert "a.example/x?a=1%5Cu0026b=2" in server.requests


def test_adult_pictures_are_left_out_unless_asked_for_and_filters_are_bings_own_b11(server):
    server.on(SEARCH, bing(LINKS))
    next(Searching(server).search.run())
    next(Searching(server, safe_search=False, filter="line").search.run())
    assert "adlt=strict&qft=" in server.requests[0]
    assert server.requests[1].endswith("adlt=off&qft=%2Bfilterui%3Aphoto-linedrawing")
    from bing_image_downloader import download

    assert inspect.signature(download).parameters["adult_filter_off"].default is True


@pytest.mark.parametrize("option", ["--limit=0", "--limit=-5", "--limit=true", "--filter=nonsense", "--query= "])
def test_options_that_cannot_be_carried_out_are_refused_b19(option, capsys):
    with pytest.raises(SystemExit) as ending:
        parse_options(["collect", "--query", "8bit", "--output", "somewhere", option])
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith("minisd: error E-USAGE: ")
    alone = BING("8bit", True, Path(), "off", 0, "nonsense", False)  # asserts, which -O removes, let this pass
    assert alone.get_filter(alone.filter) == ""


def test_a_search_page_is_bounded_in_size_and_requests_in_number(server):
    server.on(SEARCH, body(b"x" * (9 * 2**20)))
    with pytest.raises(NetworkError, match="more than 8388608 bytes"):
        list(Searching(server).search.run())
    server.on(SEARCH, lambda handler: handler.send(page([f"https://a.example/{handler.query['first'][0]}.jpg"])))
    with pytest.raises(CrawlOver, match="7 requests"):
        list(Searching(server, requests=7).search.run())


def test_a_search_page_that_never_comes_ends_in_time(server, monkeypatch):
    monkeypatch.setattr(bing_search, "_PAGE", Limits(seconds=0.3))
    server.on(SEARCH, stalled())
    with pytest.raises(NetworkError, match=r"took more than 0\.3 s"):
        list(Searching(server).search.run())
