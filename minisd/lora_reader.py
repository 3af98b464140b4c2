"""A LoRA file taken apart and checked, as far as that goes without knowing the model it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.errors import WeightsError
from minisd.lora_dialects import (
    PEFT_PREFIX,
    LoRAModule,
    family_by_keys,
    flat_name,
    header_config,
    parse_key,
    peft_alpha,
    unsupported,
)
from minisd.lora_layers import LoRAWeights
from minisd.model_files import Header, read_header, read_json, read_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class RawLoRA:
    """A LoRA file's contents, modules under the file's own names for them.

    Attributes:
        unet: module -> its adapter, on the CPU in the file's dtype.
        text_encoder: modules of text encoders, whose weights are not read.
        metadata: the header's text fields.
        guess: what base it is for: a family's name or the width of its prompts; None if nothing tells.
    """

    unet: dict[str, LoRAWeights]
    text_encoder: list[str]
    metadata: dict[str, str]
    guess: str | int | None


def read_raw(path: Path) -> RawLoRA:
    """Read a LoRA file in any dialect.

    Raises:
        WeightsError: it is damaged, incomplete, not a LoRA, or of a kind that is not supported.
    """
    header = read_header(path)
    if path.stat().st_size > _MAX_BYTES:
        raise WeightsError(f"{path}: larger than 4 GiB, which no LoRA is. Is it a model? Then pass it with --model.")
    kind = unsupported(header.tensors)
    if kind is not None:
        raise WeightsError(f"{path}: not supported: {kind}. Choose a plain LoRA, or convert it to kohya's layout.")
    modules = _modules(path, header)
    wanted = [key for module, parts in modules.items() if not module.in_text_encoder for key in parts.values()]
    tensors = {key: _checked(path, key, tensor) for key, tensor in read_tensors(path, wanted)}
    alpha_of = _alphas(path, header)
    unet: dict[str, LoRAWeights] = {}
    for module, parts in modules.items():
        if module.in_text_encoder:
            continue
        down, up = (_weight(path, parts[part], tensors[parts[part]]) for part in ("down", "up"))
        try:
            alpha = float(tensors[parts["alpha"]]) if "alpha" in parts else alpha_of(module.name, len(down))
            unet[module.name] = LoRAWeights(down, up, alpha)
        except (ValueError, RuntimeError, OverflowError) as error:
            raise WeightsError(f"{path}: {module.name[:100]!r}: {error}. Get the file again.") from error
    text_encoder = [module.name for module in modules if module.in_text_encoder]
    return RawLoRA(unet, text_encoder, header.metadata, _guess(header, unet))


def some(names: Sequence[str]) -> str:
    """Count names and show the first five."""
    shown = ", ".join(repr(name[:140]) for name in names[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})"


def _modules(path: Path, header: Header) -> dict[LoRAModule, dict[str, str]]:
    """Group the keys: module -> part ("down", "up", "alpha") -> key. Raises WeightsError."""
    unknown = [key for key in header.tensors if parse_key(key) is None]
    if unknown or not header.tensors:
        raise WeightsError(f"{path}: not a LoRA that can be read, keys of no known meaning: {some(unknown)}.")
    modules: dict[LoRAModule, dict[str, str]] = {}
    for key in header.tensors:
        parsed = parse_key(key)
        assert parsed is not None
        module, part = parsed
        parts = modules.setdefault(module, {})
        if part in parts:
            raise WeightsError(f"{path}: {key[:100]!r} is there twice, under two names. Get the file again.")
        parts[part] = key
    halves = [module.name for module, parts in modules.items() if not {"down", "up"} <= parts.keys()]
    if halves:
        raise WeightsError(f"{path}: incomplete, down or up is missing in modules: {some(halves)}. Download it again.")
    return modules


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    """A tensor of a LoRA file, if its dtype and its values are usable; alpha may be an integer."""
    alpha_too = (*DTYPES, torch.float64, torch.int64, torch.int32)
    if tensor.dtype not in (alpha_too if key.endswith(".alpha") else DTYPES):
        raise WeightsError(f"{path}: {key[:100]!r} is {tensor.dtype}; supported are float32, float16 and bfloat16.")
    if not tensor.isfinite().all():
        raise WeightsError(f"{path}: {key[:100]!r} has values that are NaN or infinite. Get the file again.")
    return tensor


def _weight(path: Path, key: str, tensor: Tensor) -> Tensor:
    """A linear layer's or a convolution's weight, as far as the number of dimensions tells."""
    if tensor.dim() not in (2, 4):
        raise WeightsError(
            f"{path}: {key[:100]!r} is no weight, its shape is {list(tensor.shape)}. Get the file again."
        )
    return tensor


def _alphas(path: Path, header: Header) -> Callable[[str, int], float]:
    """How alpha follows from a module's name and rank where it is not a tensor. Raises WeightsError."""
    text = header.metadata.get("lora_adapter_metadata")
    config: Any = None
    if text is not None:
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: its lora_adapter_metadata is not JSON. Get the file again.") from error
        if not isinstance(config, dict):
            raise WeightsError(f"{path}: its lora_adapter_metadata is not a JSON object. Get the file again.")
    elif any(key.startswith(PEFT_PREFIX) for key in header.tensors):
        beside = path.with_name("adapter_config.json")
        if not beside.exists():
            raise WeightsError(f"{path}: written by PEFT, which keeps alpha in adapter_config.json. Put it beside.")
        config = read_json(beside)
    if config is None:
        return lambda name, rank: float(rank)
    return lambda name, rank: peft_alpha(header_config(config), name, rank)


def _guess(header: Header, unet: Mapping[str, LoRAWeights]) -> str | int | None:
    """The base a file is for: by its keys, else by the width of its prompts, else by what its header says."""
    widths = {w.down.shape[1] for name, w in unet.items() if flat_name(name).endswith(("attn2_to_k", "attn2_to_v"))}
    said = header.metadata.get("ss_base_model_version")
    return family_by_keys(header.tensors) or (widths.pop() if len(widths) == 1 else said)
