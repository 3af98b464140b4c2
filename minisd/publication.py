"""What is published of a run: OUTPUT/hub, a folder as the repository on the Hub will be.

NAME.safetensors, README.md (the model card), recipe.json and images/. No picture of the dataset, no state of the
optimizer, no path; nothing that is not one of these.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from minisd.atomic import delete, write_atomically
from minisd.errors import UsageError
from minisd.images import image_grid
from minisd.lora_info import LoRAInfo
from minisd.lora_peft import CONFIG_FIELD
from minisd.lora_raw import read_raw
from minisd.lora_reader import info_of
from minisd.model_card import RECIPE, Card, Figure, Sample, card_text, recipe_json

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
    evaluation = _json_object(run / "evaluation" / "evaluation.json")
    drawn = [] if step is None else _pictures_of(run, step, evaluation)
    name = f"{repo.partition('/')[2]}.safetensors"
    pictures = {f"images/{number:02d}.png": picture for number, picture in enumerate(drawn)}
    grid = _grid(drawn[:_COLUMNS])
    picked, sweep = (evaluation.get(part) or {} for part in ("pick", "sweep"))
    better = run / "checkpoints" / f"step-{picked.get('step', 0):06d}" / "lora.safetensors"
    if step is not None and picked.get("step", step) != step and better.exists():
        log.info("this is step %d; the evaluation picked another, which --lora %s publishes", step, better)
    card = Card(
        repo=repo,
        info=info,
        file_name=name,
        is_kohya=CONFIG_FIELD not in raw.metadata,
        license_name=license_name,
        step=step,
        pictures=_picture_count(run) if step is not None else None,
        samples=[Sample(name=name, prompt=picture.prompt, seed=picture.seed) for name, picture in pictures.items()],
        grid="images/grid.png" if grid else "",
        columns=min(len(drawn), _COLUMNS),
        figures=[] if step is None else _figures(run, step, evaluation),
        why=picked.get("why", "") if step is not None and picked.get("step") == step else "",
        strength=(sweep.get("suggested") or 1.0) if step is not None and sweep.get("step") == step else 1.0,
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


def _pictures_of(run: Path, step: int, evaluation: Mapping[str, Any]) -> list[_Drawn]:
    """What was drawn with the LoRA of a step: by the evaluation, else along the run."""
    rows = {row["step"]: row["pictures"] for row in evaluation.get("rows", ())}
    if rows.get(step):
        folder = run / "evaluation"
        pairs = [(folder / ours, folder / base) for ours, base in zip(rows[step], rows[0], strict=True)]
    else:
        folder = run / "samples"
        ours = sorted((folder / f"step-{step:06d}").glob("*.png"))
        pairs = [(path, folder / "step-000000" / path.name) for path in ours]
    drawn = []
    for path, base in pairs[:_MOST_SAMPLES]:
        text = _text_in(path)
        if text is not None:
            has_base = step > 0 and _text_in(base) is not None
            drawn.append(_Drawn(path, base if has_base else None, _prompt_in(text), _seed_in(text)))
    return drawn


def _text_in(path: Path) -> str | None:
    """What minisd wrote into a picture that it drew; None, and a warning, of any other file: that is not published."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            text = image.info.get("parameters")
    except FileNotFoundError:
        return None
    except Exception as error:  # decoders raise what they like on damaged files
        log.warning("left out, not a picture: %s (%s)", path, type(error).__name__)
        return None
    if not isinstance(text, str) or not text.endswith("Version: minisd"):
        log.warning("left out, not drawn by minisd: %s", path)
        return None
    return text


def _prompt_in(text: str) -> str:
    return text.partition("\n")[0]


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


def _figures(run: Path, step: int, evaluation: Mapping[str, Any]) -> list[Figure]:
    """Rows for the card: what the evaluation says of that step, else the losses that the run measured there."""
    rows = {row["step"]: row["figures"] for row in evaluation.get("rows", ())}
    if step in rows:
        return [
            Figure(
                title=figure["title"],
                base=_formatted(rows[0][figure["name"]], figure["format"]),
                trained=_formatted(rows[step][figure["name"]], figure["format"]),
            )
            for figure in evaluation["figures"]
            if rows[step][figure["name"]] is not None
        ]
    measured = _measured(run, step)
    return [
        Figure(title=f"loss on {title} pictures, of the base's", base="1", trained=f"{measured[part]['ratio']:.3f}")
        for title, part in (("training", "train"), ("held-out", "held_out"))
        if part in measured
    ]


def _formatted(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if re.fullmatch(r"\.\d[f%]", form) else f"{value:g}"


def _measured(run: Path, step: int) -> dict[str, Any]:
    """The line of validation.jsonl about a step; empty if there is none."""
    path = run / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [line for line in map(_parsed, lines) if line.get("step") == step]
    return found[-1] if found else {}


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    return _parsed(path.read_text(encoding="utf-8")) if path.exists() else {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:  # a line that is being written
        return {}
    return value if isinstance(value, dict) else {}


def _picture_count(run: Path) -> int | None:
    """Pictures that the run trained on, as its pictures.csv has them."""
    path = run / "pictures.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return max(0, sum(1 for _ in csv.reader(file)) - 1)
