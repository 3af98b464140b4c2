"""What a LoRA file says about itself in its header: the base it needs, its trigger word, how it was made.

Text fields under three prefixes: `ss_` (kohya sd-scripts, which other programs show), `modelspec.` (the Stability AI
model metadata standard) and `minisd.` (what neither has room for). No dates, so that equal runs write equal files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from minisd.errors import WeightsError

FORMAT_VERSION = 1

# By the width of the prompts the UNet reads, which every LoRA of attention shows in its shapes.
FAMILIES = {64: "pocket", 768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}

# kohya's name of a base -> the model metadata standard's.
_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "pocket": "minisd-pocket",
}


@dataclass(frozen=True, kw_only=True)
class LoRAInfo:
    """What a LoRA needs and where it comes from. Empty or None: not known.

    `recipe` holds the settings of the run, as JSON has them. A local path is never written to a file: of `base_model`
    and of the absolute paths in `recipe` only the last component is.
    """

    base_model: str = ""  # a repo id or "pocket"
    base_commit: str = ""  # of the repo on the Hub
    base_model_version: str = ""  # "sd_v1", "sd_v2", "sd_v2_v", "sdxl_base_v1-0", "pocket"
    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    trigger: str = ""
    title: str = ""
    prediction_type: str = ""  # "epsilon" or "v_prediction"
    resolution: int | None = None
    steps: int | None = None
    seed: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


def base_model_version(cross_attention_dim: int, prediction_type: str) -> str:
    """Name the family of a base model as kohya's files do; "unknown" for a width no published model has."""
    version = {64: "pocket", 768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}.get(cross_attention_dim, "unknown")
    return "sd_v2_v" if version == "sd_v2" and prediction_type == "v_prediction" else version


def to_header(info: LoRAInfo) -> dict[str, str]:
    """Spell out a LoRAInfo as header fields, those that are not known left out.

    Raises:
        ValueError: the recipe has something that JSON has not, such as NaN.
    """
    base_model = public_name(info.base_model)
    version = info.base_model_version or "unknown"
    # kohya's own option for convolutions; its values are text, as on its command line.
    convolutions = {"conv_dim": str(info.rank), "conv_alpha": str(info.alpha)} if "conv1" in info.targets else {}
    fields: dict[str, object] = {
        "format": "pt",
        "minisd.format_version": FORMAT_VERSION,
        "minisd.base_model": base_model,
        "minisd.base_commit": info.base_commit,
        "minisd.targets": _json(info.targets),
        "minisd.trigger": info.trigger,
        "minisd.recipe": _json(info.recipe),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES.get(version, version)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": info.title,
        "modelspec.trigger_phrase": info.trigger,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(info.prediction_type, info.prediction_type),
        "modelspec.resolution": info.resolution and f"{info.resolution}x{info.resolution}",
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": info.rank,
        "ss_network_alpha": info.alpha,
        "ss_network_args": _json(convolutions),
        "ss_output_name": info.title,
        "ss_resolution": info.resolution and f"({info.resolution}, {info.resolution})",
        "ss_sd_model_name": base_model,
        "ss_seed": info.seed,
        "ss_steps": info.steps,
        "ss_v2": version.startswith("sd_v2"),
    }
    known = {name: str(value) for name, value in fields.items() if value is not None and value != ""}
    # A name of bytes that are not UTF-8 would make the whole file unreadable.
    return {name: value.encode("utf-8", "replace").decode() for name, value in known.items()}


def from_header(metadata: Mapping[str, str], *, rank: int, alpha: float, targets: tuple[str, ...]) -> LoRAInfo:
    """Read a header, of minisd or any other program.

    Args:
        metadata: the header's text fields.
        rank: as the tensors have it, which cannot be wrong.
        alpha: likewise.
        targets: what to assume where the header does not say.

    Raises:
        WeightsError: a field of minisd's is damaged, or of a later version of the format.
    """
    version = metadata.get("minisd.format_version", "1")
    if version != str(FORMAT_VERSION):
        raise WeightsError(
            f"format {version[:20]!r} of minisd's LoRA files; this one reads {FORMAT_VERSION}. Update it."
        )
    recipe = _parsed(metadata, "minisd.recipe", {})
    ours = _parsed(metadata, "minisd.targets", [])
    prediction = metadata.get("modelspec.prediction_type", "")
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    versions = {architecture: version for version, architecture in _ARCHITECTURES.items()}
    return LoRAInfo(
        base_model=metadata.get("minisd.base_model", ""),
        base_commit=metadata.get("minisd.base_commit", ""),
        base_model_version=metadata.get("ss_base_model_version") or versions.get(architecture, ""),
        rank=rank,
        alpha=alpha,
        targets=tuple(str(target) for target in ours) or targets,
        trigger=metadata.get("minisd.trigger") or metadata.get("modelspec.trigger_phrase", ""),
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name", ""),
        prediction_type="v_prediction" if prediction == "v" else prediction,
        resolution=_number(metadata.get("ss_resolution", "")),
        steps=_number(metadata.get("ss_steps", "")),
        seed=_number(metadata.get("ss_seed", "")),
        recipe=recipe,
    )


def public_name(model: str) -> str:
    """A model's name without the folders it lies in: they may hold the name of a user.

    "owner/name" stays, if no such folder is here: it is a repository on the Hub.
    """
    if re.fullmatch(r"[\w.-]*\w/[\w.-]*\w", model) and not model.startswith(".") and not Path(model).exists():
        return model
    return PureWindowsPath(model).name if not model.startswith("~") or "/" in model else ""


def _without_paths(value: Any) -> Any:
    """Turn a setting into what JSON has, absolute paths reduced to their last component."""
    if isinstance(value, Mapping):
        return {str(name): _without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and re.match(r"[/~]|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\", value)):
        return public_name(str(value))
    return value


def _json(value: object) -> str:
    try:
        return json.dumps(_without_paths(value), allow_nan=False, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"a LoRA's recipe must be JSON: {error}") from error


def _parsed(metadata: Mapping[str, str], name: str, default: Any) -> Any:
    """The JSON in a header field, of the default's type. Raises WeightsError."""
    try:
        value = json.loads(metadata[name]) if name in metadata else default
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the header's {name} is not JSON. Download the file again.") from error
    if not isinstance(value, type(default)):
        raise WeightsError(f"the header's {name} is not a JSON {type(default).__name__}. Download the file again.")
    return value


def _number(text: str) -> int | None:
    """The first whole number in "(512, 512)", "512,512", "1000"; None in "None"."""
    found = re.match(r"\(?(-?\d{1,18})\b", text)
    return int(found[1]) if found else None
