"""What a run tells the world: metrics.jsonl, validation.jsonl, and curves in TensorBoard or Weights & Biases.

The two files are the authority: they are rewound when a run resumes, and a line that cannot be written ends the run.
The others are for looking at while it runs: one that fails is given up with a warning.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict

import numpy as np
import torch
from PIL import Image

from minisd.atomic import write_atomically
from minisd.errors import DiskError, UsageError, one_line

log = logging.getLogger(__name__)

AVERAGE_WEIGHT = 0.98  # of what came before, in the average of the loss: it looks back over about fifty steps


class Ratio(TypedDict):
    """Loss on some pictures to the base model's: the mean of the bands, and each band of diffusion times."""

    ratio: float
    bands: list[float]


class MetricsLog:
    """The curves and pictures of a run. On the main rank only.

    Args:
        output: folder of the run, which exists; its metrics.jsonl ends at the step that the run goes on from.
        report_to: "auto" (TensorBoard if it is installed), "tensorboard", "wandb" or "none".
        config: the options of the run, for a tracker to show.

    Raises:
        UsageError: the package of `report_to` is not installed.
    """

    def __init__(self, output: Path, report_to: str, config: Mapping[str, Any]) -> None:
        check_report_to(report_to)
        self._output, self._path = output, output / "metrics.jsonl"
        self._average = LossAverage()
        last_step = -1
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []:
            values = json.loads(line)
            last_step = values["step"]
            self._average.add(values["loss"])  # the same floats in the same order: the same average, bit for bit
        if report_to == "auto":
            report_to = "tensorboard" if _installed("tensorboard") else "none"
        makers: dict[str, Callable[[], _Tracker]] = {
            "tensorboard": lambda: _TensorBoard(output / "tensorboard", last_step + 1),
            "wandb": lambda: _WandB(output, config, last_step + 1),
        }
        self._tracker: _Tracker | None = None
        if report_to in makers:
            self._tracker = self._attempt(makers[report_to])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the line of a step: the values, which have "loss", its average over the steps, and the memory.

        Raises:
            DiskError: metrics.jsonl cannot be written.
        """
        line = {**values, "loss_average": self._average.add(values["loss"]), "memory_gb": _memory_gb()}
        _add_line(self._path, {"step": step, **line})
        self._show(step, {f"train/{name}": value for name, value in line.items()})

    def validation(self, step: int, ratios: Mapping[str, Ratio]) -> None:
        """Add a line to validation.jsonl: of each set of pictures, its loss after `step` updates to the base's.

        Raises:
            DiskError: it cannot be written.
        """
        _add_line(self._output / "validation.jsonl", {"step": step, **ratios})
        values = {f"validation/{name}_ratio": ratio["ratio"] for name, ratio in ratios.items()}
        for name, ratio in ratios.items():
            values |= {f"validation/{name}_band_{band}": value for band, value in enumerate(ratio["bands"])}
        self._show(step, values)

    def picture(self, step: int, name: str, image: Image.Image | Path) -> None:
        """Show a picture under a name, which stays the same from step to step."""
        if self._tracker is not None:
            self._attempt(self._tracker.picture, step, name, image)

    def close(self, *, failed: bool = False) -> None:
        """Write out what a tracker holds back, and tell it how the run ended."""
        if self._tracker is not None:
            self._attempt(self._tracker.close, failed)
            self._tracker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            self._attempt(self._tracker.values, step, values)

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a tracker. Whatever goes wrong there (network, a full disk, its own faults) must not end the run."""
        try:
            return call(*arguments)
        except Exception as error:
            self._tracker = None
            why = one_line(f"{type(error).__name__}: {error}")
            log.warning("the tracker is given up (%s); the run goes on, and %s has everything", why, self._path)
            return None


def _add_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file. Raises DiskError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        free = "Free some space or choose another --output"
        raise DiskError(f"{path}: cannot be written: {error.strerror}. {free}.") from error


class LossAverage:
    """Exponential average of the loss, corrected for its start: the first value is the first loss."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> float:
        """The average with one more loss."""
        self._sum = AVERAGE_WEIGHT * self._sum + (1 - AVERAGE_WEIGHT) * loss
        self._weight = AVERAGE_WEIGHT * self._weight + (1 - AVERAGE_WEIGHT)
        return self._sum / self._weight


def check_report_to(report_to: str) -> None:
    """Refuse a tracker that is not installed, with UsageError; cheap, and best before anything is loaded."""
    if report_to in ("tensorboard", "wandb") and not _installed(report_to):
        raise UsageError(f"--report-to {report_to}: it is not installed. Run: pip install {report_to}")


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # no origin: a mere folder of that name, as wandb leaves behind


def _memory_gb() -> float:
    """The most memory used so far, in GB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / 1e9, 3)


class _Tracker(Protocol):
    def values(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: Image.Image | Path) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of a run that was killed and goes on from its last checkpoint, the steps after it come a second time.
        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)

    def values(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image | Path) -> None:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        self._writer.add_image(f"samples/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, output: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        # The id is kept, so that a resumed run goes on in the same curves; one that starts anew gets its own.
        path = output / "wandb_run_id"
        if first_step == 0 or not path.exists():
            write_atomically(path, uuid.uuid4().hex.encode())
        run_id = path.read_text().strip()
        self._picture = wandb.Image
        # json: paths and tuples as they stand in config.json
        shown = json.loads(json.dumps(config, default=str))
        self._run = wandb.init(project="minisd", id=run_id, resume="allow", dir=str(output), config=shown)

    def values(self, step: int, values: Mapping[str, float]) -> None:
        # After a kill, steps come again that wandb has and would refuse one by one; their values are the same.
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image | Path) -> None:
        if step >= self._run.step:
            shown = image if isinstance(image, Image.Image) else str(image)
            self._run.log({f"samples/{name}": self._picture(shown)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
