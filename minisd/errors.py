"""What can go wrong outside our own code, each with the exit code a script ends with.

A refusal teaches: it says what was got, what is wanted and what to do, in one line. `assert` is for our own bugs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path


class MinisdError(Exception):
    """A failure the user can act on. The message is one line; subclasses carry the exit code."""

    name = "E-FAILED"
    exit_code = 1


class UsageError(MinisdError):
    """An option or a configuration that cannot be carried out."""

    name = "E-USAGE"
    exit_code = 2


class DataError(MinisdError):
    """A dataset, caption table or picture that cannot be used."""

    name = "E-DATA"
    exit_code = 3


class WeightsError(MinisdError):
    """A model or LoRA file that cannot be loaded."""

    name = "E-WEIGHTS"
    exit_code = 4


class NetworkError(MinisdError):
    """The Hub, or another server, could not be reached, or refused."""

    name = "E-NETWORK"
    exit_code = 5


class DiskError(MinisdError):
    """A file could not be written: disk full, permissions, read-only."""

    name = "E-DISK"
    exit_code = 6


class NonFiniteError(MinisdError):
    """A loss, gradient, latent or weight that is NaN or infinite."""

    name = "E-NONFINITE"
    exit_code = 7


class OutOfMemoryError(MinisdError):
    """The device has not enough memory for what was asked."""

    name = "E-MEMORY"
    exit_code = 8


class CheckpointError(MinisdError):
    """A checkpoint that is damaged or does not belong to this run."""

    name = "E-CKPT"
    exit_code = 9


class OutputInUseError(MinisdError):
    """Another run is writing to the same output folder."""

    name = "E-INUSE"
    exit_code = 10


class PeerError(MinisdError):
    """Another process of the run ended or is stuck. The cause, if it could be told, is what that one says."""

    name = "E-PEER"
    exit_code = 1


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception: nothing that guards against failures may hold it up.

    Args:
        reason: who asked: the name of a signal, or words.
        checkpoint: where the run was saved; None if there was nothing to save.
    """

    def __init__(self, reason: str, checkpoint: Path | None = None) -> None:
        super().__init__(reason, checkpoint)
        self.reason = reason
        self.checkpoint = checkpoint

    @property
    def exit_code(self) -> int:
        """75 (EX_TEMPFAIL, start again) after any orderly stop; 130, as shells expect, for Ctrl-C without a save."""
        return 130 if self.reason == "SIGINT" and self.checkpoint is None else 75

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"stopped ({self.reason}); nothing new was to be saved"
        return f"stopped ({self.reason}); saved {self.checkpoint}. The same command goes on from there."


def one_line(text: str) -> str:
    """Escape control characters, so that a hostile file name or key cannot reach the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# How a collective says that it lost a peer: gloo in the text of a RuntimeError, NCCL and the store by a class of torch.
_PEER_CLASSES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_PEER_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Connection refused",
               "Broken pipe", "Socket closed", "connectFullMesh failed", "Application timeout")  # fmt: skip


def translate(error: BaseException) -> MinisdError | None:
    """Give the failures of the machine (disk, memory, peers) their place in the family; None for a bug of ours."""
    if isinstance(error, MinisdError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        return DiskError(f"{where}{error.strerror}. Free some space or choose another folder.")
    detail = str(error).partition("\n")[0]
    # torch.OutOfMemoryError is a RuntimeError; the CPU allocator raises a plain one.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return OutOfMemoryError(
            f"{detail}. Lower the batch size or the resolution; to train, try --gradient-checkpointing, to draw, "
            "--vae-tiling."
        )
    # By name, so that this file needs no torch.
    from_store = isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_TEXTS)
    if from_store or type(error).__name__ in _PEER_CLASSES:
        said = detail.split("] ", 1)[-1].partition(". ")[0].rstrip(".")  # without gloo's own file and its advice
        return PeerError(
            f"lost another process of the run, which ended or is stuck ({said}). What it says itself is the cause. "
            "The same command goes on from the last checkpoint; if a rank was only slow, raise --dist-timeout."
        )
    return None


def run_script(main: Callable[[], None], *, debug: bool, prefix: str = "") -> int:
    """Run a script's main function and turn its failure into one line on stderr and an exit code.

    Args:
        main: the work; returns None when done.
        debug: re-raise with the traceback instead of shortening it.
        prefix: put before the line, for example "[rank 1] ".

    Returns:
        The exit code: 0, the code of a MinisdError, that of Stopped (75 or 130), or 130 for an interrupt.
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"{prefix}minisd: interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        print(f"{prefix}minisd: {one_line(str(stop))}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        known = translate(error)
        if known is None or debug:
            traceback.print_exc()
        if known is None:
            return 1
        print(f"{prefix}minisd: error {known.name}: {one_line(str(known))}", file=sys.stderr)
        return known.exit_code
    return 0
