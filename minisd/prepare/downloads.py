"""Pictures that are fetched and examined in the background, several at once."""

from __future__ import annotations

import itertools
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from minisd.atomic import delete, staging_name
from minisd.prepare.bing_search import BingSearch
from minisd.prepare.examine import Examined, examine
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Rules

_numbers = itertools.count(1)  # of this process: a download that was left behind may still be writing


@dataclass(frozen=True)
class Download:
    """What came of one address: what is known of the picture, or why there is none."""

    link: str
    staged: Path
    """The file, if there is one."""
    outcome: Examined | Exception


class Downloads:
    """The downloads of a crawl, in a `with`: at its end those that go on are left behind, and leave no file.

    Their threads are not waited for, not even when Python ends: one may hang on a slow host for half a minute.

    Args:
        search: whose save_image fetches.
        pool: in which what was fetched is examined.
        raw: the folder for the files.
        rules: for examine.
    """

    def __init__(self, search: BingSearch, pool: GuardedPool, raw: Path, rules: Rules) -> None:
        self._search, self._pool, self._raw, self._rules = search, pool, raw, rules
        self._done: queue.SimpleQueue[Download] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self.in_flight = 0

    def start(self, link: str) -> None:
        """Begin with an address."""
        self.in_flight += 1
        staged = staging_name(self._raw / f"{next(_numbers)}")
        threading.Thread(target=self._run, args=(link, staged), name="download", daemon=True).start()

    def next(self) -> Download:
        """Wait for the download that is done next. Its file is the caller's then."""
        download = self._done.get()
        self.in_flight -= 1
        return download

    def __enter__(self) -> Downloads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._closed = True
        while not self._done.empty():
            delete(self._done.get().staged)

    def _run(self, link: str, staged: Path) -> None:
        outcome: Examined | Exception
        try:
            self._search.save_image(link, staged)
            outcome = self._pool.submit(examine, staged, self._rules).result()
        except Exception as error:
            delete(staged)
            outcome = error
        with self._lock:
            if self._closed:
                delete(staged)
            else:
                self._done.put(Download(link, staged, outcome))
