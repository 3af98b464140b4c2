"""Which LoRAs a picture is drawn with: those of the options, the one trained last, or those of an earlier picture."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisd.a1111_text import quoted
from minisd.config import DEFAULT_OUTPUT
from minisd.errors import UsageError, WeightsError, one_line
from minisd.lora_info import public_name
from minisd.lora_reader import read_lora_info
from minisd.picture_record import LoRARecord, PictureRecord
from minisd.sample_config import SampleConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoRAChoice:
    """A LoRA and its strength.

    Attributes:
        path: a file, or a folder of PEFT's.
        lora_scale: its strength; may be negative.
        sha256: of the file; of a folder, of its two files one after the other.
        short_hash: what A1111 calls the file's hash: of its tensors, without the header.
    """

    path: Path
    lora_scale: float
    sha256: str
    short_hash: str

    @property
    def name(self) -> str:
        """What it is called in a prompt of A1111."""
        return self.path.absolute().name.removesuffix(".safetensors")

    def record(self, factor: float) -> LoRARecord:
        """What is written into a picture. No folder: it is private."""
        return LoRARecord(name=self.path.absolute().name, sha256=self.sha256, strength=self.lora_scale * factor)


def chosen_loras(config: SampleConfig, record: PictureRecord | None) -> list[LoRAChoice]:
    """The LoRAs asked for, those of the picture to repeat, or the one trained last if it is for the model asked for.

    Raises:
        UsageError: a strength is no number, or a LoRA of the picture is not here or is another file now.
        WeightsError: a file that was asked for is not there, or the one trained last cannot be read.
    """
    if config.lora == ("none",):
        return []
    asked = [with_strength(text) for text in config.lora]
    if record is not None:
        return _of_picture(config, record, asked)
    trained = DEFAULT_OUTPUT / "lora.safetensors"
    if not asked and trained.is_file():
        # Without --model the LoRA says which one. One that it was merged into must not get it a second time.
        base = read_lora_info(trained).base_model
        if config.model is None or base == public_name(config.model) != "":
            asked = [(trained, None)]
        else:
            whose = one_line(base) or "a model it does not name"
            log.info("LoRA: none; %s is for %s, give it with --lora to use it", trained, whose)
    return [LoRAChoice(path, 1.0 if strength is None else strength, *_hashes(path)) for path, strength in asked]


def prompt_with_loras(prompt: str, loras: Sequence[LoRAChoice], factor: float) -> str:
    """A prompt as A1111 would have to be given it: it names LoRAs at its end."""
    return " ".join([prompt, *(f"<lora:{lora.name}:{lora.lora_scale * factor:g}>" for lora in loras)])


def lora_hashes(loras: Sequence[LoRAChoice]) -> list[str]:
    """A1111's line about them for a picture's text; none without LoRAs."""
    hashes = ", ".join(f"{lora.name}: {lora.short_hash}" for lora in loras)
    return [f"Lora hashes: {quoted(hashes)}"] if hashes else []


def with_strength(text: str) -> tuple[Path, float | None]:
    """Take "PATH" or "PATH:SCALE" apart; None if there is no scale.

    Raises:
        UsageError: the scale is no finite number.
        WeightsError: there is no such file.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        path, scale = text, "1"
    try:
        strength = float(scale)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageError(f"LoRA {text}: expected PATH or PATH:SCALE, such as style.safetensors:0.8.")
    if not Path(path).exists():
        raise WeightsError(f"LoRA {path}: no such file.")
    return Path(path), None if path == text else strength


def _hashes(path: Path) -> tuple[str, str]:
    """The two hashes of a LoRAChoice. Raises WeightsError."""
    if (path / "model_index.json").exists() and not (path / "adapter_model.safetensors").exists():
        raise WeightsError(f"{path}: a model folder: pass it with --model.")
    files = [path / "adapter_model.safetensors", path / "adapter_config.json"] if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file}: no such file. Give a LoRA file, or a whole folder of PEFT's.")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                whole.update(block)
    with files[0].open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        opened.seek(min(8 + length, files[0].stat().st_size))  # behind the header; a damaged one is refused later
        tensors = hashlib.file_digest(opened, "sha256")
    return whole.hexdigest(), tensors.hexdigest()[:12]


def _of_picture(
    config: SampleConfig, record: PictureRecord, asked: Sequence[tuple[Path, float | None]]
) -> list[LoRAChoice]:
    """The picture's LoRAs, each found by its hash among those asked for, or by its name in the usual places."""
    given = [(path, strength, _hashes(path)) for path, strength in asked]
    for path, _, (sha256, _) in given:
        if sha256 not in {lora.sha256 for lora in record.loras}:
            raise UsageError(
                f"--lora {path}: {config.from_png} was not drawn with this file. Leave it out, or give the picture's "
                "options without --from-png."
            )
    chosen = []
    for lora in record.loras:
        places = [path for path in (Path(lora.name), DEFAULT_OUTPUT / lora.name) if path.exists()]
        candidates = [*given, *((path, None, _hashes(path)) for path in places)]
        found = next((candidate for candidate in candidates if candidate[2][0] == lora.sha256), None)
        if found is None:
            why = f"{places[0]} is another file now" if places else "it is not here"
            raise UsageError(
                f"--from-png {config.from_png}: it was drawn with the LoRA {lora.name!r} (sha256 {lora.sha256[:10]}); "
                f"{why}. Give that file with --lora PATH, or --lora none to draw without."
            )
        path, strength, hashes = found
        chosen.append(LoRAChoice(path, lora.strength if strength is None else strength, *hashes))
    return chosen
