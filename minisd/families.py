"""The published models, as constants: what their folders on the Hub say, for a single file, which says nothing.

SD 1.4 and 1.5 are one in this; SD 2.1 is two, of 512 pixels and epsilon, and of 768 pixels and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from minisd.clip import clip_on_meta
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig
from minisd.vae import AutoencoderKL, AutoencoderKLConfig

Family = Literal["sd1", "sd2", "sdxl"]
NAMES: Mapping[Family, str] = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
Json = Mapping[str, Any]
# Input channels of a UNet that is another model, made from one of these.
OTHER_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image editing model (InstructPix2Pix)",
    9: "an inpainting model",
}

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_UNET: Json = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [_CROSS, _CROSS, _CROSS, _PLAIN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": False,
}
_UNET_SD2: Json = {
    **_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_UNET_XL: Json = {
    **_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [_PLAIN, _CROSS, _CROSS],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
_VAE: Json = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE_XL: Json = {**_VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
# The token ids are wrong, and so in the published files: the pooled output is read at the highest id because of it.
_CLIP: Json = {"model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
               "attention_dropout": 0.0, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
               "vocab_size": 49408}  # fmt: skip
_CLIP_L: Json = {**_CLIP, "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "hidden_size": 768,
                 "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
                 "projection_dim": 768}  # fmt: skip
_OPEN_CLIP_H: Json = {**_CLIP, "architectures": ["CLIPTextModel"], "hidden_act": "gelu", "hidden_size": 1024,
                      "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
                      "projection_dim": 512}  # fmt: skip
_OPEN_CLIP_G: Json = {**_CLIP, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu",
                      "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
                      "num_hidden_layers": 32, "projection_dim": 1280}  # fmt: skip
# Stable Diffusion 1.5's own scheduler file.
SCHEDULER: Json = {
    "_class_name": "PNDMScheduler",
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
_SCHEDULER_V: Json = {**SCHEDULER, "_class_name": "DDIMScheduler"}
_SCHEDULER_XL: Json = {
    **SCHEDULER,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class ModelConfigs:
    """What the JSON files of a model folder say.

    Attributes:
        networks: "unet", "vae", "text_encoder" and, of SDXL, "text_encoder_2" -> its config.json.
        scheduler: scheduler_config.json.
        zeros_when_absent: force_zeros_for_empty_prompt of model_index.json.
    """

    networks: Mapping[str, Json]
    scheduler: Json
    zeros_when_absent: bool

    @property
    def is_xl(self) -> bool:
        """Whether it is Stable Diffusion XL."""
        return "text_encoder_2" in self.networks


def published_configs(
    family: Family,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    *,
    zero_terminal_snr: bool = False,
) -> ModelConfigs:
    """The configuration of a published model, or of one fine-tuned from it to another prediction.

    Args:
        family: which one.
        prediction_type: what the UNet predicts. In SD 2.x "v_prediction" is the model of 768 pixels.
        zero_terminal_snr: trained on a schedule that ends in pure noise, which is sampled from its very end
            (arXiv:2305.08891).
    """
    v = prediction_type == "v_prediction"
    if family == "sdxl":
        networks = {"unet": _UNET_XL, "vae": _VAE_XL, "text_encoder": _CLIP_L, "text_encoder_2": _OPEN_CLIP_G}
        scheduler = _SCHEDULER_XL
    elif family == "sd2":
        size = {"sample_size": 96} if v else {}
        networks = {"unet": {**_UNET_SD2, **size}, "vae": {**_VAE, "sample_size": 768}, "text_encoder": _OPEN_CLIP_H}
        scheduler = _SCHEDULER_V if v else SCHEDULER
    else:
        networks = {"unet": _UNET, "vae": _VAE, "text_encoder": _CLIP_L}
        scheduler = _SCHEDULER_V if v else SCHEDULER
    trained = {"prediction_type": prediction_type}
    to_the_end = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_terminal_snr else {}
    return ModelConfigs(networks, {**scheduler, **trained, **to_the_end}, zeros_when_absent=family == "sdxl")


def pad_token(family: Family, tokenizer: str) -> str:
    """What pads a prompt, in "tokenizer" or "tokenizer_2": OpenCLIP was trained with id 0, CLIP-L with the end mark."""
    return "!" if family == "sd2" or tokenizer == "tokenizer_2" else "<|endoftext|>"


def network_on_meta(part: str, raw: Json) -> nn.Module:
    """Build the network that a config.json describes, without weights.

    Args:
        part: its folder: "unet", "vae", "text_encoder" or "text_encoder_2".
        raw: the parsed JSON.

    Raises:
        ValueError: the file describes another kind of network.
    """
    if part.startswith("text_encoder"):
        return clip_on_meta(raw, projection=part == "text_encoder_2")
    with torch.device("meta"):
        if part == "unet":
            return UNet2DConditionModel(UNetConfig.from_json(raw))
        return AutoencoderKL(AutoencoderKLConfig.from_json(raw))


def meta_networks(family: Family) -> dict[str, nn.Module]:
    """The networks of a published model that a LoRA may adapt, at full size and without weights.

    Returns:
        "unet", "text_encoder" and, of SDXL, "text_encoder_2".
    """
    networks = published_configs(family).networks
    return {part: network_on_meta(part, raw) for part, raw in networks.items() if part != "vae"}
