"""LoRA files: written in kohya's layout, which every program reads; read in all common ones (lora_dialects.py).

Reading is strict: a file is applied whole or refused, because a LoRA of which a part is left out makes another picture.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minisd.atomic import write_atomically
from minisd.errors import NonFiniteError, UsageError, WeightsError, one_line, run_script
from minisd.lora_dialects import flat_name, target_names
from minisd.lora_info import FAMILIES, LoRAInfo, from_header, to_header
from minisd.lora_layers import LoRAWeights
from minisd.lora_reader import DTYPES, RawLoRA, read_raw, some
from minisd.lora_targets import adaptable_layers


def lora_bytes(weights: Mapping[str, LoRAWeights], info: LoRAInfo, *, dtype: torch.dtype | None = None) -> bytes:
    """Serialise a LoRA file. Equal weights and info give equal bytes.

    Args:
        weights: path of a module of the UNet -> its adapter.
        info: what the header says.
        dtype: float32, float16 or bfloat16; None keeps that of the weights. alpha stays exact.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for dtype.
        ValueError: there are no weights, or the dtype or the recipe cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    for name, lora in weights.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        assert f"{key}.alpha" not in tensors, f"two modules share the name {key}"
        tensors[f"{key}.lora_down.weight"] = lora.down.detach().to("cpu", dtype or lora.down.dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = lora.up.detach().to("cpu", dtype or lora.up.dtype).contiguous()
        exact = torch.tensor(lora.alpha, dtype=torch.float64)  # float64 only where float32 would change it, as of 0.1
        tensors[f"{key}.alpha"] = exact.float() if exact.float().double() == exact else exact
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES and not key.endswith(".alpha"):
            raise ValueError(f"a LoRA file holds float32, float16 or bfloat16, got {tensor.dtype} for {key}")
        if not tensor.isfinite().all():
            raise NonFiniteError(f"LoRA not written: {key} has values that are NaN or too large for {tensor.dtype}.")
    if not tensors:
        raise ValueError("there are no LoRA weights to write")
    return _with_metadata(save(tensors), to_header(info))


def save_lora(
    path: Path, weights: Mapping[str, LoRAWeights], info: LoRAInfo, *, dtype: torch.dtype | None = None
) -> None:
    """Write a LoRA file, atomically, replacing one that is there. Arguments and errors as in `lora_bytes`.

    Raises:
        DiskError: the file could not be written.
    """
    write_atomically(path, lora_bytes(weights, info, dtype=dtype))


def load_lora(path: Path, model: nn.Module) -> tuple[dict[str, LoRAWeights], LoRAInfo]:
    """Read a LoRA file for a model, which is not changed: lora.add_lora does that.

    Args:
        path: a safetensors file in any dialect of lora_dialects.py.
        model: the UNet it is meant for, with or without adapters; it says what the file's names mean.

    Returns:
        Path of a layer -> its adapter, on the CPU in the file's dtype; and what the header says.

    Raises:
        WeightsError: the file is damaged, is of a kind that is not supported, or is not for this model.
    """
    raw = read_raw(path)
    weights = _placed(path, raw, model)
    if raw.text_encoder:
        only = "this version applies a LoRA to the UNet only, and half of one makes other pictures than were meant"
        raise WeightsError(f"{path}: it also adapts modules of the text encoder: {some(raw.text_encoder)}; {only}.")
    if not any(lora.up.count_nonzero() for lora in weights.values()):
        logging.getLogger(__name__).warning("%s has no effect: all of its lora_up weights are zero", path)
    return weights, _info(path, raw, weights)


def read_lora_info(path: Path) -> LoRAInfo:
    """Read what a LoRA file says about itself, before there is a model. Raises WeightsError."""
    raw = read_raw(path)
    return _info(path, raw, raw.unet)


def inspect(path: Path) -> str:
    """Describe a LoRA file in a few lines. Raises WeightsError."""
    raw = read_raw(path)
    info = _info(path, raw, raw.unet)
    rows = {
        "file": f"{path.name}, {path.stat().st_size} bytes",
        "base model": info.base_model or "not said",
        "base family": info.base_model_version or _family(raw.guess),
        "modules": f"{len(raw.unet)} in the UNet, {len(raw.text_encoder)} in text encoders",
        "rank": f"{info.rank}",
        "alpha": f"{info.alpha:g}",
        "targets": ", ".join(info.targets),
        "trigger": info.trigger or "none",
        "title": info.title or "none",
        "steps": "not said" if info.steps is None else f"{info.steps}",
        **{f"  {name}": json.dumps(value) for name, value in info.recipe.items()},
    }
    return "\n".join(f"{name:<16} {one_line(value)}" for name, value in rows.items())


def _placed(path: Path, raw: RawLoRA, model: nn.Module) -> dict[str, LoRAWeights]:
    """Find the model's layers by the file's names. Raises WeightsError unless each module fits one layer."""
    layers = adaptable_layers(model)
    paths = {flat_name(name): name for name in layers}
    assert len(paths) == len(layers), "two layers share a flat name"
    others = {flat_name(name) for name, _ in model.named_modules()} - paths.keys()
    weights: dict[str, LoRAWeights] = {}
    absent: list[str] = []
    misfits: list[str] = []
    elsewhere: list[str] = []
    for name, lora in raw.unet.items():
        flat = flat_name(name)
        if flat not in paths:
            (elsewhere if flat in others else absent).append(name)
            continue
        expected = tuple(layers[paths[flat]].weight.shape)
        lora = _with_dims(lora, len(expected))
        if lora.shape != expected:
            misfits.append(f"{name}: expected {list(expected)}, got {list(lora.shape)}")
        if paths[flat] in weights:
            raise WeightsError(f"{path}: {paths[flat]} is there twice, under two names. Get the file again.")
        weights[paths[flat]] = lora
    if misfits or absent:
        what = f"modules of another size: {some(misfits)}" if misfits else f"modules not in this model: {some(absent)}"
        width = next((layer.weight.shape[1] for name, layer in layers.items() if name.endswith("attn2.to_k")), None)
        families = f"The file is for {_family(raw.guess)}, the model is {_family(width)}"
        raise WeightsError(f"{path}: {what}. {families}. Choose with --model what the LoRA was made for.")
    if elsewhere:
        only = "only a LoRA of linear layers and convolutions is supported"
        raise WeightsError(f"{path}: it also adapts layers of another kind: {some(elsewhere)}; {only}.")
    return weights


def _with_dims(lora: LoRAWeights, dims: int) -> LoRAWeights:
    """A matrix as a 1 x 1 convolution or the reverse: files of SD 1.x have either for its proj_in and proj_out."""
    if dims == 4 and lora.down.dim() == 2:
        return LoRAWeights(lora.down[:, :, None, None], lora.up[:, :, None, None], lora.alpha)
    if dims == 2 and lora.down.shape[2:] == (1, 1):
        return LoRAWeights(lora.down.flatten(1), lora.up.flatten(1), lora.alpha)
    return lora


def _family(guess: str | int | None) -> str:
    if isinstance(guess, int):
        return FAMILIES.get(guess, "of no known family") + f" (prompts {guess} wide)"
    return "of no known family" if guess is None else guess[:50]


def _info(path: Path, raw: RawLoRA, weights: Mapping[str, LoRAWeights]) -> LoRAInfo:
    """The header's information, with the rank and alpha that most modules have."""
    sizes = Counter((lora.rank, lora.alpha) for lora in weights.values()).most_common(1)
    rank, alpha = sizes[0][0] if sizes else (0, 0.0)
    try:
        return from_header(raw.metadata, rank=rank, alpha=alpha, targets=target_names(weights))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Put text fields into a serialised file. The library itself writes them in an order that changes every time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:end]), "__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start on a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[end:]


def main() -> None:
    """Run `python -m minisd.lora_file inspect FILE`."""
    if len(sys.argv) != 3 or sys.argv[1] != "inspect":
        raise UsageError("usage: python -m minisd.lora_file inspect FILE")
    print(inspect(Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(run_script(main, debug=False))
