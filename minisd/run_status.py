"""OUTPUT/run_status.json: how a run stands or has ended, for scripts.

torchrun returns 1 for whatever its processes return, so an exit code cannot say "stopped, start me again".

    {"state": "running" | "done" | "preempted" | "failed", "step": 500, "checkpoint": "checkpoints/step-000500" | null,
     "code": exit code or null, "error": one line or null, "pid": ..., "host": ..., "updated": ISO 8601, UTC}
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from minisd.atomic import write_atomically
from minisd.errors import DiskError, PeerError, Stopped, one_line, translate

STATUS = "run_status.json"
State = Literal["running", "done", "preempted", "failed"]


def write_status(
    output: Path,
    *,
    state: State,
    step: int,
    checkpoint: Path | None = None,
    code: int | None = None,
    error: str | None = None,
) -> None:
    """Replace the status file.

    Args:
        output: the run's folder.
        state: where the run stands.
        step: optimizer steps gone through.
        checkpoint: the newest; written as a path in `output`.
        code: the exit code, for a run that has ended.
        error: why it failed.

    Raises:
        DiskError: it could not be written.
    """
    status = {
        "state": state,
        "step": step,
        "checkpoint": None if checkpoint is None else os.path.relpath(checkpoint, output),
        "code": code,
        "error": None if error is None else one_line(error),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(output / STATUS, json.dumps(status, indent=2).encode() + b"\n")


def read_status(output: Path) -> dict[str, Any]:
    """What the status file says; empty without one or if it is not one of ours."""
    try:
        status = json.loads((output / STATUS).read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and {"state", "step", "checkpoint"} <= status.keys() else {}


@dataclass
class RunReport:
    """What the status file is to say of this process's run; `step` and `checkpoint` are kept up by the loop.

    Args:
        output: the run's folder.
        rank: of this process.
        processes: host and process id of each rank, to name the one that is gone; empty if not known.
        step: optimizer steps gone through.
        checkpoint: the newest one.
    """

    output: Path
    rank: int
    processes: Sequence[tuple[str, int]] = ()
    step: int = 0
    checkpoint: Path | None = None

    def resumed(self, step: int) -> None:
        """Note where the run starts, and the checkpoint it goes on from if that is one of its own."""
        checkpoint = self.output / "checkpoints" / f"step-{step:06d}"
        self.step, self.checkpoint = step, checkpoint if checkpoint.exists() else None

    def saved(self, step: int, checkpoint: Path) -> None:
        """Note a new checkpoint, in the file as well. On the main rank only. Raises DiskError."""
        self.step, self.checkpoint = step, checkpoint
        self._write("running")

    def _write(self, state: State, code: int | None = None, error: str | None = None) -> None:
        step, checkpoint = self.step, self.checkpoint
        if self.rank != 0 and (noted := read_status(self.output)):
            saved = noted["checkpoint"]
            step, checkpoint = noted["step"], None if saved is None else self.output / saved
        write_status(self.output, state=state, step=step, checkpoint=checkpoint, code=code, error=error)

    def _ended(self, error: BaseException) -> None:
        """Write how a run ended that was not done. The rank that has the cause writes it; the others only lost a peer.

        That one writes before it closes its connections, so the main rank, which learns of it by them, comes after.
        """
        known = translate(error)
        if isinstance(error, Stopped | KeyboardInterrupt):
            if self.rank == 0:
                self._write("preempted", error.exit_code if isinstance(error, Stopped) else 130)
        elif isinstance(known, PeerError):
            dead = dead_ranks(self.processes)
            if (self.rank == 0 or 0 in dead) and read_status(self.output).get("state") != "failed":
                gone = ", ".join(map(str, dead))
                self._write("failed", known.exit_code, f"rank {gone} ended: {known}" if gone else str(known))
        else:
            text = f"{type(error).__name__}: {error}" if known is None else str(known)
            code = 1 if known is None else known.exit_code
            self._write("failed", code, text if self.rank == 0 else f"rank {self.rank}: {text}")


@contextmanager
def reported(output: Path, rank: int = 0) -> Iterator[RunReport]:
    """Keep the status file: "running" from here, and at the end "done", "preempted" or "failed". On every rank.

    Raises:
        DiskError: "running" or "done" could not be written. A failure that cannot be noted is still that failure.
    """
    report = RunReport(output, rank)
    if rank == 0:
        report._write("running")
    try:
        yield report
    except BaseException as error:
        with suppress(DiskError):
            report._ended(error)
        raise
    if rank == 0:
        report._write("done", 0)


def dead_ranks(processes: Sequence[tuple[str, int]], *, patience: float = 1.0) -> list[int]:
    """The ranks whose process, on this host, is gone or a zombie.

    Args:
        processes: host name and process id of each rank.
        patience: seconds to look again if there are none: connections close a moment before a process is gone.
    """
    here = socket.gethostname()
    deadline = time.monotonic() + patience
    while True:
        dead = [rank for rank, (host, pid) in enumerate(processes) if host == here and not _runs(pid)]
        if dead or not processes or time.monotonic() >= deadline:
            return dead
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return not Path("/proc/self/stat").exists()  # no such file system: nothing is known
    return status.rpartition(")")[2].split()[0] not in "ZX"
