"""A model folder in diffusers layout -> networks with their weights, ready to use and frozen.

A network is built without memory (on the "meta" device) from its config.json, then filled (strict_load.py). Its
attribute names are the keys of the files, so nothing is translated but the names of old layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.errors import UsageError, WeightsError
from minisd.hub import resolve_model
from minisd.ldm_keys import rename_old_vae_attention
from minisd.model_files import read_json
from minisd.model_folder import weight_files
from minisd.strict_load import fill
from minisd.text import TextEncoder, clip_key, clip_on_meta, load_tokenizer
from minisd.unet import UNet2DConditionModel, UNetConfig
from minisd.vae import AutoencoderKL, AutoencoderKLConfig


@dataclass(frozen=True)
class StableDiffusion:
    """A loaded model: the networks, the noise schedule it was trained on, and where it came from."""

    name: str  # as the user gave it
    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: TextEncoder
    schedule: NoiseSchedule


def load_model(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusion:
    """Load a whole model, by the name that hub.resolve_model understands.

    Raises:
        WeightsError: it does not exist, is incomplete or damaged, or its parts do not belong together.
        NetworkError: it has to be downloaded, and cannot be.
    """
    folder = resolve_model(model, revision=revision, variant=variant)
    schedule = load_noise_schedule(folder)  # the parts in the order of their size: a refusal comes soon
    text_encoder = load_text_encoder(folder, variant=variant, dtype=dtype, device=device)
    vae = load_vae(folder, variant=variant, dtype=dtype, device=device)
    unet = load_unet(folder, variant=variant, dtype=dtype, device=device)
    if unet.config.cross_attention_dim != text_encoder.width:
        widths = f"the UNet reads prompts {unet.config.cross_attention_dim} wide, the text encoder writes"
        raise WeightsError(f"{folder}: {widths} {text_encoder.width}. Its parts are of different models.")
    if unet.config.in_channels != vae.config.latent_channels:
        channels = f"the UNet reads latents of {unet.config.in_channels} channels, the VAE writes"
        raise WeightsError(f"{folder}: {channels} {vae.config.latent_channels}. Its parts are of different models.")
    return StableDiffusion(model, folder, unet, vae, text_encoder, schedule)


def load_unet(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet2DConditionModel:
    """Load the denoiser from folder/unet. Raises WeightsError."""
    path = folder / "unet" / "config.json"
    raw = read_json(path)
    if raw.get("addition_embed_type") == "text_time":
        raise WeightsError(f"{path}: Stable Diffusion XL is not supported. Choose an SD 1.x or 2.x model.")
    if raw.get("in_channels", 4) == 9:
        raise WeightsError(f"{path}: an inpainting model (9 input channels) is not supported. Choose its base model.")
    with _blaming(path), torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_json(raw))
    fill(unet, weight_files(folder, "unet", variant), lambda key: key, dtype, device)
    if suits_channels_last(torch.device(device)):
        unet.to(memory_format=torch.channels_last)
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
    path = folder / "vae" / "config.json"
    with _blaming(path), torch.device("meta"):
        vae = AutoencoderKL(AutoencoderKLConfig.from_json(read_json(path)))
    fill(vae, weight_files(folder, "vae", variant), rename_old_vae_attention, dtype, device)
    return vae


def load_text_encoder(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load the text encoder from folder/text_encoder and folder/tokenizer. Raises WeightsError."""
    path = folder / "text_encoder" / "config.json"
    with _blaming(path):
        network = clip_on_meta(read_json(path))
    fill(network, weight_files(folder, "text_encoder", variant), clip_key, dtype, device)
    tokenizer = load_tokenizer(folder / "tokenizer")
    text_encoder = TextEncoder(network, tokenizer)
    if len(tokenizer) > text_encoder.vocabulary_size:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the text encoder {text_encoder.vocabulary_size}"
        raise WeightsError(f"{folder}: {sizes}. They are of different models.")
    return text_encoder


def load_noise_schedule(folder: Path) -> NoiseSchedule:
    """Read the noise schedule from folder/scheduler. Raises WeightsError."""
    path = folder / "scheduler" / "scheduler_config.json"
    with _blaming(path):
        return NoiseSchedule(NoiseScheduleConfig.from_json(read_json(path)))


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
    return replace(model, schedule=NoiseSchedule(replace(config, rescale_betas_zero_snr=True)))


def weights_id(folder: Path, part: str, *, variant: str | None = None) -> str:
    """Identify what a network computes: a hash over its configuration, its weights and, for text, its tokenizer.

    Args:
        folder: a model folder.
        part: "unet", "vae" or "text_encoder".
        variant: as for loading.

    Returns:
        "sha256:" and 64 hex digits. Equal files give an equal id, wherever they lie.
    """
    files = [folder / part / "config.json", *weight_files(folder, part, variant)]
    if part == "text_encoder":
        files += sorted(path for path in (folder / "tokenizer").iterdir() if path.suffix in (".json", ".txt"))
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {_sha256(path, status.st_size, status.st_mtime_ns)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file; size and time of change are there for the cache to notice that it is another one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
