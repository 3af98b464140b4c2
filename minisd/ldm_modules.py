"""The names that the modules of a UNet have in the original code (LDM, SGM), which single files and LoRAs of SDXL use.

Levels and layers are numbered through there ("input_blocks.4.1") instead of nested ("down_blocks.1.attentions.0").
Pure functions of names, in the one direction that is unambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Modules outside the blocks, and inside a residual block: the name here -> the original.
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_IN_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
_MODULE = re.compile(
    r"(?:(?P<way>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)(?:\.(?P<inner>.+))?"
)


@dataclass(frozen=True)
class UNetLayout:
    """What the numbers depend on: residual blocks of a level on the way down (one more on the way up), and which
    levels on the way up have attention.
    """

    layers_per_block: int
    attention_up: tuple[bool, ...]


SDXL_LAYOUT = UNetLayout(layers_per_block=2, attention_up=(True, True, False))


def layout_of(modules: Iterable[str]) -> UNetLayout:
    """Find the layout in the names of all modules of a UNet, as `named_modules` gives them."""
    names = set(modules)
    layers, levels = 0, 0
    while f"down_blocks.0.resnets.{layers}" in names:
        layers += 1
    while f"up_blocks.{levels}" in names:
        levels += 1
    return UNetLayout(layers, tuple(f"up_blocks.{level}.attentions.0" in names for level in range(levels)))


def ldm_module_name(module: str, layout: UNetLayout) -> str:
    """Translate the path of a module with weights, or of a part of it.

    For example "down_blocks.1.attentions.0.proj_in" -> "input_blocks.4.1.proj_in".

    Raises:
        ValueError: a UNet of this layout has no such module.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    found = _MODULE.fullmatch(module)
    name = None if found is None else _in_block(found, layout)
    if name is None:
        raise ValueError(
            f"{module[:100]!r} is not a module with weights of a UNet, so the original code has no name for it"
        )
    return name


def _in_block(found: re.Match[str], layout: UNetLayout) -> str | None:
    """The name of a module that the pattern has taken apart; None if there is none."""
    way, kind, number, inner = found["way"], found["kind"], int(found["number"]), found["inner"]
    level = int(found["level"] or 0)
    each = layout.layers_per_block + 1  # with a downsampler, or one block more on the way up
    if level >= len(layout.attention_up):
        return None
    if (way, kind, number, inner) == ("down", "downsamplers", 0, "conv"):
        return f"input_blocks.{each * (level + 1)}.0.op"
    if (way, kind, number, inner) == ("up", "upsamplers", 0, "conv"):
        return f"output_blocks.{each * (level + 1) - 1}.{2 if layout.attention_up[level] else 1}.conv"
    if kind == "resnets":
        inner = IN_RESNET.get(inner or "")
    if inner is None or kind in ("downsamplers", "upsamplers"):
        return None
    if way is None:
        place = _IN_MIDDLE.get((kind, number))
        return None if place is None else f"middle_block.{place}.{inner}"
    place = 0 if kind == "resnets" else 1
    if way == "down":
        return f"input_blocks.{1 + each * level + number}.{place}.{inner}"
    return f"output_blocks.{each * level + number}.{place}.{inner}"
