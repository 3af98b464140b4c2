"""The manners of a crawl: how many requests, for how long, how often to one host, and when to ask once more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from minisd.errors import NetworkError
from minisd.prepare.addresses import AddressError, check_url
from minisd.prepare.fetch import Fetcher, FetchError, Limits, Response

_HOST_DELAY = 0.5  # seconds between two requests to a host
_PATIENCE = 60.0  # seconds: a host that wants to be left alone for longer is


class CrawlOver(NetworkError):  # noqa: N818 (it ends the crawl, and is no failure of it)
    """The crawl has had all the requests or all the time it may have. The message says which, without a full stop."""


class PoliteFetcher:
    """A Fetcher for a whole crawl. May be used by several threads.

    Args:
        fetcher: what fetches.
        requests: how many may be made, repeated ones and pages of the search among them; a redirect counts as one with
            what led to it.
        seconds: from now on.
        pause: sleeps so many seconds.
    """

    def __init__(self, fetcher: Fetcher, *, requests: int, seconds: float, pause: Callable[[float], None]) -> None:
        self._fetcher, self._pause = fetcher, pause
        self._requests, self._left = requests, requests
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def fetch(self, url: str, limits: Limits, *, accept: str, attempts: int) -> Response:
        """Fetch a file, and ask again after a pause where that may help: 1, 2, 4 ... seconds, or as the host asks.

        Args:
            url: as it was found.
            limits: what the file may cost; `seconds` is for all attempts together, without the pauses.
            accept: the media types wanted.
            attempts: how often it is asked for at most.

        Raises:
            FetchError: of the last attempt.
            CrawlOver: the crawl ends before that.
        """
        left = limits.seconds
        for attempt in range(attempts):
            began = self._turn(url)
            try:
                allowed = max(0.0, min(left, self._end - began))
                return self._fetcher.fetch(url, replace(limits, seconds=allowed), accept=accept)
            except FetchError as error:
                left -= time.monotonic() - began
                self._heed(url, error.retry_after)
                wait = max(2.0**attempt, error.retry_after or 0.0)
                if not error.again or attempt + 1 == attempts or left <= 0 or wait > _PATIENCE:
                    raise
            self.wait(wait)
        raise AssertionError("attempts must be at least 1")

    def wait(self, seconds: float) -> None:
        """Sleep. Raises CrawlOver if the crawl would be over by then."""
        if time.monotonic() + seconds > self._end:
            raise CrawlOver(f"the time is up ({self._seconds / 60:g} minutes)")
        self._pause(seconds)

    def _heed(self, url: str, retry_after: float | None) -> None:
        """Leave a host alone, in all threads, for as long as it asks, if that is not too long."""
        if retry_after is not None and retry_after <= _PATIENCE:
            with self._lock:
                host = check_url(url).host
                self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + retry_after)

    def stop(self) -> None:
        """Make no more requests: each call ends with CrawlOver from now on."""
        with self._lock:
            self._left = 0

    def _turn(self, url: str) -> float:
        """Count a request, and wait until the host may have it; the time by the clock then."""
        try:
            host = check_url(url).host
        except AddressError:
            return time.monotonic()  # there will be no request: the fetcher says why
        with self._lock:
            if self._left <= 0:
                raise CrawlOver(f"{self._requests} requests were made, which is the limit")
            self._left -= 1
            now = time.monotonic()
            start = max(now, self._next.get(host, 0.0))
            self._next[host] = start + _HOST_DELAY
        if start > now:
            self.wait(start - now)
        if time.monotonic() >= self._end:
            self.wait(0)
        return time.monotonic()
