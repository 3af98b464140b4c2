"""A single-file checkpoint, as shared on model sites -> which model it is, and its networks.

One .safetensors with every network under a prefix, in the key names of the original repositories. It has no
configuration: the family follows from keys and shapes, never from the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from minisd.clip import clip_keys, load_tokenizer
from minisd.errors import UsageError, WeightsError
from minisd.families import NAMES, OTHER_CHANNELS, Family, ModelConfigs, network_on_meta, pad_token, published_configs
from minisd.ldm_keys import Place, clip_l_key, network_of, open_clip_key, unet_key, vae_key, within
from minisd.model_files import Header, TensorInfo, read_header, sha256_of
from minisd.model_folder import SUPPORTED
from minisd.strict_load import fill

Prediction = Literal["epsilon", "v_prediction"]
TOKENIZER = Path(__file__).parent / "clip_tokenizer"  # CLIP's, which all families read prompts with

_UNET = "model.diffusion_model."
_WHOLE = "Give a file that holds the UNet, the VAE and the text encoder, or a folder in diffusers layout"
# What the first component behind the UNet's prefix says of another architecture.
_OTHER_UNETS = {
    "joint_blocks": "Stable Diffusion 3",
    "double_blocks": "FLUX",
    "double_layers": "AuraFlow",
    "down_blocks": "Stable Cascade, or a UNet in diffusers' names",
}
_NUMBERED_LORA = re.compile(r"(unet|text_encoder):\d+:(up|down)")  # as cloneofsimo/lora writes them
_EDM_MARKS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_PREDICTIONS: Mapping[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
# Published files of SD 2.1 by their sha256; their headers say nothing.
_PUBLISHED: Mapping[str, Prediction] = {
    "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2": "epsilon",  # v2-1_512-ema-pruned.safetensors
    "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac": "v_prediction",  # v2-1_768-ema-pruned
}


def identify(path: Path, prediction_type: Prediction | None = None) -> tuple[Family, ModelConfigs]:
    """Say which model a file holds, and give the configuration it was made for.

    Args:
        path: a .safetensors file.
        prediction_type: what the user says that the UNet predicts, which counts more than what the file says.

    Raises:
        WeightsError: the file is damaged, incomplete, or holds something else, which is named.
        UsageError: it is SD 2.x and does not say what it predicts.
    """
    header = read_header(path)
    family = _family(path, header)
    prediction = prediction_type or _prediction(path, header, family)
    ends_in_noise = prediction == "v_prediction" and "ztsnr" in header.tensors
    return family, published_configs(family, prediction, zero_terminal_snr=ends_in_noise)


def load_networks(
    path: Path, configs: ModelConfigs, dtypes: Mapping[str, torch.dtype], device: torch.device | str
) -> dict[str, nn.Module]:
    """Load the networks of a file, frozen, in eval mode.

    Args:
        path: a .safetensors file in the key names of LDM or SGM.
        configs: says which networks, and their sizes.
        dtypes: network -> what its weights are cast to.
        device: where they go.

    Returns:
        A network for each of configs.networks, under its name.

    Raises:
        WeightsError: keys or shapes do not fit, or the file is damaged.
    """
    strangers = [name for name in read_header(path).tensors if network_of(name) not in ("", *configs.networks)]
    if strangers:
        shown = ", ".join(name[:100] for name in strangers[:5])
        raise WeightsError(
            f"{path}: {len(strangers)} tensors that are of no network of this model: {shown}. Choose a file without "
            "them, or a folder in diffusers layout."
        )
    networks = {}
    for part in sorted(configs.networks, key=["text_encoder", "text_encoder_2", "vae", "unet"].index):
        network = network_on_meta(part, configs.networks[part])
        complaint = f"{path}: its {part} is not that of the published model"
        fill(network, [path], _rename(part, network, configs), dtypes[part], device, complaint=complaint)
        networks[part] = network
    return networks


def tokenizers(family: Family) -> list[Any]:
    """Load CLIP's tokenizer, which minisd brings along, for each text encoder of a family."""
    found = []
    for name in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        found.append(load_tokenizer(TOKENIZER))
        # Not the attribute alone: as from a folder on the Hub, every "!" of a prompt is the padding of OpenCLIP.
        found[-1].add_special_tokens({"pad_token": pad_token(family, name)})
    return found


def _rename(part: str, network: nn.Module, configs: ModelConfigs) -> Callable[[str], str | Place | None]:
    """Make the function from a file's keys to those of one network."""
    if part in ("unet", "vae"):
        names = unet_key if part == "unet" else vae_key
        return lambda name: None if (key := within(name, part)) is None else names(key)
    clip = clip_keys(network)
    layers = configs.networks[part]["num_hidden_layers"]

    def rename(name: str) -> str | Place | None:
        key = within(name, part)
        if key is None:
            return None
        if not key.startswith("model."):
            hub = clip_l_key(key)
            return None if hub is None else clip(hub)
        place = open_clip_key(key, layers=layers, projection=part == "text_encoder_2")
        keys = tuple(renamed for hub in place.keys if (renamed := clip(hub)) is not None) if place else ()
        return Place(keys, place.transposed) if place and keys else None

    return rename


def _family(path: Path, header: Header) -> Family:
    """Find the family from keys and shapes. Raises WeightsError, by name, for what is none of them."""
    tensors = header.tensors
    if any(mark in tensors for mark in _EDM_MARKS):
        raise WeightsError(f"{path}: an EDM model (CosXL, Playground 2.5) is not supported. {SUPPORTED}.")
    unet = {name.removeprefix(_UNET): info for name, info in tensors.items() if name.startswith(_UNET)}
    if not unet:
        raise WeightsError(f"{path}: {_what_instead(tensors)}")
    channels = _inputs(unet.get("input_blocks.0.0.weight"))
    if channels is None:
        kinds = {kind for name in unet if (kind := _OTHER_UNETS.get(name.partition(".")[0]))}
        what = " or ".join(sorted(kinds)) or "a model of another architecture"
        raise WeightsError(f"{path}: {what} is not supported. {SUPPORTED}.")
    if channels != 4:
        what = OTHER_CHANNELS.get(channels, "a model of another kind")
        raise WeightsError(f"{path}: {what} ({channels} input channels) is not supported. Choose its base model.")
    if _inputs(unet.get("label_emb.0.0.weight")) == 2560:
        raise WeightsError(f"{path}: the SDXL refiner is not supported. Choose SDXL base.")
    if any(name.startswith(("noise_augmentor.", "embedder.")) for name in tensors):
        raise WeightsError(f"{path}: Stable unCLIP is not supported. {SUPPORTED}.")
    widths = {_inputs(info) for name, info in unet.items() if name.endswith(".attn2.to_k.weight")}
    known: Mapping[int | None, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    family = known.get(widths.pop()) if len(widths) == 1 else None
    if family is None:
        raise WeightsError(f"{path}: a UNet that reads none of the known text encoders. {SUPPORTED}.")
    there = {network_of(name) for name in tensors}
    missing = [part for part in published_configs(family).networks if part not in there]
    if missing:
        raise WeightsError(f"{path}: {NAMES[family]} without {' and '.join(missing)}. {_WHOLE}.")
    return family


def _inputs(info: TensorInfo | None) -> int | None:
    """Inputs of a layer by the shape of its weight; None if there is no such weight."""
    return info.shape[1] if info is not None and len(info.shape) > 1 else None


def _what_instead(tensors: Mapping[str, TensorInfo]) -> str:
    """Name a file that has no UNet in the key names of LDM, and say what to do with it."""

    def some(*marks: str) -> bool:
        return any(mark in f".{name}" for name in tensors for mark in marks)

    if some("lora", "hada_", "lokr_", ".oft_") or any(_NUMBERED_LORA.fullmatch(name) for name in tensors):
        return "a LoRA, not a model: pass it with --lora, and its base with --model."
    if some(".control_model.", ".controlnet_", ".input_hint_block."):
        return f"a ControlNet is not supported. {SUPPORTED}."
    if some(".joint_blocks.", ".double_blocks."):
        kind = "Stable Diffusion 3" if some(".joint_blocks.") else "FLUX"
        return f"{kind} is not supported. {SUPPORTED}."
    if some(".emb_params", ".clip_l", ".clip_g"):
        return "an embedding (textual inversion), not a model."
    if some(".input_blocks.0.0.weight"):
        return f"a UNet alone, without VAE and text encoder. {_WHOLE}."
    parts = {
        ".down_blocks.": "a UNet",
        ".encoder.down_blocks.": "a VAE",
        ".encoder.mid.": "a VAE",
        ".first_stage_model.": "a VAE",
        ".text_model.": "a text encoder",
        ".resblocks.": "a text encoder",
    }
    kinds = sorted({what for mark, what in parts.items() if some(mark)})
    if kinds:
        return f"{' and '.join(kinds)}, a part of a model. {_WHOLE}."
    return f"not a Stable Diffusion checkpoint: no key begins with {_UNET[:-1]}. {SUPPORTED}."


def _prediction(path: Path, header: Header, family: Family) -> Prediction:
    """What the UNet predicts, by what the file says."""
    if "v_pred" in header.tensors:  # a mark that fine-tunes of SDXL carry
        return "v_prediction"
    for field in ("modelspec.prediction_type", "modelspec.predict_key"):
        said = header.metadata.get(field)
        if said:
            if said.lower() not in _PREDICTIONS:
                raise WeightsError(
                    f"{path}: its header says that it predicts {said[:50]!r}, which is not supported (epsilon and v "
                    "are). If that is wrong, say what it predicts with --prediction-type."
                )
            return _PREDICTIONS[said.lower()]
    if family != "sd2":
        return "epsilon"
    architecture = header.metadata.get("modelspec.architecture", "")
    for ending, prediction in (("v2-512", "epsilon"), ("v2-768-v", "v_prediction")):
        if architecture.endswith(ending):
            return _PREDICTIONS[prediction]
    published = _PUBLISHED.get(sha256_of(path))  # last, for it reads the whole file
    if published is None:
        raise UsageError(
            f"{path}: Stable Diffusion 2.x comes in two kinds with the same keys and shapes, and this file does not "
            "say which it is; the wrong one gives noise. Add --prediction-type epsilon for a model of 512 pixels "
            "(2.1-base), --prediction-type v_prediction for one of 768 pixels (2.1)."
        )
    return published
