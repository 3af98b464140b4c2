"""The names that programs give to the tensors of a LoRA, and where they keep its alpha. Pure functions, no files.

| written by                   | key of attn1.to_q in the UNet             | alpha                       |
|------------------------------|-------------------------------------------|-----------------------------|
| kohya sd-scripts, minisd     | lora_unet_..._attn1_to_q.lora_down.weight | ....alpha; absent: the rank |
| diffusers                    | unet....attn1.to_q.lora.down.weight       | header; absent: the rank    |
| diffusers, from PEFT's keys  | [unet.]...attn1.to_q.lora_A.weight        | header; absent: the rank    |
| PEFT                         | base_model.model....attn1.to_q.lora_A...  | adapter_config.json         |
| diffusers before 0.20        | ....attn1.processor.to_q_lora.down.weight | the rank                    |
| cloneofsimo/lora             | unet:0:down (lora_positional.py)          | the rank                    |

In kohya's files the blocks of the UNet have diffusers' names or those of the original code (ldm_modules.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from minisd.lora_positional import numbered_layer, parse_positional

PEFT_PREFIX = "base_model.model."
FLUX = "FLUX or SD 3"  # a family that is not supported

_PIECES = {
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
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
}
# Start of a module's name -> the network it is in. What has none of them is in the UNet. The third text encoder, of
# SD 3, is here for the message.
_NETWORKS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_TEXT_WITHOUT_PREFIX = ("text_model.", "encoder.layers.")

# In a key with a dot behind it -> what it is. None of these is the product of two matrices, so loading a part would
# change the picture.
_UNSUPPORTED = {
    "hada_": "LyCORIS LoHa",
    "lokr_": "LyCORIS LoKr",
    "lora_mid": "LyCORIS LoCon with a core tensor (lora_mid)",
    "boft_": "BOFT",
    "oft_": "OFT",
    "glora": "GLoRA",
    ".a1.weight": "GLoRA",
    ".diff.": "a full difference of weights",
    ".diff_b.": "a full difference of weights",
    ".w_norm": "a difference of norms",
    "lora_embedding": "a LoRA of embeddings",
    ".lora_B.bias": "a LoRA with biases",
    "bundle_emb": "a LoRA with kohya's bundled embeddings",
}


class LoRAModule(NamedTuple):
    """An adapted module: the network it is in ("unet", "text_encoder", "text_encoder_2") and the file's name for it."""

    part: str
    name: str

    @property
    def label(self) -> str:
        """For messages."""
        if self.numbered:
            return f"{self.part}:{self.name}"
        return self.name if self.part == "unet" else f"{self.part}: {self.name}"

    @property
    def numbered(self) -> bool:
        """Whether the name is a number, as cloneofsimo/lora has it."""
        return len(self.name) <= 6 and self.name.isdecimal()

    @property
    def ending(self) -> str:
        """Its name; of a numbered module, as much of its end as the number tells without the model."""
        return numbered_layer(self.part, int(self.name)) if self.numbered else self.name


def parse_key(key: str) -> tuple[LoRAModule, str] | None:
    """Understand a key as a module and its piece ("down", "up", "alpha", "magnitude"); None if it is none of a LoRA."""
    positional = parse_positional(key)
    if positional is not None:
        part, number, piece = positional
        return LoRAModule(part, number), piece
    suffix = next((suffix for suffix in _PIECES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix).removeprefix(PEFT_PREFIX)
    for prefix, part in _NETWORKS.items():
        if name.startswith(prefix):
            return LoRAModule(part, name.removeprefix(prefix)), _PIECES[suffix]
    part = "text_encoder" if name.startswith(_TEXT_WITHOUT_PREFIX) else "unet"
    return LoRAModule(part, name), _PIECES[suffix]


def flat_name(part: str, module: str) -> str:
    """A module's name in the one spelling that all dialects can be brought to.

    kohya's "_" for "." cannot be undone ("to_q" has one of its own), so files and models meet in the flat spelling.
    """
    flat = module.replace(".processor.", ".").replace("_processor_", "_").replace(".", "_")
    if part == "unet":
        return f"{flat}_0" if flat.endswith("_to_out") else flat  # old files leave out the index in "to_out.0"
    # "text_model." is in most files and, by version, in transformers' networks; old diffusers said "to_q" here, too.
    flat = re.sub(r"_to_out(_0)?$", "_out_proj", flat.removeprefix("text_model_"))
    return re.sub(r"_to_([qkv])$", r"_\1_proj", flat)


def unsupported(keys: Iterable[str]) -> str | None:
    """Name the kind of a file that has more, or other things, than plain LoRA and DoRA."""
    return next((kind for key in keys for mark, kind in _UNSUPPORTED.items() if mark in f"{key}."), None)


def family_by_keys(keys: Collection[str]) -> str | None:
    """The family of base models that these keys betray, where the names alone do."""
    transformer = r"(lora_)?transformer[._]|(lora_unet_|diffusion_model\.|unet\.)?(double|single|joint)_blocks"
    for pattern, family in {
        rf"{transformer}|lora_te3_|text_encoder_3\.": FLUX,
        r"lora_te2_|text_encoder_2\.|lora_unet_(input|output)_blocks_": "SDXL",
    }.items():
        if any(re.match(pattern, key) for key in keys):
            return family
    return None


def target_names(modules: Collection[str]) -> tuple[str, ...]:
    """What a run probably called its targets: the ends of the paths, below the block they repeat in."""
    numbered = r"(transformer_blocks|attentions|resnets|(down|up)_blocks|(input|output)_blocks_\d+|middle_block)[._]\d+"
    block = re.compile(rf"^(.*[._])?(attn[12]|{numbered}|layers[._]\d+[._](self_attn|mlp))[._]")
    return tuple(sorted({block.sub("", module) for module in modules}))
