"""The names that programs give to the tensors of a LoRA, and where they keep its alpha. Pure functions, no files.

| written by                   | key of attn1.to_q in the UNet             | alpha                       |
|------------------------------|-------------------------------------------|-----------------------------|
| kohya sd-scripts, minisd     | lora_unet_..._attn1_to_q.lora_down.weight | ....alpha; absent: the rank |
| diffusers                    | unet....attn1.to_q.lora.down.weight       | header; absent: the rank    |
| diffusers, from PEFT's keys  | [unet.]...attn1.to_q.lora_A.weight        | header; absent: the rank    |
| PEFT                         | base_model.model....attn1.to_q.lora_A...  | adapter_config.json         |
| diffusers before 0.20        | ....attn1.processor.to_q_lora.down.weight | the rank                    |
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

PEFT_PREFIX = "base_model.model."

_PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_TEXT_ENCODER = re.compile(r"lora_te[123]?_|text_encoder(_[23])?\.|text_model\.|encoder\.layers\.")

# In a key -> what it is. None of these is the product of two matrices, so loading a part would change the picture.
_UNSUPPORTED = {
    "hada_": "LyCORIS LoHa",
    "lokr_": "LyCORIS LoKr",
    "lora_mid": "LyCORIS LoCon with a core tensor (lora_mid)",
    "oft_": "OFT",
    "boft_": "BOFT",
    "glora": "GLoRA",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".diff": "a full difference of weights",
    "lora_embedding": "a LoRA of embeddings",
    ".lora_B.bias": "a LoRA with biases",
}


class LoRAModule(NamedTuple):
    """An adapted module, under a LoRA file's name for it."""

    in_text_encoder: bool
    name: str


def parse_key(key: str) -> tuple[LoRAModule, str] | None:
    """Understand a key as a module and its part, "down", "up" or "alpha"; None if it is none of a LoRA."""
    suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix).removeprefix(PEFT_PREFIX)
    if _TEXT_ENCODER.match(name):
        return LoRAModule(True, name), _PARTS[suffix]
    return LoRAModule(False, name.removeprefix("lora_unet_").removeprefix("unet.")), _PARTS[suffix]


def flat_name(module: str) -> str:
    """A module's name in the one spelling that all dialects can be brought to.

    kohya's "_" for "." cannot be undone ("to_q" has one of its own), so files and models meet in the flat spelling.
    """
    flat = module.replace(".processor.", ".").replace("_processor_", "_").replace(".", "_")
    return f"{flat}_0" if flat.endswith("_to_out") else flat  # old files leave out the index in "to_out.0"


def unsupported(keys: Iterable[str]) -> str | None:
    """Name the kind of a file that is not a plain LoRA, or is laid out in a way that is not read."""
    for key in keys:
        if re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", key):
            return "the layout of cloneofsimo/lora, whose tensors are numbered instead of named"
        for mark, kind in _UNSUPPORTED.items():
            if mark in key:
                return kind
    return None


def family_by_keys(keys: Iterable[str]) -> str | None:
    """The family of base models that these keys betray, where the names alone do."""
    for key in keys:
        if re.match(r"lora_te[12]_|text_encoder_2\.|lora_unet_(input|output)_blocks_", key):
            return "SDXL"
        if re.match(r"(lora_)?transformer[._]|(lora_unet_|diffusion_model\.|unet\.)?(double|single|joint)_blocks", key):
            return "FLUX or SD 3"
    return None


def header_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The UNet's part of a PEFT configuration that may hold several, as diffusers writes it into the header."""
    parts = {name.removeprefix("unet."): value for name, value in config.items() if name.startswith("unet.")}
    return parts or dict(config)


def peft_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha of a module under a PEFT configuration.

    Raises:
        ValueError: the configuration asks for something else than a plain LoRA, or is damaged.
    """
    others = [name for name, value in config.items() if name.startswith("use_") and value and name != "use_rslora"]
    if others:
        raise ValueError(f"PEFT's {others[0]} is not supported")
    alpha = config.get("lora_alpha")
    for pattern, value in _mapping(config.get("alpha_pattern")).items():
        # PEFT takes regular expressions here, of which programs only ever write plain names.
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"alpha_pattern {pattern[:100]!r} is not a plain name, which is not supported")
        if f".{module}".endswith(f".{name}"):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"lora_alpha must be a number, got {str(alpha)[:100]!r}")
    # Rank-stabilised LoRA (arXiv:2312.03732) divides by sqrt(r) instead of r.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError("alpha_pattern must be an object")
    return value or {}


def target_names(modules: Collection[str]) -> tuple[str, ...]:
    """What a run probably called its targets: the ends of the paths, below the block they repeat in."""
    numbered = r"(transformer_blocks|attentions|resnets|down_blocks|up_blocks)[._]\d+"
    block = re.compile(rf"^(.*[._])?(attn[12]|{numbered})[._]")
    return tuple(sorted({block.sub("", module) for module in modules}))
