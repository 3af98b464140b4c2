"""LoRA weights for tests, the files that other programs would write of them, and networks run with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.lora import TARGETS, LoRAWeights, adaptable_layers, add_lora, bake_lora, merge_lora
from minisd.lora_info import LoRAInfo
from minisd.lora_reader import LoRA, add_lora_to, load_lora
from minisd.weights import load_model, load_unet

INFO = LoRAInfo(
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    base_model_version="sd_v1",
    rank=4,
    alpha=6.0,
    targets=TARGETS["attn"],
    trigger="8bit",
    title="my style",
    prediction_type="epsilon",
    resolution=512,
    steps=1000,
    seed=0,
    recipe={"learning_rate": 1e-4, "rank": 4},
)

PREFIX = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."


def random_lora(
    model: nn.Module, *, rank: int = 4, alpha: float = 6.0, targets: str = "attn"
) -> dict[str, LoRAWeights]:
    """Weights of visible effect for each target, ranks and alphas as given."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for path, layer in adaptable_layers(model).items():
        out, *inner = layer.weight.shape
        if path.endswith(TARGETS[targets]):
            down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
            up = 0.3 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
            weights[path] = LoRAWeights(down, up, alpha)
    return weights


def run_ours(
    folder: Path, weights: Mapping[str, LoRAWeights], dtype: torch.dtype = torch.float64, *, merged: bool = False
) -> Tensor:
    unet = load_unet(folder)
    if weights:
        add_lora(unet, weights, name="file")
    unet.to(dtype)
    if merged:
        merge_lora(unet)
    sample, context = inputs(dtype)
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 700]), context)


def run_theirs(unet: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    sample, context = inputs(dtype)
    with torch.no_grad():
        return unet.to(dtype)(sample, torch.tensor([3, 700]), context).sample


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 16, 16, generator=generator).to(dtype),
        torch.randn(2, 7, 32, generator=generator).to(dtype),
    )


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def kohya(weights: Mapping[str, LoRAWeights]) -> dict[str, Tensor]:
    """What kohya's scripts would write."""
    state = {}
    for path, w in weights.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": w.down, f"{name}.lora_up.weight": w.up}
        state[f"{name}.alpha"] = torch.tensor(w.alpha)
    return state


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path, metadata)
    return path


def read_unet(file: Path, unet: nn.Module) -> tuple[dict[str, LoRAWeights], LoRAInfo]:
    """The file's adapters of a UNet, and what it says of itself."""
    lora = load_lora(file, {"unet": unet})
    assert list(lora.parts) == ["unet"]
    return lora.parts["unet"], lora.info


def random_parts(
    networks: Mapping[str, nn.Module], *, targets: Sequence[str] = (), alphas: Sequence[float] = (0.5, 1.0, 3.0, 8.0)
) -> dict[str, dict[str, LoRAWeights]]:
    """Adapters of several networks, with ranks that differ between their layers.

    Args:
        networks: "unet", "text_encoder", "text_encoder_2".
        targets: path suffixes; none is every layer.
        alphas: of the layers in turn.
    """
    generator = torch.Generator().manual_seed(11)
    parts: dict[str, dict[str, LoRAWeights]] = {}
    for part, network in networks.items():
        parts[part] = {}
        for index, (path, layer) in enumerate(adaptable_layers(network).items()):
            if targets and not path.endswith(tuple(targets)):
                continue
            out, *inner = layer.weight.shape
            rank = 1 + index % 3
            down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
            up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
            parts[part][path] = LoRAWeights(down, up, alphas[index % len(alphas)])
    return parts


def merged(folder: Path, lora: LoRA, *, lora_scale: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """The weights of a model's networks with a LoRA in them, in float64."""
    networks = load_model(str(folder)).networks()
    add_lora_to(networks, lora, name="file", lora_scale=lora_scale)
    for part, network in networks.items():
        network.double()
        if part in lora.parts:
            merge_lora(network)
            bake_lora(network)
    return {part: network.state_dict() for part, network in networks.items()}


def in_a_pipeline(folder: Path, file: Path) -> dict[str, dict[str, Tensor]]:
    """The same by diffusers."""
    index = json.loads((folder / "model_index.json").read_text())
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return fused(pipe)


def fused(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """The weights of a pipeline's networks with the adapters it has, in float64."""
    names = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    for name in names:
        getattr(pipe, name).double()
    pipe.fuse_lora(components=names)
    pipe.unload_lora_weights()
    return {name: getattr(pipe, name).state_dict() for name in names}


def same_weights(
    a: Mapping[str, Mapping[str, Tensor]], b: Mapping[str, Mapping[str, Tensor]], tolerance: float = 1e-10
) -> None:
    """All of them equal."""
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        for key, weight in a[part].items():
            torch.testing.assert_close(
                weight, b[part][key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )
