"""Weights from safetensors files into a network without weights, where every key must fit.

A weight left at random, a key without a place, a tensor of another shape: each is an error that says what the file
probably is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from minisd.errors import WeightsError
from minisd.model_files import TensorInfo, read_header, read_tensors

Shape = tuple[int, ...]

# The same numbers are a linear layer in one layout and a 1 x 1 convolution in another, for these layers only.
_LINEAR_OR_CONV = re.compile(r"\.attentions\.\d+\.(proj_in|proj_out|to_q|to_k|to_v|to_out\.0)\.weight")


def fill(
    network: nn.Module,
    files: Sequence[Path],
    rename: Callable[[str], str | None],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Give a network built on the meta device the weights in safetensors files, and freeze it in eval mode.

    Args:
        network: filled in place; its state_dict says which keys and shapes the files must have.
        files: where the weights are; together they must hold each key once.
        rename: a key of the files -> the network's, or None for a key to ignore.
        dtype: what the weights are cast to. Files mix dtypes in the wild.
        device: where the weights go.

    Raises:
        WeightsError: a key or shape does not fit, or a file is damaged.
    """
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    shapes: dict[str, Shape] = {}
    names: dict[Path, dict[str, str]] = {}  # file -> name in the file -> key of the network
    for path in files:
        names[path] = {}
        for name, info in read_header(path).tensors.items():
            key = rename(name)
            if key is None:
                continue
            if key in shapes:
                raise WeightsError(f"{path}: {name[:100]!r} is there a second time. Download the model again.")
            names[path][name], shapes[key] = key, _checked_shape(path, name, info)
    misfit = _misfit(expected, shapes)
    if misfit:
        raise WeightsError(f"{files[0].parent}: the weights do not fit config.json: {misfit}")

    state = {}
    for path, keys in names.items():
        for name, tensor in read_tensors(path, keys):
            value = tensor.reshape(expected[keys[name]]).to(device, dtype)
            # The sum first: it reads each number once, and is finite unless one is not or the sum is too large.
            if not value.sum().isfinite() and not value.isfinite().all():
                raise WeightsError(f"{path}: {name!r} has values that are NaN, infinite or too large for {dtype}.")
            state[keys[name]] = value
    network.load_state_dict(state, strict=True, assign=True)
    network.to(device).requires_grad_(False).eval()
    assert not any(tensor.is_meta for tensor in chain(network.parameters(), network.buffers()))


def _checked_shape(path: Path, name: str, info: TensorInfo) -> Shape:
    if info.dtype not in ("F64", "F32", "F16", "BF16"):
        kinds = "only float32, float16, bfloat16 and float64 are"
        raise WeightsError(f"{path}: {name[:100]!r} is stored as {info.dtype[:20]}, which is not supported ({kinds}).")
    return info.shape


def _misfit(expected: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> str:
    """Describe how a file's keys and shapes differ from the network's, with the likely cause; "" if they do not."""
    missing = [key for key in expected if key not in shapes]
    unexpected = [key[:100] for key in shapes if key not in expected]
    reshaped = [
        f"{key} (expected {list(expected[key])}, got {list(shape)})"
        for key, shape in shapes.items()
        if key in expected and not _same_numbers(key, expected[key], shape)
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    parts = [
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" for kind, keys in found if keys
    ]
    if not parts:
        return ""
    return f"{'; '.join(parts)}. {_likely_cause(shapes, incomplete=len(parts) == 1 and bool(missing))}"


def _same_numbers(key: str, expected: Shape, got: Shape) -> bool:
    if expected == got:
        return True
    linear, conv = sorted((expected, got), key=len)  # [out, in] and [out, in, 1, 1]
    return bool(_LINEAR_OR_CONV.search(key)) and len(linear) == 2 and conv[:2] == linear and set(conv[2:]) == {1}


def _likely_cause(shapes: Mapping[str, Shape], *, incomplete: bool) -> str:
    """Guess what a file is whose keys do not fit."""
    if any("lora" in key for key in shapes):
        return "This is a LoRA, not a model: pass it with --lora."
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for key in shapes):
        return "This is a single-file checkpoint under another name; it cannot be read yet."
    if "add_embedding.linear_1.weight" in shapes:
        return "These are weights of Stable Diffusion XL, which is not supported."
    if shapes.get("conv_in.weight", ())[1:2] == (9,):
        return "This is an inpainting UNet (9 input channels), which is not supported."
    if incomplete:
        return "The file is incomplete: download the model again."
    widths = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and len(shape) == 2}
    family = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}.get(widths.pop()) if len(widths) == 1 else None
    if family:
        return f"The weights are of the {family} family; config.json is of another."
    return "config.json and the weights are of different models."
