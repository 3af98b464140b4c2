"""An evaluation from beginning to end: read the run, draw and measure each checkpoint, pick, sweep, write.

OUTPUT/evaluation/ gets evaluation.json, table.csv, sweep.png, and the pictures: step-000500/00.png, sweep/0.4-00.png.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from minisd.atomic import write_atomically
from minisd.errors import UsageError
from minisd.evaluate.judging import FigureKind, Figures, Nearest, figure_kinds, measure
from minisd.evaluate.options import EvaluateConfig
from minisd.evaluate.picking import choose
from minisd.evaluate.run_folder import Candidate, candidates_in, read_train_config
from minisd.evaluate.session import Session, open_session
from minisd.evaluate.sweeping import Sweep, prompts_to_sweep, sweep
from minisd.evaluate.table import legend, table_csv, table_text
from minisd.report.write import write_report


@dataclass(frozen=True)
class Row:
    """A checkpoint: its figures, its pictures, one a prompt, and what each of these is most like."""

    candidate: Candidate
    figures: Figures
    images: Sequence[Image.Image]
    pictures: Sequence[str]  # names in the evaluation's folder
    nearest: Sequence[Nearest]


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate a run; prints the tables and the pick, and returns the path of evaluation.json.

    Raises:
        MinisdError: the run, its pictures, its model or CLIP cannot be used, or a picture is not finite.
    """
    run = read_train_config(config.run)
    candidates = candidates_in(config.run)
    session = open_session(config, run)
    kinds, judge = figure_kinds(session.judge), session.judge
    scales = config.sweep_scales if config.sweep else ()
    count = len(candidates) * len(session.prompts) + len(scales) * len(prompts_to_sweep(session))
    with tqdm(total=count, desc="evaluate", unit="picture") as bar:
        rows = [row for candidate in candidates if (row := _row(session, candidate, bar.update)) is not None]
        base, *trained = rows
        if not trained:
            raise UsageError(f"--run {config.run}: the run has deleted all checkpoints there were. Start this again.")
        labels = [f"step {row.candidate.step}" for row in trained]
        choice = choose(
            base.figures,
            [row.figures for row in trained],
            labels,
            tolerance=judge.tolerance,
            number=judge.agreement_format,
        )
        pick = trained[choice.index].candidate
        swept = None
        if scales and session.checkpoints.put_in(pick):
            swept = sweep(session, pick, scales, base.images, bar.update)

    steps = [row.candidate.step for row in rows]
    content = {
        "judge": judge.name,
        "data_pictures": len(session.training.names),
        "prompts": [asdict(prompt) for prompt in session.prompts],
        "figures": [asdict(kind) for kind in kinds],
        "rows": [_as_json(row) for row in rows],
        "pick": {"step": pick.step, "why": choice.why},
        "settings": {
            name: getattr(session.settings, name)
            for name in ("num_inference_steps", "guidance_scale", "scheduler", "height", "width")
        },
        "sweep": None if swept is None else {"step": pick.step, **_sweep_as_json(swept)},
    }
    path = session.folder / "evaluation.json"
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    write_atomically(session.folder / "table.csv", table_csv(steps, [row.figures for row in rows], kinds, pick.step))
    print(_summary(rows, kinds, session, choice.why, pick.step, swept))
    write_report(config.run)
    return path


def _row(session: Session, candidate: Candidate, on_picture: Callable[[], object]) -> Row | None:
    """Draw and measure a checkpoint; None if the run has deleted it meanwhile."""
    if not session.checkpoints.put_in(candidate):
        return None
    names = [f"step-{candidate.step:06d}/{number:02d}.png" for number in range(len(session.prompts))]
    images = session.draw(session.prompts, names, candidate, [], on_picture)
    figures, nearest = measure(session.judge, session.training, images, session.prompts)
    return Row(candidate, session.ratios() | figures, images, names, nearest)


def _as_json(row: Row) -> dict[str, Any]:
    lora = row.candidate.lora
    return {
        "step": row.candidate.step,
        "lora": None if lora is None else lora.as_posix(),
        "figures": row.figures,
        "pictures": row.pictures,
        "nearest": [asdict(found) for found in row.nearest],
    }


def _sweep_as_json(swept: Sweep) -> dict[str, Any]:
    content = asdict(swept)
    return content | {"scales": [row.scale for row in swept.rows]}


def _summary(
    rows: Sequence[Row], kinds: Sequence[FigureKind], session: Session, why: str, pick: int, swept: Sweep | None
) -> str:
    """The tables and the picks, as they are printed."""
    labels = [f"{row.candidate.step}{' *' if row.candidate.step == pick else ''}" for row in rows]
    figures = [row.figures for row in rows]
    parts = [table_text("step", labels, figures, kinds), legend(figures, kinds)]
    parts += [f"A copy is more than {session.training.copy_above:.3f} like a training picture.", f"* {why}"]
    if swept is not None:
        scales = [f"{row.scale:g}{' *' if row.scale == swept.suggested else ''}" for row in swept.rows]
        parts.append(f"Step {pick} at several strengths, {len(swept.prompts)} prompts:")
        parts += [table_text("strength", scales, [row.figures for row in swept.rows], kinds), f"* {swept.why}"]
    parts.append(f"Pictures and figures are in {session.folder}")
    return "\n\n".join(parts)
