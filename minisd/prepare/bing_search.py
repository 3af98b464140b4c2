"""The search of bing-image-downloader, held to what a crawl needs.

Of the package (1.1.3) the parameters of the search and the table of filters are used. What it does over the network and
to the disk is replaced: as it is, it reads file: addresses and those of the local network, knows no limit of size or
time, and pages by one result. Its `download` is never called: with some queries it deletes the whole output folder.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from minisd.atomic import write_synced
from minisd.errors import NetworkError
from minisd.prepare.fetch import FetchError, Limits
from minisd.prepare.options import Crawl
from minisd.prepare.polite import PoliteFetcher

_COUNT = 100  # results asked for at once; Bing gives fewer as it likes
_ATTEMPTS = 3
_BARREN_PAGES = 2  # in a row, with nothing new on them
_PAGE = Limits(max_bytes=8 * 2**20)
_PICTURE = Limits()
_NO_CONTENT = "no content"  # FetchError.reason for an answer without a body
# A result has its picture's address as a string of JSON, in an attribute of HTML.
_LINK = re.compile(r'"murl"\s*:\s*("(?:[^"\\]|\\.)*+")', re.DOTALL)
_BLOCKED = re.compile("captcha|your consent|consent form|unusual traffic|not a robot|you are (a )?human", re.IGNORECASE)
# A header of the picture's server. Whichever robot it is meant for: its maker has spoken.
_NO_AI = re.compile(r"\bno(image)?ai\b", re.IGNORECASE)


def _bing() -> Any:
    """The package's class.

    The package looks for a module "bing" before its own, so a bing.py in the current folder would be run and used. None
    in sys.modules is how Python is told that there is no such module.
    """
    elsewhere = {name: module for name, module in sys.modules.items() if name == "bing"}
    sys.modules["bing"] = None  # type: ignore[assignment]
    try:
        from bing_image_downloader import bing, downloader
    finally:
        del sys.modules["bing"]
        sys.modules.update(elsewhere)
    assert downloader.Bing is bing.Bing, "somebody imported the package without this guard"
    assert bing.Bing.__module__ == "bing_image_downloader.bing"
    return bing.Bing


class BingSearch(_bing()):  # type: ignore[misc]
    """A search for pictures.

    Args:
        crawl: what is searched for.
        fetcher: through which all requests go.
        address: of the search, without parameters.

    Attributes:
        results: how many were seen, repeated ones among them; where the next page begins.
        left: how many more addresses there are before the next page is asked for.
        ended: why there are no more, as words for a sentence; "" before that.
    """

    def __init__(self, crawl: Crawl, fetcher: PoliteFetcher, address: str) -> None:
        adult = "strict" if crawl.safe_search else "off"
        super().__init__(crawl.query, crawl.limit, None, adult, 30, crawl.filter or "", verbose=False)
        self.fetcher, self.address = fetcher, address
        self.results, self.left, self.ended = 0, 0, ""

    def run(self) -> Iterator[str]:
        """Yield the addresses of pictures, each once, page after page, as they are asked for.

        Raises:
            NetworkError: a page cannot be fetched, or is one that wants a person: a captcha, a consent form.
            CrawlOver: the crawl has had its requests or its time.
        """
        barren = 0
        while barren < _BARREN_PAGES:
            links = self._page()
            if not links:
                nothing = "Bing's page shows no pictures: there are none for these words, or its pages have changed"
                self.ended = "Bing has no more results" if self.results else nothing
                return
            self.results += len(links)
            new = [link for link in dict.fromkeys(links) if link not in self.seen]
            self.seen.update(new)
            barren = 0 if new else barren + 1
            for self.left in reversed(range(len(new))):
                yield new[-1 - self.left]
        self.ended = "Bing only repeats its results"

    def save_image(self, link: str, file_path: Path) -> None:
        """Fetch what is said to be a picture into a file, as it is, whatever it is.

        Raises:
            FetchError: it cannot be had, or its server says that it is not for AI ("refused").
            CrawlOver: the crawl has had its requests or its time.
            OSError: the file cannot be written.
        """
        response = self.fetcher.fetch(link, _PICTURE, accept="image/*", attempts=_ATTEMPTS)
        if _NO_AI.search(response.headers.get("x-robots-tag", "")):
            raise FetchError(link, "its server says that it is not for AI (X-Robots-Tag)", status="refused")
        write_synced(file_path, response.body)

    def _page(self) -> list[str]:
        """The addresses on the next page. One without any is asked for again: it may be a page for a crowd."""
        parameters = {
            "q": self.query,
            "first": self.results,
            "count": _COUNT,
            "adlt": self.adult,
            "qft": self.get_filter(self.filter),
        }
        url = f"{self.address}?{urlencode(parameters, errors='replace')}"
        for attempt in range(_ATTEMPTS):
            if attempt:
                self.fetcher.wait(2.0**attempt)
            page = self._text(url)
            if links := links_on(page):
                return links
        if _BLOCKED.search(page.replace(html.escape(self.query), "")):  # which the page repeats
            raise NetworkError(
                "Bing answers with a page for people (a captcha or a consent form). Try again later, or from another "
                "network; the same command goes on."
            )
        return []

    def _text(self, url: str) -> str:
        """A page of the search."""
        try:
            response = self.fetcher.fetch(url, _PAGE, accept="text/html", attempts=_ATTEMPTS)
        except FetchError as error:
            if error.reason == _NO_CONTENT:
                return ""
            raise NetworkError(
                f"the search at {self.address} failed: {error.reason}. Check the connection and try again later: the "
                "same command goes on. Without a network: --from FOLDER, with pictures of your own."
            ) from error
        return response.body.decode("utf-8", "replace")


def links_on(page: str) -> list[str]:
    """The addresses of pictures on a page of results, in order, as they were before JSON and HTML escaped them."""
    links = []
    for text in _LINK.findall(html.unescape(page)):
        try:
            links.append(json.loads(text, strict=False).strip())
        except ValueError:  # a bad escape: no address can be made of it
            continue
    return links
