"""LoRA files written: with kohya's names, which every program reads, or with PEFT's, as diffusers writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from minisd.atomic import write_atomically
from minisd.errors import NonFiniteError
from minisd.ldm_modules import SDXL_LAYOUT, ldm_module_name
from minisd.lora_info import LoRAInfo, to_header
from minisd.lora_layers import LoRAWeights
from minisd.lora_peft import CONFIG_FIELD, Size, peft_config
from minisd.lora_raw import DTYPES

LoRAFormat = Literal["kohya", "peft"]
Parts = Mapping[str, Mapping[str, LoRAWeights]]


def lora_bytes(
    parts: Parts, info: LoRAInfo, *, dtype: torch.dtype | None = None, lora_format: LoRAFormat = "kohya"
) -> bytes:
    """Serialise a LoRA file. Equal weights and info give equal bytes.

    Args:
        parts: "unet", "text_encoder", "text_encoder_2" -> path of a layer in it -> its adapter.
        info: what the header says. For SDXL, which base_model_version names, kohya's blocks of the UNet are numbered
            as in the original code, else named as in diffusers: so A1111 and ComfyUI expect them.
        dtype: float32, float16 or bfloat16; None keeps that of the weights. alpha stays exact.
        lora_format: "kohya", with alpha as a tensor; or "peft", with alpha in the header, as diffusers reads it.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for dtype.
        ValueError: there are no weights, or the dtype, the recipe or a mixture of LoRA and DoRA cannot be stored.
    """
    if not any(parts.values()):
        raise ValueError("there are no LoRA weights to write")
    tensors: dict[str, Tensor] = {}
    metadata = to_header(info)
    for part, weights in parts.items():
        for path, lora in weights.items():
            if lora_format == "kohya":
                module = kohya_name(part, path, sdxl="text_encoder_2" in parts or _is_sdxl(info))
                new = _kohya_tensors(lora, dtype)
            else:
                module = peft_name(part, path)
                new = _peft_tensors(lora, dtype)
            assert f"{module}.{next(iter(new))}" not in tensors, f"two modules share the name {module}"
            tensors |= {f"{module}.{piece}": tensor for piece, tensor in new.items()}
    if lora_format == "peft":
        metadata[CONFIG_FIELD] = _peft_header(parts)
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES and not key.endswith(".alpha"):
            raise ValueError(f"a LoRA file holds float32, float16 or bfloat16, got {tensor.dtype} for {key}")
        if not tensor.isfinite().all():
            raise NonFiniteError(f"LoRA not written: {key} has values that are NaN or too large for {tensor.dtype}.")
    return _with_metadata(save(tensors), metadata)


def save_lora(
    path: Path, parts: Parts, info: LoRAInfo, *, dtype: torch.dtype | None = None, lora_format: LoRAFormat = "kohya"
) -> None:
    """Write a LoRA file, atomically, replacing one that is there. Arguments and errors as in `lora_bytes`.

    Raises:
        DiskError: the file could not be written.
    """
    write_atomically(path, lora_bytes(parts, info, dtype=dtype, lora_format=lora_format))


def kohya_name(part: str, path: str, *, sdxl: bool) -> str:
    """A module's name in kohya's files: "lora_unet_...", "lora_te_text_model_encoder_layers_..."."""
    if part == "unet":
        path = ldm_module_name(path, SDXL_LAYOUT) if sdxl else path
        return f"lora_unet_{path.replace('.', '_')}"
    prefix = {"text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}[part]
    return f"{prefix}_{_with_text_model(path).replace('.', '_')}"


def peft_name(part: str, path: str) -> str:
    """A module's name in diffusers' files: "unet....", "text_encoder.text_model.encoder.layers...."."""
    return f"unet.{path}" if part == "unet" else f"{part}.{_with_text_model(path)}"


def _with_text_model(path: str) -> str:
    """A path in a text encoder as other programs know it: transformers has left out the prefix since 5.6."""
    return f"text_model.{path}" if path.startswith("encoder.") else path


def _is_sdxl(info: LoRAInfo) -> bool:
    return info.base_model_version.startswith("sdxl")


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()


def _kohya_tensors(lora: LoRAWeights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    exact = torch.tensor(lora.alpha, dtype=torch.float64)  # float64 only where float32 would change it, as of 0.1
    tensors = {
        "lora_down.weight": _stored(lora.down, dtype),
        "lora_up.weight": _stored(lora.up, dtype),
        "alpha": exact.float() if exact.float().double() == exact else exact,
    }
    if lora.magnitude is not None:
        ones = (1,) * (lora.down.dim() - 1)
        tensors["dora_scale"] = _stored(lora.magnitude, dtype).reshape(-1, *ones)  # [out, 1] or [out, 1, 1, 1]
    return tensors


def _peft_tensors(lora: LoRAWeights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = {"lora_A.weight": _stored(lora.down, dtype), "lora_B.weight": _stored(lora.up, dtype)}
    if lora.magnitude is not None:
        # The ending is for transformers, which loads text encoders and knows no other; diffusers takes it as well.
        shape = (-1,) if lora.down.dim() == 2 else (1, -1, 1, 1)
        tensors["lora_magnitude_vector.weight"] = _stored(lora.magnitude, dtype).reshape(shape)
    return tensors


def _peft_header(parts: Parts) -> str:
    """The header's field for ranks and alphas. Raises ValueError."""
    sizes = {
        part: {path.removeprefix("text_model."): Size(lora.rank, lora.alpha) for path, lora in weights.items()}
        for part, weights in parts.items()
        if weights
    }
    kinds = {part: {lora.magnitude is not None for lora in parts[part].values()} for part in sizes}
    for part, found in kinds.items():
        if len(found) == 2:
            raise ValueError(f"PEFT cannot mix LoRA and DoRA in one network, as the {part} has. Write kohya's format")
    return peft_config(sizes, dora={part: found == {True} for part, found in kinds.items()})


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Put text fields into a serialised file. The library itself writes them in an order that changes every time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:end]), "__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start on a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[end:]
