"""The Hub's parameter names -> those of a single-file checkpoint, written apart from minisd's reader as its opposite.

In the way of diffusers' scripts that export to the original layout: tables of modules, then of what is inside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

State = Mapping[str, Tensor]

RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
TOP = [
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
]
# What training leaves behind in real files; none of it may matter.
BOOKKEEPING = {
    "betas": torch.zeros(4),
    "alphas_cumprod_prev": torch.zeros(4, dtype=torch.float64),
    "posterior_mean_coef1": torch.zeros(4),
    "scale_factor": torch.tensor(0.18215),
    "logvar": torch.zeros(4),
    "model_ema.decay": torch.tensor(0.9),
    "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2, 2),
    "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2, 2),
    "denoiser.sigmas": torch.zeros(4),
}


def unet_to_ldm(state: State, levels: int) -> dict[str, Tensor]:
    modules = list(TOP)
    has_attention = {
        key.partition(".resnets.")[0].partition(".attentions.")[0] for key in state if ".attentions." in key
    }
    for level in range(levels):
        for index in range(2):
            number = 3 * level + index + 1
            modules.append((f"down_blocks.{level}.resnets.{index}.", f"input_blocks.{number}.0."))
            modules.append((f"down_blocks.{level}.attentions.{index}.", f"input_blocks.{number}.1."))
        for index in range(3):
            number = 3 * level + index
            modules.append((f"up_blocks.{level}.resnets.{index}.", f"output_blocks.{number}.0."))
            modules.append((f"up_blocks.{level}.attentions.{index}.", f"output_blocks.{number}.1."))
        modules.append((f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{3 * level + 3}.0.op."))
        behind = 2 if f"up_blocks.{level}" in has_attention else 1
        modules.append((f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{3 * level + 2}.{behind}.conv."))
    result = {}
    for key, value in state.items():
        ((old, new),) = [pair for pair in modules if key.startswith(pair[0])]
        inner = key.removeprefix(old)
        if ".resnets." in old:
            for theirs, ldm in RESNET:
                inner = inner.replace(f"{theirs}.", f"{ldm}.")
        result[f"model.diffusion_model.{new}{inner}"] = value
    return result


def vae_to_ldm(state: State, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    modules = []
    for level in range(4):
        for index in range(3):
            modules.append((f"encoder.down_blocks.{level}.resnets.{index}.", f"encoder.down.{level}.block.{index}."))
            modules.append((f"decoder.up_blocks.{level}.resnets.{index}.", f"decoder.up.{3 - level}.block.{index}."))
        modules.append((f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample."))
        modules.append((f"up_blocks.{level}.upsamplers.0.", f"up.{3 - level}.upsample."))
    modules += [("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2.")]
    modules += [("conv_norm_out.", "norm_out."), ("conv_shortcut.", "nin_shortcut.")]
    attention = [
        ("group_norm.", "norm."),
        ("to_q.", "q."),
        ("to_k.", "k."),
        ("to_v.", "v."),
        ("to_out.0.", "proj_out."),
    ]
    result = {}
    for key, value in state.items():
        for old, new in modules:
            key = key.replace(old, new)
        if ".attentions.0." in key:
            for old, new in attention:
                key = key.replace(f"mid_block.attentions.0.{old}", f"mid.attn_1.{new}")
            value = value[:, :, None, None] if value.dim() == 2 else value  # 1 x 1 convolutions there
        result[prefix + key] = value
    return result


def clip_l_to_ldm(state: State, prefix: str) -> dict[str, Tensor]:
    result = {f"{prefix}transformer.text_model.{key.removeprefix('text_model.')}": v for key, v in state.items()}
    return result | {f"{prefix}transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip_to_ldm(state: State, prefix: str, *, penultimate: bool) -> dict[str, Tensor]:
    """With `penultimate` one layer and a projection are added that the network does not have, as in SD 2.x."""
    names = [("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]
    names += [("self_attn.out_proj", "attn.out_proj"), ("encoder.layers.", "transformer.resblocks.")]
    names += [("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final")]
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    result = {}
    for key, value in state.items():
        if "self_attn.q_proj" in key:
            three = [state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            key, value = key.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(three)
        elif "self_attn.k_proj" in key or "self_attn.v_proj" in key:
            continue
        elif key == "text_projection.weight":
            key, value = "text_projection", value.T.contiguous()
        key = "positional_embedding" if key == "embeddings.position_embedding.weight" else key
        for old, new in names:
            key = key.replace(old, new)
        result[f"{prefix}model.{key}"] = value
    if penultimate:
        layers = 1 + max(int(key.split(".resblocks.")[1].split(".")[0]) for key in result if ".resblocks." in key)
        first = {key: value for key, value in result.items() if ".resblocks.0." in key}
        result |= {key.replace(".resblocks.0.", f".resblocks.{layers}."): v.clone() for key, v in first.items()}
        width = len(state["final_layer_norm.weight"])
        result[f"{prefix}model.text_projection"] = torch.empty(width, width, device=value.device)
    return result | {f"{prefix}model.logit_scale": torch.tensor(4.6)}


def to_ldm(family: str, networks: Mapping[str, State], *, levels: int) -> dict[str, Tensor]:
    """A whole checkpoint of "sd1", "sd2" or "sdxl", the networks under their names in a model folder."""
    result = {**BOOKKEEPING, **unet_to_ldm(networks["unet"], levels), **vae_to_ldm(networks["vae"])}
    if family == "sd1":
        return result | clip_l_to_ldm(networks["text_encoder"], "cond_stage_model.")
    if family == "sd2":
        return result | open_clip_to_ldm(networks["text_encoder"], "cond_stage_model.", penultimate=True)
    second = open_clip_to_ldm(networks["text_encoder_2"], "conditioner.embedders.1.", penultimate=False)
    return result | clip_l_to_ldm(networks["text_encoder"], "conditioner.embedders.0.") | second


def write_hollow(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file of full size that takes no room on the disk: a true header, and a hole behind it."""
    sizes = {torch.float64: ("F64", 8), torch.float32: ("F32", 4), torch.float16: ("F16", 2), torch.int64: ("I64", 8)}
    sizes |= {torch.int32: ("I32", 4)}
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        kind, size = sizes[tensor.dtype]
        begin, end = end, end + size * tensor.numel()
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
