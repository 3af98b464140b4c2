"""What is in a run's folder, for the report: read with suspicion, and whole although the run may be writing to it.

A file that is missing, or half there, counts as one that says nothing; only config.json must be there.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd.command_line import read_config_file
from minisd.config import DEFAULT_STEPS, TrainConfig
from minisd.errors import DataError
from minisd.picture_files import open_regular
from minisd.run_status import dead_ranks, read_status

Points = list[tuple[int, float]]  # (step, value), by step

_STEP = re.compile(r"step-(\d{6,12})")
# Up to the last slash; in quotes, as most messages name a file, a folder may have spaces.
_ABSOLUTE = re.compile(
    r"""(?<=')/[^']*/|(?<=")/[^"]*/|(?<![^\s'"(=:,])(?:/|~[/\\]|[A-Za-z]:[/\\])(?:[^\s'"/\\]+[/\\])+"""
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run as its folder shows it.

    Args:
        folder: OUTPUT, as it was given.
        config: its options.
        state: "complete", "running", "stopped" (go on with the same command), "failed", "ended" (killed: it could not
            say so) or "unknown".
        error: why it failed, in a line without folders; empty if it did not.
        step: the last that metrics.jsonl has, or the status file.
        total_steps: the run's length; None if it is not known yet.
        metrics: name in metrics.jsonl -> its values, those that are finite numbers.
        validation: "train" and "held_out" -> "ratio", "0", "1" ... (bands) -> its values, of validation.jsonl.
        probe: probe.json; empty without one.
        checkpoints: steps whose LoRA is there.
        final_lora: lora.safetensors is there, and of the last step.
        progress: "run" and "circumstances" of the newest checkpoint's state.json, in one; empty without one.
        buckets: rows of pictures.csv, by file name.
        samples: step -> names of the pictures in samples/step-NNNNNN/, sorted.
    """

    folder: Path
    config: TrainConfig
    state: str
    error: str
    step: int
    total_steps: int | None
    metrics: Mapping[str, Points]
    validation: Mapping[str, Mapping[str, Points]]
    probe: Mapping[str, Any]
    checkpoints: tuple[int, ...]
    final_lora: bool
    progress: Mapping[str, Any]
    buckets: Mapping[str, Mapping[str, str]]
    samples: Mapping[int, tuple[str, ...]]

    @property
    def held_out(self) -> list[str]:
        """Names of the pictures of --data that --validation-split holds out."""
        names = self.probe.get("held_out_pictures") if self.config.validation_split else None
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def name(self) -> str:
        """What the run is called: its folder."""
        return self.config.output.name or self.folder.resolve().name


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        DataError: it is not one.
        UsageError: its config.json is damaged, or of another version of minisd.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{str(folder)!r}: expected the --output of a run, with its config.json. Correct --run.")
    try:
        config = TrainConfig(**read_config_file(folder / "config.json", TrainConfig))
    except TypeError as error:  # an option that must be there is not
        raise DataError(f"{str(folder / 'config.json')!r}: not the options of a run. Restore it.") from error
    metrics = series(json_lines(folder / "metrics.jsonl"))
    checkpoints = sorted(_steps_in(folder / "checkpoints", "lora.safetensors"))
    content = _read_json(folder / "checkpoints" / f"step-{checkpoints[-1]:06d}" / "state.json") if checkpoints else {}
    progress = {**_mapping(content.get("run")), **_mapping(content.get("circumstances"))}
    status = read_status(folder)
    step = max([0, *(points[-1][0] for points in metrics.values() if points)])
    if not metrics:
        step = _steps(status.get("step")) or 0
    total_steps = total_steps_of(config, progress)
    has_lora = (folder / "lora.safetensors").is_file()
    state = state_of(status, has_lora=has_lora)
    return RunFiles(
        folder=folder,
        config=config,
        state=state,
        error=_public(str(status.get("error") or ""), str(status.get("host") or "")) if state == "failed" else "",
        step=step,
        total_steps=total_steps,
        metrics=metrics,
        validation={probe: ratios(json_lines(folder / "validation.jsonl"), probe) for probe in ("train", "held_out")},
        probe=_read_json(folder / "probe.json"),
        checkpoints=tuple(checkpoints),
        final_lora=has_lora and state == "complete" and total_steps in (None, step),
        progress=progress,
        buckets=picture_rows(folder / "pictures.csv"),
        samples={
            step: tuple(sorted(path.name for path in (folder / "samples" / f"step-{step:06d}").glob("*.png")))
            for step in sorted(_steps_in(folder / "samples", ""))
        },
    )


def total_steps_of(config: TrainConfig, progress: Mapping[str, Any]) -> int | None:
    """The run's length in steps; that of a run given in epochs is known from its first checkpoint on."""
    if config.num_train_epochs is None:
        return DEFAULT_STEPS if config.max_train_steps is None else config.max_train_steps
    return _steps(progress.get("max_train_steps"))


def state_of(status: Mapping[str, Any], *, has_lora: bool) -> str:
    """How a run stands, in a word.

    Args:
        status: of run_status.json; empty without it, as of a run that a program of one's own has started.
        has_lora: lora.safetensors, which is written last, is there.
    """
    said = status.get("state")
    if said == "running":
        process = status.get("host"), status.get("pid")
        known = isinstance(process[0], str) and isinstance(process[1], int)
        return "ended" if known and dead_ranks([process], patience=0) else "running"  # type: ignore[list-item]
    states = {"done": "complete", "preempted": "stopped", "failed": "failed"}
    return states.get(str(said), "complete" if has_lora else "unknown")


def series(lines: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Name -> (step, value) of each line that has both as finite numbers."""
    found: dict[str, Points] = {}
    for line in lines:
        step = _steps(line.get("step"))
        if step is not None:
            for name, raw in line.items():
                if name != "step" and (value := number(raw)) is not None:
                    found.setdefault(name, []).append((step, value))
    return found


def number(value: Any) -> float | None:
    """A number in a file; None of anything else, and of one that is not finite."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # JSON's whole numbers have no end
        return None
    return found if math.isfinite(found) else None


def _steps(value: Any) -> int | None:
    """A number of steps in a file; None of anything else."""
    return value if type(value) is int and 0 <= value < 10**12 else None


def ratios(lines: Iterable[Mapping[str, Any]], probe: str) -> dict[str, Points]:
    """The ratio and the bands of one probe in validation.jsonl."""
    flat = []
    for line in lines:
        figures = _mapping(line.get(probe))
        bands = figures.get("bands")
        numbered = {str(band): value for band, value in enumerate(bands)} if isinstance(bands, list) else {}
        flat.append({"step": line.get("step"), "ratio": figures.get("ratio"), **numbered})
    return series(flat)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. One being written, or damaged, is left out; no file, no lines."""
    lines = []
    for text in read_bytes(path).split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def read_bytes(path: Path) -> bytes:
    """What is in a regular file; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read()
    except (DataError, OSError):
        return b""


def without_folders(text: str) -> str:
    """A line with absolute paths reduced to their last part: the page may go to a stranger."""
    return _ABSOLUTE.sub("", text)


def _public(error: str, host: str) -> str:
    """An error without folders and the name of the machine."""
    return without_folders(error.replace(host, "this machine") if host else error)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without one."""
    try:
        return _mapping(json.loads(read_bytes(path)))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _steps_in(folder: Path, file: str) -> list[int]:
    """The steps of the folders step-NNNNNN in a folder, of those that have a file."""
    found = [(path, match) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [int(match[1]) for path, match in found if (path / file).exists()]


def picture_rows(path: Path) -> dict[str, dict[str, str]]:
    """The rows of pictures.csv that are whole, by file name."""
    text = io.StringIO(read_bytes(path).decode("utf-8", "replace"), newline="")
    try:
        rows = list(csv.DictReader(text))
    except csv.Error:
        return {}
    return {row["file_name"]: row for row in rows if row.get("file_name") and None not in row.values()}
