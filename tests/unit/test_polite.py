"""The manners of a crawl: minisd/prepare/polite.py."""

import time

import pytest

from minisd.prepare.fetch import FetchError, Limits, Response
from minisd.prepare.polite import CrawlOver, PoliteFetcher


class Scripted:
    """A fetcher that fails as told, then answers."""

    def __init__(self, *failures, takes=0.0):
        self.failures, self.takes = list(failures), takes
        self.asked, self.allowed = [], []

    def fetch(self, url, limits, *, accept):
        self.asked.append(url)
        self.allowed.append(limits.seconds)
        time.sleep(self.takes)
        if self.failures:
            raise self.failures.pop(0)
        return Response(url, 200, {}, b"picture")


def busy(retry_after=None):
    return FetchError(
        "https://a.example/1.jpg", "HTTP status 429", status="unreachable", again=True, retry_after=retry_after
    )


def polite(fetcher, *, requests=100, seconds=600.0):
    pauses = []
    return PoliteFetcher(fetcher, requests=requests, seconds=seconds, pause=pauses.append), pauses


def get(fetcher, url="https://a.example/1.jpg", attempts=4, seconds=30.0):
    return fetcher.fetch(url, Limits(seconds=seconds), accept="image/*", attempts=attempts)


def asked_pauses(pauses):
    """Those of the back-off: not those between two requests to a host, which are no whole numbers here."""
    return [pause for pause in pauses if pause == round(pause)]


def test_a_busy_host_is_asked_again_after_longer_and_longer_pauses():
    scripted = Scripted(busy(), busy(), busy())
    fetcher, pauses = polite(scripted)
    assert get(fetcher).body == b"picture"
    assert asked_pauses(pauses) == [1, 2, 4]
    assert len(scripted.asked) == 4


def test_a_host_says_when_it_may_be_asked_again_and_is_left_alone_if_that_is_late():
    fetcher, pauses = polite(Scripted(busy(retry_after=7.0)))
    get(fetcher)
    assert asked_pauses(pauses) == [7]
    scripted = Scripted(busy(retry_after=3600.0))
    fetcher, pauses = polite(scripted)
    with pytest.raises(FetchError, match="429"):
        get(fetcher)
    assert (len(scripted.asked), pauses) == (1, [])


def test_attempts_end_with_their_number_with_the_time_of_the_file_and_where_they_are_of_no_use():
    scripted = Scripted(*[busy() for _ in range(9)])
    with pytest.raises(FetchError):
        get(polite(scripted)[0], attempts=3)
    assert len(scripted.asked) == 3

    slow = Scripted(*[busy() for _ in range(9)], takes=0.06)
    with pytest.raises(FetchError):
        get(polite(slow)[0], attempts=9, seconds=0.1)
    assert len(slow.asked) == 2
    assert slow.allowed[0] == 0.1
    assert slow.allowed[1] < 0.05

    gone = Scripted(FetchError("https://a.example/1.jpg", "HTTP status 404", status="unreachable"))
    with pytest.raises(FetchError):
        get(polite(gone)[0])
    assert len(gone.asked) == 1


def test_requests_to_one_host_have_half_a_second_between_them_and_those_to_others_none():
    fetcher, pauses = polite(Scripted())
    for path in "abcd":
        get(fetcher, f"https://one.example/{path}")
    # The clock does not move on while the test pauses, so each waits for all before it.
    assert pauses == pytest.approx([0.5, 1.0, 1.5], abs=0.1)
    pauses.clear()
    for host in "abcd":
        get(fetcher, f"https://{host}.example/")
    assert pauses == []


def test_requests_are_counted_with_their_repetitions_and_refused_addresses_are_none():
    scripted = Scripted(busy())
    fetcher, _ = polite(scripted, requests=3)
    get(fetcher, "https://a.example/")
    for _ in range(5):
        get(fetcher, "file:///etc/passwd")  # Scripted answers; a Fetcher refuses
    get(fetcher, "https://b.example/")
    with pytest.raises(CrawlOver, match="3 requests were made"):
        get(fetcher, "https://c.example/")
    assert sum(url.startswith("https:") for url in scripted.asked) == 3


def test_nothing_is_fetched_and_no_pause_begins_that_would_end_after_the_time_of_the_crawl():
    scripted = Scripted(busy())
    fetcher, pauses = polite(scripted, seconds=0.5)
    with pytest.raises(CrawlOver, match="the time is up"):
        get(fetcher)
    assert pauses == []
    assert scripted.allowed[0] <= 0.5
    time.sleep(0.5)
    with pytest.raises(CrawlOver, match="the time is up"):
        get(fetcher, "https://b.example/")
    assert len(scripted.asked) == 1


def test_after_stop_nothing_is_fetched():
    scripted = Scripted()
    fetcher, _ = polite(scripted)
    fetcher.stop()
    with pytest.raises(CrawlOver):
        get(fetcher)
    assert scripted.asked == []
