"""Tiny Stable Diffusion models in diffusers layout, written by diffusers' and transformers' own classes.

Everything a real model folder has, at a size where a forward pass takes milliseconds: a UNet of two levels for latents
of 16 x 16, a VAE, a CLIP text network with its tokenizer, the scheduler config of the Hub; for SDXL three levels and
two text networks of different widths. Weights that diffusers starts at zero or one are moved away from there, so that a
swapped or forgotten one shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Family = Literal["sd1", "sd2", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction"]

MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "i t", "i t</w>", "b it</w>", "a n", "an d</w>", "c it", "cit y</w>")


@dataclass(frozen=True)
class TinyModel:
    """A model folder and the reference networks it was written from."""

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection | None = None  # of SDXL only


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
    """Write a tiny model that diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None) opens; of
    SDXL, that diffusers.StableDiffusionXLPipeline.from_pretrained(folder) opens.

    Args:
        folder: created if it is not there.
        family: "sd1" has conv projections, one number of heads, quick_gelu, and pads prompts with the end mark; "sd2"
            has linear projections, heads by level, gelu, and pads with "!"; "sdxl" has a first text network like sd1's,
            a second one like sd2's that also projects, transformers of depth 2, and size conditioning.
        prediction_type: what its scheduler config says.
        vae_levels: 3 is a factor of 4 between pixels and latents (64 -> 16), 4 is a factor of 8 (128 -> 16).
        dtype: of the weights.
        variant: as in save_pretrained, "fp16" for example; such a folder has no plain files.
        max_shard_size: as in save_pretrained; "50KB" makes each network several files and an index.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    write_tokenizer(folder / "tokenizer", pad_token="!" if family == "sd2" else "<|endoftext|>")
    if family == "sdxl":
        write_tokenizer(folder / "tokenizer_2", pad_token="!")
    networks = tiny_unet(family), tiny_vae(vae_levels, family), tiny_text_encoder(family)
    model = TinyModel(folder, *networks, tiny_text_encoder_2() if family == "sdxl" else None)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        network = getattr(model, name)
        if network is None:
            continue
        if dtype is not torch.float32:  # diffusers warns at every cast
            network.to(dtype)
        network.save_pretrained(folder / name, variant=variant, max_shard_size=max_shard_size)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(prediction_type, family))
    write_json(folder / "model_index.json", model_index(prediction_type, family))
    return model


def model_index(prediction_type: PredictionType, family: Family) -> dict[str, object]:
    classes = {"scheduler": scheduler_config(prediction_type, family)["_class_name"], "unet": "UNet2DConditionModel"}
    index: dict[str, object] = {name: ["diffusers", cls] for name, cls in (classes | {"vae": "AutoencoderKL"}).items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    if family == "sdxl":
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
        return {"_class_name": "StableDiffusionXLPipeline", **index}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {"_class_name": "StableDiffusionPipeline", **index}


def tiny_unet(family: Family = "sd1") -> UNet2DConditionModel:
    if family == "sdxl":
        return tiny_unet_xl()
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


def tiny_unet_xl() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32 + 40,  # both text networks side by side
        norm_num_groups=8,
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,  # the pooled prompt, and six sizes
    )
    randomise(unet)
    return unet


def tiny_vae(levels: int = 3, family: Family = "sd1") -> AutoencoderKL:
    vae = AutoencoderKL(
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=True,
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
    text_encoder = CLIPTextModel(
        text_config(width=32, activation="gelu" if family == "sd2" else "quick_gelu", projection=32)
    )
    randomise(text_encoder)
    return text_encoder


def tiny_text_encoder_2() -> CLIPTextModelWithProjection:
    """SDXL's second one: the pooled output is not as wide as the hidden states, unlike in the published one."""
    text_encoder = CLIPTextModelWithProjection(text_config(width=40, activation="gelu", projection=24))
    randomise(text_encoder)
    return text_encoder


def text_config(*, width: int, activation: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


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


def scheduler_config(prediction_type: PredictionType = "epsilon", family: Family = "sd1") -> dict[str, object]:
    """The Hub's scheduler file: SD 1.5's for epsilon, SD 2.1's at 768 pixels for v_prediction, SDXL's own."""
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
    if family == "sdxl":
        euler = {"interpolation_type": "linear", "sample_max_value": 1.0, "timestep_spacing": "leading"}
        said = {"_diffusers_version": "0.19.0.dev0", "prediction_type": prediction_type, "use_karras_sigmas": False}
        return {"_class_name": "EulerDiscreteScheduler", **common, **euler, **said}
    if prediction_type == "epsilon":
        return {"_class_name": "PNDMScheduler", **common}
    return {"_class_name": "DDIMScheduler", **common, "prediction_type": prediction_type}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def change_json(folder: Path, name: str, change: dict[str, object]) -> None:
    write_json(folder / name, json.loads((folder / name).read_text()) | change)
