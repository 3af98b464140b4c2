"""How strongly to use the pick: some of the prompts at several strengths of its LoRA, and a suggestion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from minisd.evaluate.judging import Figures, measure
from minisd.evaluate.picking import choose
from minisd.evaluate.run_folder import Candidate
from minisd.evaluate.session import Session
from minisd.images import save_png
from minisd.sweep_grid import labelled_grid

INSIDE, OUTSIDE = 4, 2  # prompts, at most
VISIBLE = 256  # pixels: smaller pictures are enlarged in sweep.png


@dataclass(frozen=True)
class SweepRow:
    """One strength: its figures, and its pictures' names in the evaluation's folder."""

    scale: float
    figures: Figures
    pictures: list[str]


@dataclass(frozen=True)
class Sweep:
    """All strengths, in their order, of some prompts (their numbers); the strength to use, and why."""

    prompts: list[int]
    rows: list[SweepRow]
    suggested: float
    why: str


def prompts_to_sweep(session: Session) -> list[int]:
    """The numbers of the prompts that are drawn: the first few of either kind."""
    numbers = range(len(session.prompts))
    inside = [number for number in numbers if session.prompts[number].inside]
    return inside[:INSIDE] + [number for number in numbers if number not in inside][:OUTSIDE]


def sweep(
    session: Session,
    pick: Candidate,
    scales: Sequence[float],
    base_images: Sequence[Image.Image],
    on_picture: Callable[[], object],
) -> Sweep:
    """Draw and measure each strength, and lay the pictures side by side in sweep.png.

    Args:
        session: the model has the adapters of the pick; afterwards they are at the highest strength.
        pick: the checkpoint.
        scales: of its LoRA; at least one of them above 0.
        base_images: what the base draws from all prompts, which the strengths are compared with.
        on_picture: called after each picture.

    Raises:
        NonFiniteError: a picture is not finite.
        DiskError: it cannot be written.
    """
    numbers = prompts_to_sweep(session)
    prompts = [session.prompts[number] for number in numbers]
    rows, columns = [], []
    for scale in sorted(scales):
        session.checkpoints.set_strength(scale)
        names = [f"sweep/{scale:g}-{number:02d}.png" for number in numbers]
        images = session.draw(prompts, names, pick, [f"LoRA strength: {scale:g}"], on_picture)
        rows.append(SweepRow(scale, measure(session.judge, session.training, images, prompts)[0], names))
        columns.append(images)
    grid = labelled_grid(
        [_enlarged(images[row]) for row in range(len(prompts)) for images in columns],
        [f"LoRA x {row.scale:g}" for row in rows],
        [(prompt.text, f"seed {prompt.seed}") for prompt in prompts],
    )
    save_png(grid, session.folder / "sweep.png", parameters="", overwrite=True)
    base = measure(session.judge, session.training, [base_images[number] for number in numbers], prompts)[0]
    usable = [row for row in rows if row.scale > 0]
    judge = session.judge
    choice = choose(
        base,
        [row.figures for row in usable],
        [f"strength {row.scale:g}" for row in usable],
        tolerance=judge.tolerance,
        number=judge.agreement_format,
    )
    return Sweep(numbers, rows, usable[choice.index].scale, choice.why)


def _enlarged(image: Image.Image) -> Image.Image:
    """A small picture in blocks of pixels, so that a screen shows it, and its prompt has room beside it."""
    times = max(1, VISIBLE // max(image.size))
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
