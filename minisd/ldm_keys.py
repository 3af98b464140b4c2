"""Parameter names of older layouts -> the Hub's, each rename a pure function.

The networks carry the names diffusers writes today, so only two layouts need a rename: early diffusers, and the single
files of the original repositories (LDM for SD 1.x and 2.x, SGM for XL), which hold all networks under one prefix each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minisd.ldm_modules import IN_RESNET, OUTSIDE

# diffusers before 0.17 wrote the left names; the VAE files of SD 1.x and 2.x on the Hub still have them.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Network -> where a single file has it.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}

# What training left behind, beside the networks or inside them; other than these, every tensor must have its place.
_IGNORED = """global_step v_pred ztsnr scale_factor lvlb_weights logvar betas alphas_cumprod alphas_cumprod_prev
    sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod
    sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped posterior_mean_coef1
    posterior_mean_coef2"""
_IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "denoiser.")
# Of CLIP: the constant mask and positions, the scale of its loss, and in ComfyUI's files a projection nobody reads.
_IGNORED_OF_CLIP_L = ("transformer.text_projection.weight", "transformer.logit_scale", "logit_scale")
_IGNORED_OF_OPEN_CLIP = ("model.logit_scale", "model.attn_mask")

_NUMBER = re.compile("[0-9]{1,2}")
_UNET_TOP = {ldm: hub for hub, ldm in OUTSIDE.items()}
_UNET_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_RESNET = {ldm: hub for hub, ldm in IN_RESNET.items()}
_VAE_MIDDLE = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes, if not just under another name: in equal parts along dim 0 to several keys, or
    transposed to one.
    """

    keys: tuple[str, ...]
    transposed: bool = False


def rename_old_vae_attention(key: str) -> str:
    """Rename a projection of the VAE's attention to its present name; any other key comes back as it is.

    For example "encoder.mid_block.attentions.0.proj_attn.bias" -> "encoder.mid_block.attentions.0.to_out.0.bias".
    """
    parts = key.split(".")  # whole components: "key" is part of many words
    if len(parts) == 6 and parts[0] in ("encoder", "decoder") and parts[1:4] == ["mid_block", "attentions", "0"]:
        parts[4] = _OLD_VAE_ATTENTION.get(parts[4], parts[4])
    return ".".join(parts)


def network_of(key: str) -> str | None:
    """Say which network a tensor of a single file is for: a name in PREFIXES, "" for none, None if it is unknown."""
    if key in _IGNORED.split() or key.startswith(_IGNORED_PREFIXES) or key.endswith(".position_ids"):
        return ""
    return next((name for name, prefixes in PREFIXES.items() if key.startswith(prefixes)), None)


def within(key: str, network: str) -> str | None:
    """The key of a single file without the prefix of that network; None if it is not of that network."""
    if network_of(key) != network:
        return None
    prefix = next(prefix for prefix in PREFIXES[network] if key.startswith(prefix))
    return key[len(prefix) :]


def unet_key(key: str) -> str:
    """Rename a UNet's key. For example "input_blocks.1.0.in_layers.2.bias" -> "down_blocks.0.resnets.0.conv1.bias".

    As in every published model, a level has two resnets on the way down and three on the way up. An unknown key comes
    back as it is.
    """
    parts = key.split(".")
    for length in (2, 3):
        top = _UNET_TOP.get(".".join(parts[:length]))
        if top is not None:
            return ".".join([top, *parts[length:]])
    if len(parts) < 3 or not _NUMBER.fullmatch(parts[1]):
        return key
    if parts[0] == "middle_block" and parts[1] in _UNET_MIDDLE:
        return _unet_module(f"mid_block.{_UNET_MIDDLE[parts[1]]}", parts[2:])
    if parts[0] not in ("input_blocks", "output_blocks") or len(parts) < 4:
        return key
    down = parts[0] == "input_blocks"
    level, index = divmod(int(parts[1]) - down, 3)
    block, inner = f"{'down' if down else 'up'}_blocks.{level}", parts[3:]
    if inner[0] == ("op" if down else "conv"):  # the upsampler stands at .1, or at .2 behind an attention
        name = "downsamplers.0.conv" if down else "upsamplers.0.conv"
        return ".".join([block, name, *inner[1:]])
    return _unet_module(f"{block}.{'attentions' if parts[2] == '1' else 'resnets'}.{index}", inner)


def _unet_module(module: str, inner: list[str]) -> str:
    """Rename what is inside a resnet; the names inside an attention are the same in both layouts."""
    for length in (1, 2):
        name = _RESNET.get(".".join(inner[:length])) if ".resnets." in module else None
        if name is not None:
            return ".".join([module, name, *inner[length:]])
    return ".".join([module, *inner])


def vae_key(key: str) -> str:
    """Rename a VAE's key. For example "decoder.up.3.block.0.conv1.bias" -> "decoder.up_blocks.0.resnets.0.conv1.bias".

    The decoder's levels are counted from the other end, of four as in every published model. An unknown key comes back
    as it is.
    """
    parts = key.replace("nin_shortcut", "conv_shortcut").split(".")
    if parts[0] not in ("encoder", "decoder") or len(parts) < 3:
        return ".".join(parts)
    half, kind, rest = parts[0], parts[1], parts[2:]
    if kind == "norm_out":
        return ".".join([half, "conv_norm_out", *rest])
    if len(rest) < 2:
        return ".".join(parts)
    if kind == "mid" and rest[0] in _VAE_MIDDLE:
        inner = [_VAE_ATTENTION.get(rest[1], rest[1]), *rest[2:]] if rest[0] == "attn_1" else rest[1:]
        return ".".join([half, "mid_block", _VAE_MIDDLE[rest[0]], *inner])
    if kind in ("down", "up") and _NUMBER.fullmatch(rest[0]):
        level = int(rest[0]) if kind == "down" else 3 - int(rest[0])
        module = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}.get(rest[1], rest[1])
        return ".".join([half, f"{kind}_blocks", str(level), module, *rest[2:]])
    return ".".join(parts)


def clip_l_key(key: str) -> str | None:
    """Give CLIP-L's key, of SD 1.x and of XL's first text encoder, the Hub's name; None for what is not used."""
    return None if key in _IGNORED_OF_CLIP_L else key.removeprefix("transformer.")


def open_clip_key(key: str, *, layers: int, projection: bool) -> Place | None:
    """Give a key of OpenCLIP, of SD 2.x and of XL's second text encoder, the Hub's names; None for what is not used.

    Args:
        key: for example "model.transformer.resblocks.0.attn.in_proj_weight", which is three of the Hub's.
        layers: of the text network.
        projection: whether it is XL's. SD 2.x reads the last layer but one, so the Hub leaves out the last and the
            projection behind it.
    """
    if key in _IGNORED_OF_OPEN_CLIP:
        return None
    parts = key.removeprefix("model.").split(".")
    if parts == ["text_projection"]:
        return Place(("text_projection.weight",), transposed=True) if projection else None
    if parts == ["positional_embedding"]:
        return Place(("text_model.embeddings.position_embedding.weight",))
    if parts[0] == "token_embedding":
        return Place((".".join(["text_model.embeddings", *parts]),))
    if parts[0] == "ln_final":
        return Place((".".join(["text_model.final_layer_norm", *parts[1:]]),))
    if parts[:2] != ["transformer", "resblocks"] or len(parts) < 5:
        return Place((key,))
    if parts[2] == str(layers) and not projection:
        return None
    layer, inner = f"text_model.encoder.layers.{parts[2]}", ".".join(parts[3:-1])
    if inner == "attn" and parts[-1].startswith("in_proj_"):
        kind = parts[-1].removeprefix("in_proj_")
        return Place(tuple(f"{layer}.self_attn.{name}_proj.{kind}" for name in "qkv"))
    return Place((f"{layer}.{_CLIP_LAYER.get(inner, inner)}.{parts[-1]}",))
