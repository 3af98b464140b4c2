"""How a run is asked to stop: signals, and the end of the torchrun that started it.

Before the loop there is nothing to save, and a signal ends the program at once. In the loop it only leaves a mark,
which the loop reads between two steps, on all ranks together, and saves. This file is imported before torch, whose
import takes seconds: a rank that died of a signal in them would leave the others waiting.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO, cast

from minisd.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 5.0  # seconds that the start of a run has to attend to a signal
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class _Heedless:
    """A stream whose reader may leave: `| head`, or a terminal that is closed, must not end a run of hours."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StopRequest:
    """Whether this process has been asked to stop. One that was never installed never is."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._parent: int | None = None  # known where its end is ours
        self._reason: str | None = None
        self._interrupted = False
        self._raising = False
        self._deferred = False
        self._looping = False  # has been deferred at least once

    def install(self) -> None:
        """Take over SIGTERM, SIGINT, SIGHUP and SIGUSR1: from here they end the process, with 75 or 130.

        Once, in the main thread, before anything slow.
        """
        self._pid = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does: a closed pipe is an OSError ...
        sys.stdout = cast(TextIO, _Heedless(sys.stdout))  # ... and not even that for what is only said
        sys.stderr = cast(TextIO, _Heedless(sys.stderr))
        self._watch()
        if "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ:
            self._parent = os.getppid()
            _ask_for_sigterm_at_the_end_of_the_parent()
            if os.getppid() != self._parent:  # it ended before the kernel knew that we want to hear of it
                self._end("torchrun is gone")

    @contextmanager
    def raising(self) -> Iterator[None]:
        """The imports are done and `run_script` is there to report: a signal raises Stopped.

        Afterwards only SIGINT is heard: what has ended, well or badly, is not to end with another code.
        """
        self._raising = True
        try:
            yield
        finally:
            self._raising = False
            for number in {*SIGNALS} - {signal.SIGINT} if self._pid is not None else ():
                signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The loop: a signal only sets `requested`. A second SIGINT ends the process there and then, with 130."""
        self._deferred = self._looping = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def requested(self) -> bool:
        """Whether to stop: a signal came, or the torchrun that started us is gone, and with it who would restart us."""
        if self._reason is None and self._orphaned():
            self._reason = "torchrun is gone"
        return self._reason is not None

    @property
    def reason(self) -> str:
        """Who asked: "SIGTERM", "torchrun is gone" ...; "" if nobody did."""
        if self._reason == "SIGTERM" and self._orphaned():
            return "torchrun is gone"  # the kernel may send our SIGTERM a moment before it gives us another parent
        return self._reason or ""

    def check(self) -> None:
        """Raise Stopped if it is time to stop, for long work with nothing to save."""
        if self.requested:
            raise Stopped(self.reason)

    def _orphaned(self) -> bool:
        return self._parent is not None and os.getppid() != self._parent

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: the request is its parent's business
        name = signal.Signals(number).name
        if name == "SIGINT":
            if self._interrupted:
                self._end(name)
            self._interrupted = True
        if self._reason is None:  # a second signal is not to disturb the end of the run
            self._reason = "torchrun is gone" if self._orphaned() else name
            if not self._raising:
                self._end(self._reason)  # an exception might surface inside C++ that is just being loaded
            if not self._deferred:
                raise Stopped(self._reason)

    def _end(self, reason: str) -> None:
        """End without clean-up. What is being written has another name until it is whole."""
        stop = Stopped(reason)
        os.write(2, f"minisd: {stop}\n".encode())
        os._exit(stop.exit_code)

    def _watch(self) -> None:
        """End the process if, before the loop, it does not attend to a signal.

        Python runs a handler between two instructions. A rank that waits in a collective for one that has died executes
        none for half an hour, and an exception raised in a destructor is lost. The C part of the handler writes into
        the pipe at once.
        """
        receive, send = os.pipe()
        os.set_blocking(send, False)
        signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours

        def wait() -> None:
            while not self._looping:
                number = os.read(receive, 1)[0]
                if number in SIGNALS and not self._looping:
                    time.sleep(GRACE)
                    if not self._looping:
                        self._end("torchrun is gone" if self._orphaned() else signal.Signals(number).name)

        threading.Thread(target=wait, name="signals", daemon=True).start()


def _ask_for_sigterm_at_the_end_of_the_parent() -> None:
    """Ask the kernel for SIGTERM when torchrun is gone: killed outright, or by a signal that it does not pass on.

    Nothing else tells a rank that waits in a collective or a driver, and an orphan that goes on would write into the
    folder of the run that is started next. Linux only; elsewhere the loop still looks for its parent in each step.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back while DataLoader workers are started, which are born with them held back too.

    Otherwise a signal to all processes would kill a worker that has not come to `ignore_signals` yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker_id: int) -> None:
    """In a DataLoader worker (`worker_init_fn`): outlive the signals that are meant for the run, obey the parent alone.

    torchrun signals the process group, Ctrl-C the terminal's, Slurm every process of the job; a worker that died of it
    would take with it the checkpoint that its parent is about to write. But SIGTERM from the parent is how Python ends
    a worker that is left when the program ends, and then waits for it without a limit.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an ignored signal would not be there to wait for
    parent = os.getppid()

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(SIGNALS) - {signal.SIGTERM})
