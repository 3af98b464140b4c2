"""The exact call that drew a picture, as JSON in the PNG's text chunk "minisd": what `sample.py --from-png` reads.

Files are named by their last component and their SHA-256: no folder, user or host gets into a picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minisd.errors import UsageError

KEYWORD = "minisd"
FORMAT_VERSION = 1
# Longer records are not written: a text of more than 1 MiB would make the file unreadable to Pillow.
MAX_BYTES = 32 * 1024

# Options that are about this computer or about other pictures, and those that have a field of their own below.
_NOT_RECORDED = {"prompts_file", "lora", "strength_sweep", "num_images", "init_image", "batch_size", "output",
                 "overwrite", "from_png", "debug"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRARecord:
    """A LoRA that a picture was drawn with."""

    name: str  # of the file or folder
    sha256: str  # of its contents
    strength: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a picture depends on beside options and LoRAs."""

    model_id: str  # a commit on the Hub, or "sha256:" and a hash of the weights of UNet, VAE and text encoders
    init_image_sha256: str  # of the file; empty if there was none
    torch: str  # version
    device: str  # "cpu", or the name of a GPU
    threads: int  # that summed; 0 on a GPU

    def differences(self, before: Origin) -> list[str]:
        """Say what is not as it was when the picture was drawn."""
        names = {"model_id": "the model", "torch": "torch", "device": "the device", "threads": "the number of threads"}
        return [
            f"{what} was {getattr(before, name)!r} and is {getattr(self, name)!r}"
            for name, what in names.items()
            if getattr(before, name) != getattr(self, name)
        ]


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """All that a picture depends on."""

    options: Mapping[str, Any]  # of SampleConfig, as they were resolved; the seed is the picture's own
    seeds: tuple[int, ...]  # of all pictures of its batch: the last bits depend on it
    place: int  # of the picture among them, from 0
    loras: tuple[LoRARecord, ...]
    origin: Origin

    def has_local_model(self, name: str) -> bool:
        """Whether this is the model's name, and it was a folder or a file of which no more than the name is known."""
        return name == self.options.get("model") and self.origin.model_id.startswith("sha256:")


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of SampleConfig's options that say what a picture looks like."""
    return {name: value for name, value in options.items() if name not in _NOT_RECORDED}


def to_json(record: PictureRecord) -> str:
    """The record as one line of text."""
    return json.dumps({"version": FORMAT_VERSION, **asdict(record)}, ensure_ascii=False, allow_nan=False)


def read_record(path: Path) -> PictureRecord:
    """Read the record in a PNG. The options in it are not checked here.

    Raises:
        UsageError: the file is no PNG, has no record, or a damaged one, or one of a later version.
    """
    where = f"--from-png {path}"
    from PIL import Image  # not before it is needed: --help is to be quick

    if not path.is_file():
        raise UsageError(f"{where}: no such file.")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(KEYWORD)
    except Exception as error:  # decoders raise what they like on damaged files
        raise UsageError(f"{where}: cannot be read as a PNG. Give a picture that sample.py wrote.") from error
    if not isinstance(text, str):
        if path.name == "grid.png":
            raise UsageError(f"{where}: {path.name} has no record: give one of the pictures beside it.")
        raise UsageError(
            f"{where}: has no record of minisd in it, for another program wrote it, or changed it. "
            "What others wrote about it can be given as options."
        )
    try:
        raw = json.loads(text)
        if raw.pop("version") != FORMAT_VERSION:
            raise UsageError(f"{where}: its record is of another version of minisd. Update minisd.")
        return _checked(raw)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: its record is damaged. Take the original file.") from error


def _checked(raw: dict[str, Any]) -> PictureRecord:
    """A record of values of the right types. Raises ValueError, KeyError or TypeError."""
    origin, loras = Origin(**raw["origin"]), tuple(LoRARecord(**lora) for lora in raw["loras"])
    record = PictureRecord(**{**raw, "seeds": tuple(raw["seeds"]), "loras": loras, "origin": origin})
    right = [
        isinstance(record.options, dict) and not record.options.keys() & _NOT_RECORDED,  # nor may it say where to write
        all(type(seed) is int and 0 <= seed < 2**63 for seed in record.seeds),
        type(record.place) is int and 0 <= record.place < len(record.seeds),
        all(type(value) is (int if name == "threads" else str) for name, value in asdict(origin).items()),
        all(Path(lora.name).name == lora.name and type(lora.sha256) is str for lora in loras),  # looked for by name
        all(math.isfinite(lora.strength) for lora in loras),
    ]
    if not all(right):
        raise ValueError("a value of the wrong type")
    return record
