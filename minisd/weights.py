"""A model, by its name -> its networks with their weights, ready to use and frozen.

A network is built without memory (on the "meta" device) from its config.json, then filled (strict_load.py). Its
attribute names are the keys of the files in diffusers layout, so nothing is translated but the names of old layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minisd import single_file
from minisd.clip import clip_keys, load_tokenizer
from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.errors import UsageError, WeightsError
from minisd.families import OTHER_CHANNELS, Json, ModelConfigs, network_on_meta
from minisd.hub import commit_of, resolve_model
from minisd.ldm_keys import rename_old_vae_attention
from minisd.model_checks import check_parts, check_prediction
from minisd.model_files import read_json, sha256_of
from minisd.model_folder import networks_in, tokenizer_of, weight_files
from minisd.strict_load import fill
from minisd.text import CLIP, TextEncoder
from minisd.unet import UNet2DConditionModel
from minisd.vae import AutoencoderKL


@dataclass(frozen=True)
class StableDiffusion:
    """A loaded model: the networks, the noise schedule it was trained on, and where it came from."""

    name: str  # as the user gave it
    source: Path  # a folder in diffusers layout, or a single file
    configs: ModelConfigs
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: TextEncoder
    schedule: NoiseSchedule

    @property
    def is_xl(self) -> bool:
        """Whether it is Stable Diffusion XL."""
        return self.unet.config.is_xl

    @property
    def commit(self) -> str | None:
        """The commit of the Hub repository it was loaded from; None if it was loaded from elsewhere."""
        return commit_of(self.source)

    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may adapt: "unet", "text_encoder" and, of XL, "text_encoder_2"."""
        return {"unet": self.unet, **self.text_encoder.networks()}


def load_model(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: single_file.Prediction | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusion:
    """Load a whole model, by the name that hub.resolve_model understands.

    Args:
        model: "pocket", a folder, a single .safetensors file, or a Hub repository id.
        revision: of a repository.
        variant: of the files in a folder or repository.
        prediction_type: what the UNet predicts, for a single file that does not say.
        dtype: what weights are cast to. The VAE of XL stays in float32: its activations overflow float16.
        device: where they go.

    Raises:
        WeightsError: it does not exist, is incomplete or damaged, or its parts do not belong together.
        NetworkError: it has to be downloaded, and cannot be.
        UsageError: a single file does not say what its UNet predicts, or a folder says something else.
    """
    source = resolve_model(model, revision=revision, variant=variant)
    # The parts in the order of their size: a refusal comes soon.
    if source.is_file():
        family, configs = single_file.identify(source, prediction_type)
        schedule = NoiseSchedule(NoiseScheduleConfig.from_json(configs.scheduler, xl=configs.is_xl))
        tokenizers = single_file.tokenizers(family)
        dtypes = {part: _dtype(part, dtype, xl=configs.is_xl) for part in configs.networks}
        networks = single_file.load_networks(source, configs, dtypes, device)
        text_networks = [networks[part] for part in configs.networks if part.startswith("text_encoder")]
        clips = [CLIP(network, tokenizer) for network, tokenizer in zip(text_networks, tokenizers, strict=True)]
        text_encoder = TextEncoder(clips, zeros_when_absent=configs.zeros_when_absent)
        unet, vae = _with_layout(networks["unet"], device), networks["vae"]
    else:
        configs = _read_configs(source)
        schedule = load_noise_schedule(source)
        check_prediction(source, configs, schedule, prediction_type)
        text_encoder = load_text_encoder(source, variant=variant, dtype=dtype, device=device)
        vae = load_vae(source, variant=variant, dtype=_dtype("vae", dtype, xl=configs.is_xl), device=device)
        unet = load_unet(source, variant=variant, dtype=dtype, device=device)
    assert isinstance(unet, UNet2DConditionModel)
    assert isinstance(vae, AutoencoderKL)
    check_parts(source, unet.config, vae.config, text_encoder)
    return StableDiffusion(model, source, configs, unet, vae, text_encoder, schedule)


def load_unet(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet2DConditionModel:
    """Load the denoiser from folder/unet. Raises WeightsError."""
    path = folder / "unet" / "config.json"
    channels = read_json(path).get("in_channels", 4)
    if channels in OTHER_CHANNELS:
        what = f"{OTHER_CHANNELS[channels]} ({channels} input channels)"
        raise WeightsError(f"{path}: {what} is not supported. Choose its base model.")
    unet = _with_layout(_load_network(folder, "unet", variant, dtype, device), device)
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def suits_channels_last(device: torch.device) -> bool:
    """Whether the UNet's convolutions are faster with the channels innermost, as far as it was measured.

    On a CPU they are, by a few per cent of a step (docs/benchmarks.md). On CUDA it has not been measured, and every
    GroupNorm would copy. For training and drawing alike: the last bits of a picture depend on it.
    """
    return device.type == "cpu"


def load_vae(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AutoencoderKL:
    """Load the autoencoder from folder/vae. Raises WeightsError."""
    vae = _load_network(folder, "vae", variant, dtype, device)
    assert isinstance(vae, AutoencoderKL)
    return vae


def load_text_encoder(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load the text encoders and tokenizers of a folder. Raises WeightsError."""
    clips = []
    for part in networks_in(folder):
        if part.startswith("text_encoder"):
            tokenizer = load_tokenizer(folder / tokenizer_of(part))
            network = _load_network(folder, part, variant, dtype, device)
            clips.append(CLIP(network, tokenizer))
            if len(tokenizer) > clips[-1].vocabulary_size:
                sizes = f"the tokenizer has {len(tokenizer)} tokens, the {part} {clips[-1].vocabulary_size}"
                raise WeightsError(f"{folder}: {sizes}. They are of different models.")
    return TextEncoder(clips, zeros_when_absent=_zeros_when_absent(folder))


def load_noise_schedule(folder: Path) -> NoiseSchedule:
    """Read the noise schedule from folder/scheduler. Raises WeightsError."""
    path = folder / "scheduler" / "scheduler_config.json"
    with _blaming(path):
        return NoiseSchedule(NoiseScheduleConfig.from_json(read_json(path), xl="text_encoder_2" in networks_in(folder)))


def with_zero_terminal_snr(model: StableDiffusion) -> StableDiffusion:
    """The same networks on a noise schedule that ends in pure noise (arXiv:2305.08891).

    Raises:
        UsageError: the model predicts epsilon, from which x_0 does not follow when there is no signal.
    """
    config = model.schedule.config
    if config.prediction_type == "epsilon":
        raise UsageError(
            f"zero terminal SNR needs a v-prediction model; {model.name} predicts epsilon. Leave --zero-terminal-snr "
            "out, or choose another --model."
        )
    configs = replace(model.configs, scheduler={**model.configs.scheduler, "rescale_betas_zero_snr": True})
    return replace(model, configs=configs, schedule=NoiseSchedule(replace(config, rescale_betas_zero_snr=True)))


def weights_id(source: Path, part: str, *, variant: str | None = None) -> str:
    """Identify what a network computes: a hash over its configuration, its weights and, for text, its tokenizer.

    Args:
        source: a model folder or a single file.
        part: "unet", "vae" or "text_encoder"; the last stands for both text encoders of SDXL.
        variant: as for loading.

    Returns:
        "sha256:" and 64 hex digits. Equal files give an equal id, wherever they lie.
    """
    digest = hashlib.sha256()
    if source.is_file():
        digest.update(f"{part} {sha256_of(source)}\n".encode())
        return f"sha256:{digest.hexdigest()}"
    files: list[Path] = []
    for network in networks_in(source):
        if network.startswith(part):
            files += [source / network / "config.json", *weight_files(source, network, variant)]
            if part == "text_encoder":
                folder = source / tokenizer_of(network)
                files += sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))
    for path in files:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _read_configs(folder: Path) -> ModelConfigs:
    """Read the JSON files of a model folder."""
    networks = {part: read_json(folder / part / "config.json") for part in networks_in(folder)}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return ModelConfigs(networks, scheduler, _zeros_when_absent(folder))


def _zeros_when_absent(folder: Path) -> bool:
    if "text_encoder_2" not in networks_in(folder):
        return False
    index = folder / "model_index.json"
    # Left out, it is on: the default of diffusers' pipeline.
    zeros = read_json(index).get("force_zeros_for_empty_prompt", True) if index.is_file() else True
    if type(zeros) is not bool:
        raise WeightsError(f"{index}: force_zeros_for_empty_prompt={zeros!r} is neither true nor false.")
    return zeros


def _dtype(part: str, dtype: torch.dtype, *, xl: bool) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if xl and part == "vae" else dtype


def _with_layout(unet: nn.Module, device: torch.device | str) -> nn.Module:
    return unet.to(memory_format=torch.channels_last) if suits_channels_last(torch.device(device)) else unet


def _load_network(
    folder: Path, part: str, variant: str | None, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Load one network of a model folder."""
    path = folder / part / "config.json"
    raw: Json = read_json(path)
    with _blaming(path):
        network = network_on_meta(part, raw)
    keys = {"unet": lambda key: key, "vae": rename_old_vae_attention}
    rename = keys[part] if part in keys else clip_keys(network)
    complaint = f"{folder / part}: the weights do not fit config.json"
    fill(network, weight_files(folder, part, variant), rename, dtype, device, complaint=complaint)
    return network


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn the complaints of a network about its configuration into a WeightsError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())[:300]}. This model cannot be read.") from error
    except WeightsError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise WeightsError(f"{where}{error}") from error
