"""What is written into a picture: the text that A1111 reads back, and the record that `--from-png` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minisd.a1111_text import parameters_text
from minisd.lora_choice import LoRAChoice, lora_hashes, prompt_with_loras
from minisd.lora_info import public_name
from minisd.model_files import sha256_of
from minisd.picture_record import Origin, PictureRecord, recorded_options, to_json
from minisd.sample_plan import Batch
from minisd.sample_setup import settings_of
from minisd.weights import StableDiffusion, weights_id


def origin_of(model: StableDiffusion, variant: str | None, init_image_sha256: str) -> Origin:
    """What a picture depends on beside its options and LoRAs. Hashes the weights of a model that is not of the Hub.

    Raises:
        WeightsError: its files cannot be read.
    """
    device = model.unet.conv_in.weight.device
    return Origin(
        model_id=model.commit or _id_of_files(model.source, variant),
        init_image_sha256=init_image_sha256,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _id_of_files(source: Path, variant: str | None) -> str:
    """One hash over all networks of a model."""
    ids = [weights_id(source, part, variant=variant) for part in ("unet", "vae", "text_encoder")]
    return f"sha256:{hashlib.sha256(' '.join(ids).encode()).hexdigest()}"


def picture_texts(
    model: StableDiffusion, batch: Batch, place: int, loras: Sequence[LoRAChoice], origin: Origin
) -> tuple[str, str]:
    """What is written into a picture: the text that A1111 reads, and the record that --from-png reads."""
    config, seed = batch.config, batch.seeds[place]
    details = lora_hashes(loras)
    if model.source.is_file():
        details = [f"Model hash: {sha256_of(model.source)[:10]}", *details]
    prompt = prompt_with_loras(config.prompt[0], loras, batch.lora_factor)
    text = parameters_text(settings_of(config), prompt, seed, public_name(model.name), details)
    record = PictureRecord(
        options=recorded_options(asdict(replace(config, seed=seed))),
        seeds=tuple(batch.seeds),
        place=place,
        loras=tuple(lora.record(batch.lora_factor) for lora in loras),
        origin=origin,
    )
    return text, to_json(record)
