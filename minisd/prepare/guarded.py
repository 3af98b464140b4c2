"""Processes that read pictures, so that one that crashes, hangs or fills the memory costs that picture and no more.

Decoders are written in C and get files from anywhere. What is asked of such a process must be a function of a module,
and its arguments and its result plain data, for they travel through a pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool
from PIL import AvifImagePlugin

from minisd.errors import MinisdError
from minisd.picture_files import PictureError

T = TypeVar("T")
Item = TypeVar("Item")

SECONDS = 20.0
# A worker begins with some 50 MiB, and ends below 600: enough for a photo of MAX_PIXELS.
_MORE_BYTES = 544 * 2**20
_ENDED = "the processes that read pictures were ended by somebody else. Run the same command again to go on."
_IN_FLIGHT = 4  # of map, for each worker: enough that none waits


class GuardedPool:
    """A pool of such processes, for a `with` statement. It may be used by several threads.

    Args:
        workers: how many there are; by default one for each processor, at most 8.
        seconds: how long one item may take.
    """

    def __init__(self, workers: int | None = None, *, seconds: float = SECONDS) -> None:
        self._workers = workers or min(os.cpu_count() or 1, 8)
        self._seconds = seconds
        self._pending: set[Future[Any]] = set()
        # Neither fork, which copies locks that other threads hold, nor spawn, which starts Python anew each time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["minisd.prepare.examine"])
        self._pool = ProcessPool(self._workers, initializer=_prepare_worker, context=context)

    def __enter__(self) -> GuardedPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pool.close()
        else:
            for future in list(self._pending):
                future.cancel()  # a thread may be waiting for it
            self._pool.stop()
        self._pool.join()

    def submit(self, function: Callable[..., T], *args: object) -> Future[T]:
        """Have a function called in a worker.

        Returns:
            A future with what it returns or raises: a PictureError if it took too long or crashed ("damaged"), or
            needed too much memory ("too large"). Cancelled if the pool is left by an exception before.

        Raises:
            MinisdError: the workers were ended by somebody else.
        """
        future: Future[T] = Future()
        try:
            inner = self._pool.schedule(_bounded, args=(function, args, self._seconds), timeout=self._seconds)
        except RuntimeError as error:
            raise MinisdError(_ENDED) from error
        self._pending.add(future)
        inner.add_done_callback(partial(self._finish, future))
        return future

    def map(self, function: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T | PictureError]:
        """Call a function with each item; the results come in the order of the items, a refused picture's error too.

        A few items are looked at ahead, so neither items nor results need be in memory all at once. Other errors than a
        PictureError are raised.
        """
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(self.submit(function, item))
            if len(waiting) >= _IN_FLIGHT * self._workers:
                result = _result(waiting.popleft())
                yield result
        for future in waiting:
            result = _result(future)
            yield result

    def _finish(self, future: Future[T], inner: Future[T]) -> None:
        """Hand a result on, in a thread of the pool."""
        self._pending.discard(future)
        if not future.set_running_or_notify_cancel():
            return
        error = inner.exception()
        if error is None:
            future.set_result(inner.result())
        else:
            future.set_exception(self._explained(error))

    def _explained(self, error: BaseException) -> BaseException:
        """What a failure means for the picture, if it is one of the worker."""
        by_timer = isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGALRM
        if by_timer or isinstance(error, TimeoutError):
            return PictureError("damaged", f"took more than {self._seconds:g} s to decode")
        if isinstance(error, MemoryError):
            return PictureError("too large", "needs more memory than a picture may")
        if isinstance(error, BrokenProcessPool):
            return MinisdError(_ENDED)
        if isinstance(error, ProcessExpired):
            return PictureError("damaged", "the decoder crashed")
        return error


def _result(future: Future[T]) -> T | PictureError:
    try:
        return future.result()
    except PictureError as error:
        return error


def _bounded(function: Callable[..., T], args: tuple[object, ...], seconds: float) -> T:
    """Call a function, and end with it if it takes too long: the pool would see to that, if it had not been killed."""
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        return function(*args)
    except PictureError as error:
        refusal = error.args
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise PictureError(*refusal)  # a new one: the pool keeps the last, whose traceback keeps the picture in memory


def _prepare_worker() -> None:
    """Hold a new worker to its limits."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff would print there; what matters comes back as an exception
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # on a large machine the stacks of its threads alone would be too much
    pages = Path("/proc/self/statm")
    if pages.exists():  # on Linux
        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
