"""The layout of cloneofsimo/lora, whose tensors are numbered: "unet:12:up" is of the thirteenth layer it adapted.

The numbers follow the order in which diffusers 0.11 had its modules, and that order is written down here: the blocks of
the UNet down, up and, last, in the middle; in each the self-attention, the gated half of the feed-forward layer, the
attention over the prompt; in CLIP's attention k, v, q, out. Pure functions of names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from minisd.errors import WeightsError

_KEY = re.compile(r"(unet|text_encoder):(\d{1,6}):(up|down)")
_IN_BLOCK = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "ff.net.0.proj",
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)
_IN_LAYER = ("k_proj", "v_proj", "q_proj", "out_proj")
_WAYS = ("down_blocks", "up_blocks", "mid_block")
# The classes whose layers are adapted; the header lists them. The "extended" kind adapts ResnetBlock2D, too.
_KINDS = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}


def parse_positional(key: str) -> tuple[str, str, str] | None:
    """Split "unet:12:up" into part, number (without leading zeros) and piece; None for another key."""
    found = _KEY.fullmatch(key)
    return None if found is None else (found[1], str(int(found[2])), found[3])


def numbered_layer(part: str, number: int) -> str:
    """What the layer of this number is called within its block: for example "attn2.to_k" of a UNet."""
    names = _IN_BLOCK if part == "unet" else _IN_LAYER
    return names[number % len(names)]


def numbered_layers(part: str, paths: Iterable[str]) -> list[str]:
    """The layers of a network in the order of their numbers.

    Args:
        part: "unet" or "text_encoder".
        paths: of the network's layers.
    """
    blocks = {path.partition(mark)[0] for path in paths for mark in (".attn1.", ".self_attn.") if mark in path}
    if part == "unet":
        return [f"{block}.{layer}" for block in sorted(blocks, key=_unet_order) for layer in _IN_BLOCK]
    return [f"{block}.self_attn.{layer}" for block in sorted(blocks, key=_numbers_in) for layer in _IN_LAYER]


def check_kinds(metadata: Mapping[str, str]) -> None:
    """Refuse a file that numbers other layers. Raises WeightsError."""
    for part, kinds in _KINDS.items():
        try:
            said = set(json.loads(metadata[part])) if part in metadata else kinds
        except (ValueError, TypeError, RecursionError) as error:
            raise WeightsError(f"the header's {part!r} is not a list of classes. Get the file again.") from error
        if said != kinds:
            odd = ", ".join(sorted(map(str, said)))[:200]
            raise WeightsError(
                f"not supported: its numbered layers are those of {odd} in the {part}; supported are those of "
                f"{', '.join(sorted(kinds))}. Convert it to kohya's layout with the program that wrote it."
            )


def embedding_tokens(metadata: Mapping[str, str]) -> set[str]:
    """The keys of the file that are vectors of a new token ("<s1>"), which the header flags."""
    return {name for name, value in metadata.items() if value == "<embed>"}


def _unet_order(block: str) -> tuple[int, list[int]]:
    return _WAYS.index(block.partition(".")[0]), _numbers_in(block)


def _numbers_in(block: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", block)]
