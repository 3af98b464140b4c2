"""What is published of a run: OUTPUT/hub, a folder as the repository on the Hub will be.

NAME.safetensors, README.md (the model card), recipe.json and images/. No picture of the dataset, no state of the
optimizer, no path; nothing that is not one of these.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minisd.atomic import delete, write_atomically
from minisd.errors import DataError, UsageError, one_line
from minisd.images import image_grid
from minisd.lora_info import LoRAInfo
from minisd.lora_peft import CONFIG_FIELD
from minisd.lora_raw import read_raw
from minisd.lora_reader import info_of
from minisd.model_card import RECIPE, Card, Figure, Sample, card_text, recipe_json
from minisd.picture_files import load_image
from minisd.report.evaluation import Evaluation, Row, read_evaluation
from minisd.report.pictures import find_inside, text_of
from minisd.report.run_files import json_lines, picture_rows, ratios

log = logging.getLogger(__name__)

FOLDER = "hub"
_MOST_SAMPLES = 8
_COLUMNS = 4  # of the grid, which has the first samples
_SHOWN_PIXELS = 256  # the grid shows smaller pictures enlarged


@dataclass(frozen=True)
class _Drawn:
    """A picture of the run: drawn with the LoRA, and, if there is one, the same drawn without it."""

    path: Path
    without: Path | None
    prompt: str
    seed: str


def write_publication(run: Path, repo: str, lora: Path, license_name: str | None) -> list[str]:
    """Make OUTPUT/hub anew.

    Args:
        run: OUTPUT of a run.
        repo: USER/NAME; the LoRA is called after it, because ComfyUI and A1111 have all LoRAs in one folder.
        lora: the file to publish. Only of OUTPUT/lora.safetensors and of OUTPUT/checkpoints it is known which pictures
            and figures of the run belong to it; of another one the card has none.
        license_name: as the Hub spells it; None for that of the base's family.

    Returns:
        The names of the files, relative to OUTPUT/hub.

    Raises:
        WeightsError: the LoRA cannot be read.
        UsageError: it was not written by minisd.
        DiskError: OUTPUT/hub cannot be written.
    """
    raw = read_raw(lora)
    if "minisd.format_version" not in raw.metadata:
        raise UsageError(
            f"{lora}: not written by minisd, so its header may hold paths and names that are nobody's business. "
            "python -m minisd.lora_file convert writes it anew."
        )
    info = info_of(raw)
    step = _step_of(run, lora, info)
    evaluation = None if step is None else read_evaluation(run)
    drawn = [] if step is None else _pictures_of(run, step, evaluation)
    name = f"{repo.partition('/')[2]}.safetensors"
    pictures = {f"images/{number:02d}.png": picture for number, picture in enumerate(drawn)}
    grid = _grid(drawn[:_COLUMNS])
    is_pick = evaluation is not None and evaluation.pick == step
    if evaluation is not None and not is_pick:
        better = run / "checkpoints" / f"step-{evaluation.pick:06d}" / "lora.safetensors"
        if better.exists():
            log.info("this is step %d; the evaluation picked another, which --lora %s publishes", step, better)
    sweep = None if evaluation is None else evaluation.sweep
    suggested = sweep.suggested if sweep is not None and sweep.step == step else None
    card = Card(
        repo=repo,
        info=info,
        file_name=name,
        is_kohya=CONFIG_FIELD not in raw.metadata,
        license_name=license_name,
        step=step,
        pictures=0 if step is None else len(picture_rows(run / "pictures.csv")),
        samples=[Sample(name=name, prompt=picture.prompt, seed=picture.seed) for name, picture in pictures.items()],
        grid="images/grid.png" if grid else "",
        columns=min(len(drawn), _COLUMNS),
        figures=[] if step is None else _figures(run, step, evaluation),
        why=evaluation.why if evaluation is not None and is_pick else "",
        strength=suggested or 1.0,
    )
    files = {"README.md": card_text(card).encode(), name: raw.path.read_bytes()}
    files |= {RECIPE: recipe_json(info).encode()} if info.recipe else {}
    files |= {name: picture.path.read_bytes() for name, picture in pictures.items()}
    files |= {card.grid: grid} if grid else {}
    _write(run / FOLDER, files)
    return list(files)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Fill the folder with these files and no others."""
    delete(folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)


def _step_of(run: Path, lora: Path, info: LoRAInfo) -> int | None:
    """The step of the run after which the LoRA was saved; None if it is not one of the run's own files."""
    path = lora.resolve()
    if path == (run / "lora.safetensors").resolve():
        return info.steps
    found = re.fullmatch(r"step-(\d{1,9})", path.parent.name)
    return int(found[1]) if found and path.parent.parent == (run / "checkpoints").resolve() else None


def _rows(evaluation: Evaluation | None, step: int) -> tuple[Row, Row] | None:
    """What an evaluation found out about the LoRA of a step, and about the base; None if it knows no such step."""
    rows = {} if evaluation is None else {row.step: row for row in evaluation.rows}
    return (rows[step], rows[0]) if step in rows and 0 in rows else None


def _pictures_of(run: Path, step: int, evaluation: Evaluation | None) -> list[_Drawn]:
    """What was drawn with the LoRA of a step: by the evaluation, else along the run."""
    rows = _rows(evaluation, step)
    if rows is not None and rows[0].pictures:
        folder, pairs = run / "evaluation", list(zip(rows[0].pictures, rows[1].pictures, strict=False))
    else:
        folder, ours = run / "samples", f"step-{step:06d}"
        names = sorted(path.name for path in (folder / ours).glob("*.png"))
        pairs = [(f"{ours}/{name}", f"step-000000/{name}") for name in names]
    drawn = []
    for name, base in pairs[:_MOST_SAMPLES]:
        path = _ours(folder, name)
        if path is not None:
            without = _ours(folder, base) if step > 0 and (folder / base).exists() else None
            text = text_of(path)
            drawn.append(_Drawn(path, without, text.partition("\n")[0], _seed_in(text)))
    return drawn


def _ours(folder: Path, name: str) -> Path | None:
    """A picture in a folder of the run that minisd drew; None, and a warning, of any other: that is not published."""
    path = find_inside(folder, name)
    if path is None:
        return None
    try:
        load_image(path)  # it is whole
        is_ours = text_of(path).endswith("Version: minisd")
    except DataError as error:
        log.warning("left out: %s", one_line(str(error)))
        return None
    if not is_ours:
        log.warning("left out, not drawn by minisd: %s", one_line(str(path)))
    return path if is_ours else None


def _seed_in(text: str) -> str:
    found = re.search(r"\bSeed: (\d+)", text.rpartition("\n")[2])
    return found[1] if found else "not known"


def _grid(drawn: Sequence[_Drawn]) -> bytes:
    """The pictures without the LoRA above, with it below, as a PNG; empty if there are none to compare."""
    if not drawn or any(picture.without is None for picture in drawn):
        return b""
    images = []
    for path in [*(picture.without for picture in drawn), *(picture.path for picture in drawn)]:
        assert path is not None
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    grid = image_grid(images, len(drawn))
    factor = max(1, _SHOWN_PIXELS // images[0].width)  # without smoothing: pixels are seen as they are
    data = io.BytesIO()
    grid.resize((factor * grid.width, factor * grid.height), Image.Resampling.NEAREST).save(data, "PNG", optimize=True)
    return data.getvalue()


def _figures(run: Path, step: int, evaluation: Evaluation | None) -> list[Figure]:
    """Rows for the card: what the evaluation says of that step, else the losses that the run measured there."""
    rows = _rows(evaluation, step)
    if evaluation is not None and rows is not None:
        trained, base = (row.figures for row in rows)
        return [
            Figure(title=figure.title, base=figure.text(base.get(figure.name)), trained=figure.text(value))
            for figure in evaluation.figures
            if (value := trained.get(figure.name)) is not None
        ]
    lines = json_lines(run / "validation.jsonl")
    measured = {part: dict(ratios(lines, part).get("ratio", [])).get(step) for part in ("train", "held_out")}
    return [
        Figure(title=f"loss on {title} pictures, of the base's", base="1", trained=f"{value:.3f}")
        for title, value in (("training", measured["train"]), ("held-out", measured["held_out"]))
        if value is not None
    ]
