"""Tiny Stable Diffusion models in diffusers layout, written by diffusers' and transformers' own classes.

Everything a real model folder has, at a size where a forward pass takes milliseconds: a UNet of two levels for latents
of 16 x 16, a VAE, a CLIP text network with its tokenizer, the scheduler config of the Hub. Weights that diffusers
starts at zero or one are moved away from there, so that a swapped or forgotten one shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

Family = Literal["sd1", "sd2"]
PredictionType = Literal["epsilon", "v_prediction"]

MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "i t", "i t</w>", "b it</w>", "a n", "an d</w>", "c it", "cit y</w>")


@dataclass(frozen=True)
class TinyModel:
    """A model folder and the reference networks it was written from."""

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


def write_tiny_model(
    folder: Path,
    *,
    family: Family = "sd1",
    prediction_type: PredictionType = "epsilon",
    vae_levels: int = 3,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    max_shard_size: str = "10GB",
    seed: int = 0,
) -> TinyModel:
    """Write a tiny model that diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None) opens.

    Args:
        folder: created if it is not there.
        family: "sd1" has conv projections, one number of heads, quick_gelu, and pads prompts with the end mark; "sd2"
            has linear projections, heads by level, gelu, and pads with "!".
        prediction_type: what its scheduler config says.
        vae_levels: 3 is a factor of 4 between pixels and latents (64 -> 16), 4 is a factor of 8 (128 -> 16).
        dtype: of the weights.
        variant: as in save_pretrained, "fp16" for example; such a folder has no plain files.
        max_shard_size: as in save_pretrained; "50KB" makes each network several files and an index.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    write_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>" if family == "sd1" else "!")
    model = TinyModel(folder, tiny_unet(family), tiny_vae(vae_levels), tiny_text_encoder(family))
    for name in ("unet", "vae", "text_encoder"):
        network = getattr(model, name)
        if dtype is not torch.float32:  # diffusers warns at every cast
            network.to(dtype)
        network.save_pretrained(folder / name, variant=variant, max_shard_size=max_shard_size)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(prediction_type))
    classes = {"scheduler": scheduler_config(prediction_type)["_class_name"], "unet": "UNet2DConditionModel"}
    index: dict[str, object] = {name: ["diffusers", cls] for name, cls in (classes | {"vae": "AutoencoderKL"}).items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})
    return model


def tiny_unet(family: Family = "sd1") -> UNet2DConditionModel:
    sd2 = family == "sd2"
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=(2, 4) if sd2 else 4,
        use_linear_projection=sd2,
    )
    randomise(unet)
    return unet


def tiny_vae(levels: int = 3) -> AutoencoderKL:
    vae = AutoencoderKL(
        sample_size=16 * 2 ** (levels - 1),
        block_out_channels=(16, 32, 32, 32)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    randomise(vae)
    return vae


def tiny_text_encoder(family: Family = "sd1") -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if family == "sd1" else "gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    text_encoder = CLIPTextModel(config)
    randomise(text_encoder)
    return text_encoder


def randomise(network: nn.Module) -> None:
    """Move constant tensors (norm weights, biases, zero-initialised layers) to random values; freeze the network."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.min() == parameter.max():
                parameter += 0.2 * torch.randn_like(parameter)
    network.eval().requires_grad_(False)


def byte_alphabet() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary ("!" first)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(len(others))]


def vocabulary() -> dict[str, int]:
    """CLIP's layout in small: bytes, bytes that end a word, merges, and the two marks."""
    letters = byte_alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES)]
    return {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder: Path, *, pad_token: str) -> None:
    """Write a tokenizer's four files as the Hub has them; only special_tokens_map.json names the true pad token."""
    write_json(folder / "vocab.json", vocabulary())
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", {**marks, "pad_token": pad_token})
    settings = {"model_max_length": 77, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    names = {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", {**marks, **settings, **names})


def scheduler_config(prediction_type: PredictionType = "epsilon") -> dict[str, object]:
    """The Hub's scheduler file: SD 1.5's for epsilon, SD 2.1's at 768 pixels for v_prediction."""
    common: dict[str, object] = {
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    if prediction_type == "epsilon":
        return {"_class_name": "PNDMScheduler", **common}
    return {"_class_name": "DDIMScheduler", **common, "prediction_type": prediction_type}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
