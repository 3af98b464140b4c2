"""Which layers of a model get an adapter, and the weights an adapter starts with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from minisd.lora_layers import LoRAConv2d, LoRALinear, LoRAWeights

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")

# What --lora-targets stands for: path suffixes in the UNet.
TARGETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+ff": (*_ATTENTION, *_FEED_FORWARD),
    # What kohya's LoCon adapts: all linear layers and convolutions but conv_in, conv_out and the time embedding.
    "all": (
        *_ATTENTION,
        *_FEED_FORWARD,
        *("proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path -> layer for every layer that can have an adapter, in the model's order."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, LoRALinear)
        or (type(module) in (nn.Conv2d, LoRAConv2d) and module.groups == 1)  # B A has no groups
    }


def chosen_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers whose path ends in a target, in the model's order.

    Args:
        model: with or without adapters.
        targets: path suffixes in whole components: "to_out.0" is in "mid.attn1.to_out.0", "out.0" is not. A preset of
            TARGETS is for any UNet and takes what there is; of targets put together by hand each must be there.

    Raises:
        ValueError: there are no targets, or one matches nothing.
    """
    if not targets:
        raise ValueError("LoRA targets: got none; allowed are path suffixes such as 'to_q'")
    layers = adaptable_layers(model)
    missing = [target for target in targets if not any(_ends_in(path, target) for path in layers)]
    if missing and (tuple(targets) not in TARGETS.values() or len(missing) == len(targets)):
        words = {path.split(".")[-1] for path in layers}
        allowed = ", ".join(sorted(word for word in words if not word.isdigit()))
        raise ValueError(
            f"LoRA target {missing[0]!r} matches no linear layer or convolution; layers of this model are: {allowed}"
        )
    return {path: layer for path, layer in layers.items() if any(_ends_in(path, target) for target in targets)}


def initial_weights(layer: nn.Linear | nn.Conv2d, path: str, rank: int, alpha: float, seed: int) -> LoRAWeights:
    """A uniform in +-1 / sqrt(in * kh * kw), as in the paper's own code (the paper has normal numbers), and B zero.

    Drawn on the CPU in float32: every device and dtype starts alike.

    Args:
        layer: its shape counts.
        path: of the layer: each starts with draws of its own.
        rank: r, from 1 to the smaller side of the weight as a matrix [out, in * kh * kw]; a larger one adds nothing.
        alpha: the change is multiplied by alpha / rank.
        seed: of A, together with the path.

    Raises:
        ValueError: rank or alpha is out of its range.
    """
    out, *inner = layer.weight.shape
    largest = min(out, math.prod(inner))
    if not 1 <= rank <= largest:
        raise ValueError(f"LoRA rank must be from 1 to {largest}, the smaller side of {path}; got {rank}")
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    down = torch.empty(rank, *inner, dtype=torch.float32)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return LoRAWeights(down, torch.zeros(out, rank, *(1 for _ in inner[1:])), alpha)


def _ends_in(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}")
