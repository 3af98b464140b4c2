"""Weights from safetensors files into a network without weights, where every key must fit.

A weight left at random, a key without a place, a tensor of another shape: each is an error that says what the file
probably is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.errors import WeightsError
from minisd.ldm_keys import Place
from minisd.model_files import TensorInfo, read_header, read_tensors

Shape = tuple[int, ...]

# The same numbers are a linear layer in one layout and a 1 x 1 convolution in another, for these layers only.
_LINEAR_OR_CONV = re.compile(r"\.attentions\.\d+\.(proj_in|proj_out|to_q|to_k|to_v|to_out\.0)\.weight")


def fill(
    network: nn.Module,
    files: Sequence[Path],
    rename: Callable[[str], str | Place | None],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    complaint: str,
) -> None:
    """Give a network built on the meta device the weights in safetensors files, and freeze it in eval mode.

    One stored tensor after the other is read and cast, so that the weights are never in memory twice.

    Args:
        network: filled in place; its state_dict says which keys and shapes the files must have.
        files: where the weights are; together they must hold each key once.
        rename: a key of the files -> the network's, or its place there, or None for a key to ignore.
        dtype: what the weights are cast to. Files mix dtypes in the wild.
        device: where the weights go.
        complaint: how the error begins when keys or shapes do not fit.

    Raises:
        WeightsError: a key or shape does not fit, or a file is damaged.
    """
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    shapes: dict[str, Shape] = {}
    places: dict[Path, dict[str, Place]] = {}  # file -> name in the file -> its place in the network
    for path in files:
        places[path] = {}
        for name, info in read_header(path).tensors.items():
            renamed = rename(name)
            if renamed is None:
                continue
            place = Place((renamed,)) if isinstance(renamed, str) else renamed
            places[path][name] = place
            for key, shape in _shapes_at(place, _checked_shape(path, name, info)):
                if key in shapes:
                    raise WeightsError(f"{path}: {name[:100]!r} is there a second time. Download the model again.")
                shapes[key] = shape
    misfit = _misfit(expected, shapes)
    if misfit:
        raise WeightsError(f"{complaint}: {misfit}")

    state: dict[str, Tensor] = {}
    for path, by_name in places.items():
        for name, tensor in read_tensors(path, by_name):
            place = by_name[name]
            value = tensor.to(device, dtype)
            # The sum first: it reads each number once, and is finite unless one is not or the sum is too large.
            if not value.sum().isfinite() and not value.isfinite().all():
                raise WeightsError(f"{path}: {name!r} has values that are NaN, infinite or too large for {dtype}.")
            if place.transposed:
                value = value.T.contiguous()
            # A part of a tensor would keep all of it in memory, and cannot be saved: each becomes one of its own.
            parts = [part.clone() for part in value.chunk(len(place.keys))] if len(place.keys) > 1 else [value]
            for key, part in zip(place.keys, parts, strict=True):
                state[key] = part.reshape(expected[key])
    network.load_state_dict(state, strict=True, assign=True)
    network.to(device).requires_grad_(False).eval()
    assert not any(tensor.is_meta for tensor in chain(network.parameters(), network.buffers()))


def _shapes_at(place: Place, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """The keys that a stored tensor becomes, with their shapes."""
    if place.transposed:
        shape = shape[::-1]
    if len(place.keys) > 1:
        length, rest = divmod(shape[0], len(place.keys)) if shape else (0, 0)
        shape = (0 if rest else length, *shape[1:])  # 0 fits nowhere
    for key in place.keys:
        yield key, shape


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
        return "This is a single-file checkpoint: give the file itself as the model."
    if shapes.get("conv_in.weight", ())[1:2] == (9,):
        return "This is an inpainting UNet (9 input channels), which is not supported."
    if incomplete:
        return "The file is incomplete: download the model again."
    widths = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and len(shape) == 2}
    family = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}.get(widths.pop()) if len(widths) == 1 else None
    if family:
        return f"The weights are of the {family} family; the configuration is of another."
    return "The configuration and the weights are of different models."
