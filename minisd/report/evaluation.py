"""evaluation/evaluation.json, which `python -m minisd.evaluate` writes, as the report shows it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd.report.run_files import number, read_bytes

log = logging.getLogger(__name__)

_LORA = re.compile(r"(checkpoints/step-\d{6,}/)?lora\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What was drawn by each checkpoint; `inside` the style's domain or outside it."""

    text: str
    inside: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A column of the table: whether a "low" or a "high" value is the better one, and how it is written."""

    name: str
    title: str
    better: str
    format: str

    def text(self, value: float | None) -> str:
        """The value in words."""
        if value is None:
            return "\u2013"
        return f"{value:.0%}" if self.format == ".0%" else f"{value:.3f}"


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The training picture that is most like a sample, how much, and whether that makes the sample a copy."""

    training: str
    likeness: float
    is_copy: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """A checkpoint (or a strength of the pick's): its figures, its pictures, the training pictures nearest to them.

    Args:
        step: of the checkpoint; 0 is the base.
        scale: of the LoRA.
        lora: its file, relative to the run's folder; "" for the base.
        figures: name -> value, None where there is none.
        pictures: one a prompt, relative to evaluation/.
        nearest: one a picture; empty if it was not looked for.
    """

    step: int
    scale: float
    lora: str
    figures: Mapping[str, float | None]
    pictures: tuple[str, ...]
    nearest: tuple[Nearest, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A checkpoint at several strengths; `prompts` are the indices of those that were drawn."""

    step: int
    prompts: tuple[int, ...]
    rows: tuple[Row, ...]
    suggested: float | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All of evaluation.json."""

    judge: str
    prompts: tuple[Prompt, ...]
    figures: tuple[Figure, ...]
    rows: tuple[Row, ...]
    pick: int
    why: str
    settings: Mapping[str, Any]
    sweep: Sweep | None

    def best(self, figure: Figure) -> float | None:
        """The best value in a column, the base's not among them; None if no value is better than another."""
        values = [value for row in self.rows if row.lora and (value := row.figures.get(figure.name)) is not None]
        if not values or figure.better not in ("low", "high") or len(set(values)) == 1 < len(values):
            return None
        return min(values) if figure.better == "low" else max(values)


def read_evaluation(run: Path) -> Evaluation | None:
    """What evaluate has found out about a run; None if it was not run, or what it wrote cannot be read."""
    raw = read_bytes(run / "evaluation" / "evaluation.json")
    if not raw:
        return None
    try:
        return _evaluation(json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        log.warning("evaluation.json is left out, it cannot be read (%s): run python -m minisd.evaluate again",
                    type(error).__name__)  # fmt: skip
        return None


def _evaluation(raw: Mapping[str, Any]) -> Evaluation:
    """The same in types. Raises what a lookup or a conversion raises."""
    sweep = raw.get("sweep")
    return Evaluation(
        judge=str(raw["judge"]),
        prompts=tuple(
            Prompt(text=str(one["text"]), inside=bool(one["inside"]), seed=int(one["seed"])) for one in raw["prompts"]
        ),
        figures=tuple(
            Figure(
                name=str(one["name"]),
                title=str(one["title"]),
                better=str(one["better"] or ""),
                format=str(one["format"]),
            )
            for one in raw["figures"]
        ),
        rows=tuple(_row(one, int(one["step"]), 1.0, one["lora"] or "") for one in raw["rows"]),
        pick=int(raw["pick"]["step"]),
        why=str(raw["pick"]["why"]),
        settings=dict(raw["settings"]),
        sweep=None if sweep is None else _sweep(sweep, raw["rows"]),
    )


def _sweep(raw: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Sweep:
    step = int(raw["step"])
    lora = next(str(row["lora"]) for row in rows if row["step"] == step)
    return Sweep(
        step=step,
        prompts=tuple(map(int, raw["prompts"])),
        rows=tuple(_row(one, step, float(one["scale"]), lora) for one in raw["rows"]),
        suggested=None if raw.get("suggested") is None else float(raw["suggested"]),
        why=str(raw.get("why") or ""),
    )


def _row(raw: Mapping[str, Any], step: int, scale: float, lora: str) -> Row:
    if lora and not _LORA.fullmatch(lora):
        raise ValueError("a LoRA that is none of the run's")
    return Row(
        step=step,
        scale=scale,
        lora=lora,
        figures={name: number(value) for name, value in raw["figures"].items()},
        pictures=tuple(map(str, raw["pictures"])),
        nearest=tuple(
            Nearest(training=str(one["training"]), likeness=float(one["likeness"]), is_copy=bool(one["copy"]))
            for one in raw.get("nearest") or ()
        ),
    )
