"""What the page of a run shows of its pictures, ready for the template: each with the line that draws it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisd.report.commands import Command, recipe_of, repeat_along_run, repeat_evaluation
from minisd.report.evaluation import Evaluation, Figure, Nearest, Prompt, Row
from minisd.report.pictures import MISSING, Dataset, Shown, TrainingPicture, longest_side, show_inside, spread
from minisd.report.run_files import RunFiles

MAX_ALONG = 240  # pictures along the run
_MAX_CELLS = 24
_MAX_COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture that the run or evaluate has drawn.

    Args:
        shown: the picture.
        prompt: what was drawn; empty if the picture does not say.
        facts: how, in a few words: the step, the seed.
        command: what draws it again.
    """

    shown: Shown
    prompt: str
    facts: str
    command: Command


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One prompt and seed along the run: pictures by step, some of which may be missing."""

    prompt: str
    seed: str
    drawn: dict[int, Drawn]


@dataclass(frozen=True, kw_only=True)
class Along:
    """The pictures along a run: those of `steps` and `cells` are shown, of so many that there are."""

    steps: tuple[int, ...]
    cells: tuple[Cell, ...]
    all_steps: int
    all_cells: int

    @property
    def start(self) -> int:
        """The place among the steps to begin at: the last that is drawn whole, as the last of all may not be yet."""
        whole = [place for place, step in enumerate(self.steps) if all(step in cell.drawn for cell in self.cells)]
        return whole[-1] if whole else len(self.steps) - 1


@dataclass(frozen=True, kw_only=True)
class Column:
    """A checkpoint, or a strength, in a table: its pictures by prompt, and whether it is the one picked."""

    title: str
    row: Row
    drawn: dict[int, Drawn]
    is_pick: bool
    is_base: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """Checkpoints or strengths side by side: figures above, pictures below.

    Args:
        columns: those shown.
        all_columns: how many there are.
        figures: rows of figures.
        prompts: rows of pictures: index -> prompt.
    """

    columns: tuple[Column, ...]
    all_columns: int
    figures: tuple[Figure, ...]
    prompts: dict[int, Prompt]


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """A sample beside the training picture that is most like it."""

    sample: Drawn
    training: TrainingPicture
    nearest: Nearest


def along_run(run: RunFiles) -> Along:
    """The pictures that train.py has drawn along the run."""
    names = sorted({name for pictures in run.samples.values() for name in pictures})
    drawn_at = [step for step, pictures in run.samples.items() if pictures]
    cells = names[:_MAX_CELLS]
    steps = spread(drawn_at, max(2, MAX_ALONG // max(1, len(cells))))
    longest = longest_side(len(cells) * len(steps))
    shown = []
    for name in cells:
        drawn = {step: _along(run, step, name, longest) for step in steps if name in run.samples[step]}
        said = [one for one in drawn.values() if one.prompt] or list(drawn.values())
        if said:
            prompt, seed = said[-1].prompt, said[-1].facts.rpartition(", ")[2]
            shown.append(Cell(prompt=prompt, seed=seed, drawn=drawn))
    return Along(steps=tuple(steps), cells=tuple(shown), all_steps=len(drawn_at), all_cells=len(names))


def _along(run: RunFiles, step: int, name: str, longest: int) -> Drawn:
    shown = show_inside(run.folder / "samples", f"step-{step:06d}/{name}", longest)
    recipe = recipe_of(shown.parameters, run.config)
    return Drawn(
        shown=shown,
        prompt="" if recipe is None else recipe.prompt,
        facts=f"step {step}" + ("" if recipe is None else f", seed {recipe.seed}"),
        command=repeat_along_run(run, recipe, step, Path(name).stem),
    )


def checkpoint_table(run: RunFiles, evaluation: Evaluation) -> Table:
    """The checkpoints that evaluate has compared, the base first."""
    rows = _with_pick(spread(evaluation.rows, _MAX_COLUMNS), evaluation)
    longest = longest_side(len(rows) * len(evaluation.prompts))
    prompts = dict(enumerate(evaluation.prompts))
    columns = [
        Column(
            title=str(row.step) if row.lora else "base",
            row=row,
            drawn=_drawn(run, evaluation, row, prompts, longest),
            is_pick=_is_pick(row, evaluation),
            is_base=not row.lora,
        )
        for row in rows
    ]
    return Table(columns=tuple(columns), all_columns=len(evaluation.rows), figures=evaluation.figures, prompts=prompts)


def sweep_table(run: RunFiles, evaluation: Evaluation) -> Table | None:
    """The pick at several strengths; None if evaluate was told to leave that out."""
    sweep = evaluation.sweep
    if sweep is None:
        return None
    prompts = {index: evaluation.prompts[index] for index in sweep.prompts if 0 <= index < len(evaluation.prompts)}
    longest = longest_side(len(sweep.rows) * len(prompts))
    columns = [
        Column(
            title=f"\u00d7 {row.scale:g}",
            row=row,
            drawn=_drawn(run, evaluation, row, prompts, longest),
            is_pick=row.scale == sweep.suggested,
            is_base=row.scale == 0,
        )
        for row in sweep.rows
    ]
    known = tuple(figure for figure in evaluation.figures if any(figure.name in row.figures for row in sweep.rows))
    return Table(columns=tuple(columns), all_columns=len(columns), figures=known, prompts=prompts)


def likenesses(run: RunFiles, evaluation: Evaluation, dataset: Dataset) -> list[Likeness]:
    """The pick's samples beside the training pictures nearest to them; then the copies among the others' samples."""
    found: list[Likeness] = []
    picks = [row for row in evaluation.rows if _is_pick(row, evaluation)]
    others = [row for row in evaluation.rows if row.lora and row not in picks]
    for row in [*picks, *reversed(others)]:
        for index, nearest in enumerate(row.nearest):
            if (row in picks or nearest.is_copy) and len(found) < _MAX_CELLS and index < len(evaluation.prompts):
                prompts = {index: evaluation.prompts[index]}
                sample = _drawn(run, evaluation, row, prompts, 256)[index]
                found.append(Likeness(sample=sample, training=dataset.find(nearest.training, 256), nearest=nearest))
    return found


def _is_pick(row: Row, evaluation: Evaluation) -> bool:
    return row.step == evaluation.pick and bool(row.lora)


def _with_pick(rows: Sequence[Row], evaluation: Evaluation) -> list[Row]:
    """The same rows, the pick among them."""
    chosen = {id(row) for row in [*rows, *(row for row in evaluation.rows if _is_pick(row, evaluation))]}
    return [row for row in evaluation.rows if id(row) in chosen]


def _drawn(
    run: RunFiles, evaluation: Evaluation, row: Row, prompts: dict[int, Prompt], longest: int
) -> dict[int, Drawn]:
    """The pictures of a row by the prompt's index."""
    folder, drawn = run.folder / "evaluation", {}
    for place, (index, prompt) in enumerate(prompts.items()):
        place = index if len(row.pictures) == len(evaluation.prompts) else place  # a sweep has some of the prompts
        name = row.pictures[place] if place < len(row.pictures) else ""
        strength = f", strength {row.scale:g}" if row.scale != 1 else ""
        what = f"checkpoint of step {row.step}" if row.lora else "base model"
        drawn[index] = Drawn(
            shown=show_inside(folder, name, longest) if name else MISSING,
            prompt=prompt.text,
            facts=f"{what}{strength}, seed {prompt.seed}",
            command=repeat_evaluation(run, evaluation, row, prompt, name.removesuffix(".png")),
        )
    return drawn
