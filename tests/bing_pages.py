"""A Bing that gives what a test wants, and pictures to find with it."""

from __future__ import annotations

import html
import io
import json
import random
import urllib.request
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from PIL import Image

from minisd.prepare.bing_search import BingSearch
from tests.hostile_server import Handler, HostileServer

BING = BingSearch.__mro__[1]  # of the package
SEARCH = "www.bing.com/images/async"


def page(links: Sequence[str]) -> bytes:
    """A page of results as Bing makes it: JSON in an attribute of HTML, beside markup without a meaning for us."""
    results = [json.dumps({"sid": "", "murl": link, "t": "a title"}, separators=(",", ":")) for link in links]
    anchors = [f'<li><a class="iusc" href="/images/search?view=detail" m="{html.escape(one)}"></a>' for one in results]
    return f"<html><ul>{''.join(anchors)}</ul>".encode()


def bing(links: Sequence[str], per_page: int = 35) -> Callable[[Handler], None]:
    """Pages of so many results, from the offset that is asked for; empty after the last."""

    def answer(handler: Handler) -> None:
        first = int(handler.query["first"][0])
        found = links[first : first + per_page]
        handler.send(page(found) if found else b"", {"Content-Type": "text/html"})

    return answer


@cache
def picture(seed: int, size: tuple[int, int] = (320, 300), kind: str = "JPEG") -> bytes:
    """A picture file that looks like no other, and the same in other sizes and formats."""
    colours = Image.frombytes("RGB", (9, 9), random.Random(seed).randbytes(9 * 9 * 3))
    data = io.BytesIO()
    colours.resize(size, Image.Resampling.BICUBIC).save(data, kind)
    return data.getvalue()


def lead_the_package_to(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bing-image-downloader as it is, not the adapter, see `server` wherever it goes on the web.

    Only the address is changed: the rest of urllib is the real one.
    """
    real = urllib.request.urlopen

    def urlopen(request: urllib.request.Request, timeout: float) -> object:
        parts = urlsplit(request.full_url)
        if parts.scheme in ("http", "https") and parts.hostname != "127.0.0.1":
            loopback = urlunsplit(("http", f"127.0.0.1:{server.ports[80]}", parts.path, parts.query, ""))
            headers = {name: value for name, value in request.header_items() if name != "Host"}
            request = urllib.request.Request(loopback, headers=headers)
            request.add_unredirected_header("Host", parts.netloc)
        return real(request, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def package_alone(query: str, limit: int, folder: Path, *, timeout: int = 10) -> None:
    """What the package's own `download` does, less its folders: the control that shows each fault to be real."""
    BING(query, limit, folder, "off", timeout, "", False).run()
