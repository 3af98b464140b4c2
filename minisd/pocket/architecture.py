"""The shape of the pocket model, as the Hub's config files would say it, and its export in diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from minisd.atomic import write_atomically
from minisd.families import SCHEDULER

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [64, 128],
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_encoder(vocab_size: int) -> dict[str, Any]:
    """The CLIP text encoder's config for a vocabulary whose last two tokens are BOS and EOS."""
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": 64,
        "intermediate_size": 256,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": 64,
        "torch_dtype": "float32",  # transformers would run it in the float16 of the file
        "vocab_size": vocab_size,
    }


def export(
    folder: Path, state_dicts: Mapping[str, Mapping[str, Tensor]], scaling_factor: float, vocab_size: int
) -> None:
    """Write the model into `folder` in diffusers layout, weights as float16; the tokenizer is there already.

    Args:
        folder: of the model.
        state_dicts: of "vae", "unet" and "text_encoder".
        scaling_factor: what the VAE's latents are multiplied by.
        vocab_size: tokens in the tokenizer.
    """
    configs = {
        "vae": VAE | {"scaling_factor": scaling_factor},
        "unet": UNET,
        "text_encoder": text_encoder(vocab_size),
    }
    for part, config in configs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        _write_json(folder / part / "config.json", config)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        # CLIP's keys have the Hub's prefix, which transformers dropped from its own state dict in version 5.6.
        prefix = "text_model." if part == "text_encoder" else ""
        half = {prefix + key: value.half().contiguous().cpu() for key, value in state_dicts[part].items()}
        write_atomically(folder / part / f"{stem}.safetensors", safetensors.torch.save(half, {"format": "pt"}))
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", MODEL_INDEX)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
