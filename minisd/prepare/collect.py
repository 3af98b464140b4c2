"""Find pictures by keyword with Bing, and save them with where they are from.

RAW/<first 16 digits of sha256>.<suffix>, untouched, with a journal beside them (minisd/prepare/journal.py). The limit
is for the distinct pictures of one search: another search adds its own to the same folder, less those that are there.
Started again, a search goes on: nothing is fetched twice, but what could not be reached is tried once more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from minisd.atomic import delete, remove_leftovers, sync_folder
from minisd.errors import DataError, DiskError, NetworkError, UsageError, one_line
from minisd.picture_files import MAX_ASPECT, PictureError
from minisd.prepare.bing_search import BingSearch
from minisd.prepare.collected import Collected, is_settled
from minisd.prepare.downloads import Download, Downloads
from minisd.prepare.examine import Examined
from minisd.prepare.fetch import Fetcher, FetchError
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.journal import KEPT, Found, Journal, read_journal
from minisd.prepare.options import Collect, Crawl
from minisd.prepare.polite import CrawlOver, PoliteFetcher
from minisd.prepare.summary import counts, summary
from minisd.prepare.table import Picture

log = logging.getLogger(__name__)

SEARCH_URL = "https://www.bing.com/images/async"
_PARALLEL = 8
_SPARE = 2  # fetched beyond what is missing, for some will not do


def collect(
    options: Collect,
    *,
    fetcher: Fetcher | None = None,
    search_url: str = SEARCH_URL,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Search until there are as many pictures as wanted, and save them into OUTPUT/raw. OUTPUT's lock is the caller's.

    At most 3 x limit + 20 requests are made, and none after max_minutes.

    Args:
        options: what to search for, and where to.
        fetcher: through which all requests go; the default opens public web addresses only.
        search_url: of the search, without parameters.
        pause: sleeps so many seconds.

    Raises:
        NetworkError: the search cannot be reached, or refuses.
        DataError: fewer pictures than min_images were found; the journal is damaged.
        DiskError: a file cannot be written.
        UsageError: there is a file in the place of the folder.
    """
    crawl, raw = options.crawl, options.output / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output: {str(raw)!r}: expected a folder, got a file. Choose another name.") from error
    remove_leftovers(raw)
    found = read_journal(raw)
    collected = Collected(raw, found, crawl.query, options.rules)
    ended = ""
    if collected.kept < crawl.limit:
        known = {entry.url for entry in found if is_settled(entry, options.rules)}
        polite = PoliteFetcher(
            fetcher or Fetcher(), requests=3 * crawl.limit + 20, seconds=60 * crawl.max_minutes, pause=pause
        )
        try:
            ended = _Search(options, BingSearch(crawl, polite, search_url), collected, known).run(raw)
        finally:
            polite.stop()  # of those left behind, too
    _conclude(crawl, collected.kept, read_journal(raw), ended)


class _Search:
    """One search, from what is there to the limit."""

    def __init__(self, options: Collect, search: BingSearch, collected: Collected, known: set[str]) -> None:
        self._crawl, self._search, self._collected, self._known = options.crawl, search, collected, known
        # Sizes are judged here, so that they get into the journal, and other rules can be applied another time.
        self._rules = replace(options.rules, min_side=1, max_aspect=MAX_ASPECT)
        self._links = search.run()
        self._ended = ""

    def run(self, raw: Path) -> str:
        """Save pictures; returns why there are fewer than wanted, or "" if that is not so."""
        bar = tqdm(total=self._crawl.limit, initial=self._collected.kept, desc="collect", unit="picture", disable=None)
        with (
            bar,
            Journal(raw) as journal,
            GuardedPool() as pool,
            Downloads(self._search, pool, raw, self._rules) as downloads,
        ):
            while self._missing > 0 and self._fill(downloads):
                download = downloads.next()
                if isinstance(download.outcome, CrawlOver):
                    self._ended = str(download.outcome)
                    continue
                found = self._judged(download)
                _settle(raw, download.staged, found)
                journal.append(found)
                bar.update(self._collected.kept - bar.n)
        return self._ended if self._missing > 0 else ""

    @property
    def _missing(self) -> int:
        return self._crawl.limit - self._collected.kept

    def _fill(self, downloads: Downloads) -> bool:
        """Start as many downloads as are of use; False if there is nothing left to wait for."""
        while not self._ended and downloads.in_flight < min(_PARALLEL, self._missing + _SPARE):
            if downloads.in_flight and not self._search.left:
                break  # what is on its way may be enough, so that no other page is needed
            try:
                link = next(self._links, None)
            except NetworkError as error:
                if not self._search.results and not isinstance(error, CrawlOver):
                    raise  # there is no search at all
                self._ended = str(error).rstrip(".")
                break
            if link is None:
                self._ended = self._search.ended
            elif link not in self._known:
                downloads.start(link)
        return downloads.in_flight > 0

    def _judged(self, download: Download) -> Found:
        """What came of a download. Raises what is no fault of the picture."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found = Found(url=download.link, query=self._crawl.query, fetched_at=now, status="")
        outcome = download.outcome
        if isinstance(outcome, FetchError | PictureError):
            return replace(found, status=outcome.status, reason=outcome.reason)
        if isinstance(outcome, OSError):
            raise DiskError(
                f"{download.staged.parent}: cannot be written: {outcome.strerror}. Free some space or choose another "
                "--output."
            ) from outcome
        if not isinstance(outcome, Examined):
            raise outcome
        name = f"{outcome.sha256[:16]}{outcome.suffix}"
        status, reason = self._collected.add(outcome, name)
        return replace(
            found,
            status=status,
            reason=reason,
            file_name=name if status in (KEPT, "near-duplicate") else "",
            sha256=outcome.sha256,
            width=outcome.width,
            height=outcome.height,
            dhash=outcome.dhash,
            size_bytes=outcome.size_bytes,
        )


def _settle(raw: Path, staged: Path, found: Found) -> None:
    """Give a fetched file its name, or delete it."""
    if not found.file_name:
        delete(staged)
        return
    try:
        staged.rename(raw / found.file_name)
        sync_folder(raw)
    except OSError as error:
        delete(staged)
        raise DiskError(
            f"{raw / found.file_name}: cannot be written: {error.strerror}. Free some space or choose another --output."
        ) from error


def _conclude(crawl: Crawl, kept: int, found: list[Found], ended: str) -> None:
    """Say how it ended, and fail if there is too little."""
    left_out = [
        Picture(status=entry.status, reason=entry.reason)
        for entry in found
        if entry.query == crawl.query and entry.status != KEPT
    ]
    if kept < crawl.min_images:
        raise DataError(
            f"{kept} of {crawl.limit} pictures for {crawl.query!r}, expected at least {crawl.min_images} "
            f"(--min-images): {ended}. Left out: {counts(left_out) or 'none'}. Try other words or a smaller --min-side."
        )
    log.info("%s", summary(kept, left_out, crawl.limit))
    if kept < crawl.limit:
        log.warning("%d of %d pictures: %s", kept, crawl.limit, one_line(ended))
