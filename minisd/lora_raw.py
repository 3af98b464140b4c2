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
from minisd.lora_dialects import FLUX, PEFT_PREFIX, LoRAModule, family_by_keys, flat_name, parse_key, unsupported
from minisd.lora_layers import LoRAWeights
from minisd.lora_peft import CONFIG_FIELD, config_of, peft_alpha
from minisd.lora_positional import check_kinds, embedding_tokens
from minisd.model_files import Header, read_header, read_json, read_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_BYTES = 4 * 2**30
_WEIGHTS_OF_A_MODEL = 20  # the smallest network has more of them


@dataclass(frozen=True)
class RawLoRA:
    """A LoRA file's contents, modules under the file's own names for them.

    Attributes:
        path: the file.
        modules: module -> its adapter, on the CPU in the file's dtype.
        embeddings: token -> its vectors [n, E].
        unknown: keys of no known meaning, whose tensors are not read.
        metadata: the header's text fields.
        guess: what base it is for: a family's name or the width of its prompts; None if nothing tells.
    """

    path: Path
    modules: dict[LoRAModule, LoRAWeights]
    embeddings: dict[str, Tensor]
    unknown: list[str]
    metadata: dict[str, str]
    guess: str | int | None


def read_raw(path: Path) -> RawLoRA:
    """Read a LoRA file in any dialect, or the one in a PEFT adapter's folder.

    Raises:
        WeightsError: it is damaged, incomplete, not a LoRA, or of a kind that is not supported.
    """
    path = _file_at(path)
    header = read_header(path, convert_hint=_convert_hint(path))
    if path.stat().st_size > _MAX_BYTES:
        raise WeightsError(f"{path}: larger than 4 GiB, which no LoRA is. Is it a model? Then pass it with --model.")
    kind = unsupported(header.tensors)
    if kind is not None:
        family = family_by_keys(header.tensors)
        base = "" if family is None else f", for {family}"
        raise WeightsError(
            f"{path}: not supported: {kind}{base}. Choose a plain LoRA, or convert it to kohya's layout."
        )
    tokens = embedding_tokens(header.metadata) & header.tensors.keys()
    grouped, unknown = _grouped(path, header, tokens)
    if any(module.numbered for module in grouped):
        _check_numbered(path, header)
    wanted = [*(key for keys in grouped.values() for key in keys.values()), *tokens]
    tensors = {key: _checked(path, key, tensor) for key, tensor in read_tensors(path, wanted)}
    modules = _modules(path, grouped, tensors, _alphas(path, header))
    embeddings = {token: _vectors(path, token, tensors[token]) for token in sorted(tokens)}
    return RawLoRA(path, modules, embeddings, unknown, header.metadata, _guess(header, modules))


def some(names: Sequence[str]) -> str:
    """Count names and show the first five."""
    shown = ", ".join(repr(name[:140]) for name in names[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})"


def _file_at(path: Path) -> Path:
    """The file itself, or the adapter in a folder of PEFT's. Raises WeightsError."""
    if not path.is_dir():
        return path
    file = path / "adapter_model.safetensors"
    if file.exists():
        return file
    if (path / "adapter_model.bin").exists():
        raise WeightsError(f"{path}: its adapter_model.bin is not read. {_convert_hint(path / 'adapter_model.bin')}.")
    if (path / "model_index.json").exists():
        raise WeightsError(f"{path}: a model folder: pass it with --model.")
    raise WeightsError(f"{path}: a folder without adapter_model.safetensors. Pass the LoRA file itself.")


def _convert_hint(path: Path) -> str:
    """What to do about a pickled LoRA: converters for whole models do not take it."""
    return (
        "Pickled weights can run code when opened, so minisd never opens them; convert the LoRA in Python on a machine "
        "you can lose: import torch, safetensors.torch; safetensors.torch.save_file("
        f"torch.load({path.name!r}, map_location='cpu', weights_only=True), {path.stem + '.safetensors'!r})"
    )


def _grouped(path: Path, header: Header, tokens: set[str]) -> tuple[dict[LoRAModule, dict[str, str]], list[str]]:
    """Group the keys: module -> piece ("down", "up", "alpha", "magnitude") -> key; and the unknown ones."""
    modules: dict[LoRAModule, dict[str, str]] = {}
    unknown: list[str] = []
    for key in header.tensors:
        parsed = parse_key(key)
        if parsed is None:
            unknown += [] if key in tokens else [key]
            continue
        module, piece = parsed
        keys = modules.setdefault(module, {})
        if piece in keys:
            raise WeightsError(f"{path}: {key[:100]!r} is there twice, under two names. Get the file again.")
        keys[piece] = key
    if not modules:
        what = f"not a LoRA that can be read, keys of no known meaning: {some(unknown)}"
        is_model = sum(key.endswith(".weight") for key in unknown) >= _WEIGHTS_OF_A_MODEL
        advice = "It looks like a model: pass it with --model." if is_model else "A model is passed with --model."
        raise WeightsError(f"{path}: {what}. {advice}")
    halves = [module.label for module, keys in modules.items() if not {"down", "up"} <= keys.keys()]
    if halves:
        raise WeightsError(f"{path}: incomplete, down or up is missing in modules: {some(halves)}. Download it again.")
    return modules, unknown


def _check_numbered(path: Path, header: Header) -> None:
    try:
        check_kinds(header.metadata)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    """A tensor of a LoRA file, if its dtype and its values are usable; alpha may be an integer."""
    alpha_too = (*DTYPES, torch.float64, torch.int64, torch.int32)
    if tensor.dtype not in (alpha_too if key.endswith(".alpha") else DTYPES):
        raise WeightsError(f"{path}: {key[:100]!r} is {tensor.dtype}; supported are float32, float16 and bfloat16.")
    # The sum first: it is cheap, and finite unless a number is not or the sum is too large.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise WeightsError(f"{path}: {key[:100]!r} has values that are NaN or infinite. Get the file again.")
    return tensor


def _modules(
    path: Path,
    grouped: Mapping[LoRAModule, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    alpha_of: Callable[[LoRAModule, int, bool], float],
) -> dict[LoRAModule, LoRAWeights]:
    """Put the tensors of all modules together. Raises WeightsError, which counts those that are none."""
    modules: dict[LoRAModule, LoRAWeights] = {}
    faults: dict[str, Exception] = {}
    for module, keys in grouped.items():
        try:
            modules[module] = _weights(module, keys, tensors, alpha_of)
        except (ValueError, RuntimeError, OverflowError) as error:
            faults[module.label] = error
    if faults:
        first = next(iter(faults.values()))
        raise WeightsError(f"{path}: cannot be used: {some(list(faults))}: {first}. Get the file again.") from first
    return modules


def _weights(
    module: LoRAModule,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    alpha_of: Callable[[LoRAModule, int, bool], float],
) -> LoRAWeights:
    """Put a module's tensors together. Raises ValueError, RuntimeError or OverflowError if they are no LoRA."""
    for piece in ("down", "up"):
        shape = list(tensors[keys[piece]].shape)
        if len(shape) not in (2, 4):
            raise ValueError(f"{keys[piece][:100]!r} is no weight, its shape is {shape}")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    magnitude = tensors[keys["magnitude"]] if "magnitude" in keys else None
    if magnitude is not None:
        magnitude = _by_output(keys["magnitude"], magnitude, len(up))
    alpha = tensors[keys["alpha"]] if "alpha" in keys else alpha_of(module, len(down), magnitude is not None)
    return LoRAWeights(down, up, float(alpha), magnitude)


def _by_output(key: str, magnitude: Tensor, out: int) -> Tensor:
    """DoRA's magnitude as [out]. Raises ValueError if it is not one number for each output."""
    shape = tuple(magnitude.shape)
    if shape == (out,):
        return magnitude
    if key.endswith(".dora_scale"):  # [out, 1, ...], or, the other way round, one number for each input
        if shape[:1] == (out,) and set(shape[1:]) == {1}:
            return magnitude.flatten()
        if shape[:1] == (1,) and len(shape) > 1:
            raise ValueError(f"not supported: a DoRA with a magnitude for each input, {list(shape)}")
    elif shape == (1, out, 1, 1):  # of a convolution, as PEFT has it
        return magnitude.flatten()
    raise ValueError(f"DoRA's magnitude is expected to be one for each of {out} outputs, got {list(shape)}")


def _vectors(path: Path, token: str, tensor: Tensor) -> Tensor:
    """A token's vectors as [n, E]."""
    if tensor.dim() not in (1, 2) or not tensor.numel():
        raise WeightsError(f"{path}: {token[:100]!r} is no vector, its shape is {list(tensor.shape)}.")
    return tensor.reshape(-1, tensor.shape[-1])


def _alphas(path: Path, header: Header) -> Callable[[LoRAModule, int, bool], float]:
    """How alpha follows from a module's name and rank where it is not a tensor. Raises WeightsError."""
    text = header.metadata.get(CONFIG_FIELD)
    config: Any = None
    if text is not None:
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: its {CONFIG_FIELD} is not JSON. Get the file again.") from error
        if not isinstance(config, dict):
            raise WeightsError(f"{path}: its {CONFIG_FIELD} is not a JSON object. Get the file again.")
    elif any(key.startswith(PEFT_PREFIX) for key in header.tensors):
        beside = path.with_name("adapter_config.json")
        if not beside.exists():
            raise WeightsError(f"{path}: written by PEFT, which keeps alpha in adapter_config.json. Put it beside.")
        config = read_json(beside)
    if config is None:
        return lambda module, rank, is_dora: float(rank)
    return lambda module, rank, is_dora: peft_alpha(config_of(config, module.part), module.name, rank, is_dora=is_dora)


def _guess(header: Header, modules: Mapping[LoRAModule, LoRAWeights]) -> str | int | None:
    """The base a file is for: by the width of its prompts, else by its keys, else by what its header says."""
    by_keys = family_by_keys(header.tensors)
    if by_keys == FLUX:
        return by_keys
    widths = {
        lora.down.shape[1]
        for module, lora in modules.items()
        if module.part == "unet" and flat_name("unet", module.ending).endswith(("attn2_to_k", "attn2_to_v"))
    }
    said = header.metadata.get("ss_base_model_version")
    return widths.pop() if len(widths) == 1 else by_keys or (None if said == "unknown" else said)
