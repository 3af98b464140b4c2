"""A loss that means something: on pictures that are not trained on, and relative to the base model's.

The loss of a training step depends on the diffusion times and the noise drawn far more than on what was learnt. Here
the same few samples (picture, time, noise: see probe_sets.py) are measured again and again, and the result is divided
by that of the frozen base, the adapters off. Below 1, something was learnt. Some training pictures are measured as
well as some held-out ones: a gap that widens between the two is what was remembered rather than learnt.

Its cost: 2 x PICTURES x BANDS = 64 samples forwards through the UNet. A training sample costs about two forwards, so at
the defaults, 4 samples a step and 250 steps from one measurement to the next, that is 64 to 2000: 3 % of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.batches import Batch
from minisd.ddpm import NoiseSchedule
from minisd.distributed import Distributed, gather, gather_shares
from minisd.errors import NonFiniteError, Stopped
from minisd.interruptions import StopRequest
from minisd.latent_cache import identity
from minisd.lora import LoRAAdapter
from minisd.probe_sets import BANDS, PICTURES, PLACES, ProbeSet, time_bands
from minisd.trackers import Ratio
from minisd.training import latents_of, prediction_and_target
from minisd.weights import StableDiffusion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """What is measured, and what it is compared with.

    Args:
        sets: "train" and "held_out".
        schedule: of the noise, on the device.
        dtype: of the forward pass.
        identity: a hash of all that the base's losses follow from.
        base: of each set, the frozen base's mean loss in each band.
    """

    sets: Mapping[str, ProbeSet]
    schedule: NoiseSchedule
    dtype: torch.dtype
    identity: str
    base: Mapping[str, list[float]]

    def as_json(self) -> str:
        """The content of OUTPUT/probe.json."""
        content = {
            "identity": self.identity,
            "bands": time_bands(self.schedule.config.num_train_timesteps),
            **{name: {"pictures": part.names(), "base": self.base[name]} for name, part in self.sets.items()},
            "held_out_pictures": [example.path.name for example in self.sets["held_out"].samples.examples],
        }
        return json.dumps(content, indent=2) + "\n"


def make_probe(
    output: Path,
    dist: Distributed,
    model: StableDiffusion,
    sets: Mapping[str, ProbeSet],
    dtype: torch.dtype,
    unet_weights: str,
    stop: StopRequest,
) -> Probe:
    """Take the base's losses from OUTPUT/probe.json, if they are those of these sets, or measure them.

    All processes together; nothing is written.

    Args:
        output: the run's folder.
        dist: this process among the others.
        model: its UNet on the device, with or without adapters, which are off while the base is measured.
        sets: what they read is in the cache.
        dtype: of the forward pass.
        unet_weights: weights.weights_id of the UNet.
        stop: measuring breaks off when it is requested.

    Raises:
        NonFiniteError: a loss of the base is not finite; names the picture.
        Stopped: a process was asked to stop.
    """
    schedule = model.schedule.to(dist.device)
    content = [
        "minisd/1/probe",
        identity(unet_weights, dtype, dist.device),
        asdict(schedule.config),
        {name: part.content() for name, part in sets.items()},
    ]
    probe = Probe(sets, schedule, dtype, hashlib.sha256(json.dumps(content).encode()).hexdigest(), {})
    base = gather(dist, _stored_base(output / "probe.json", probe.identity) if dist.is_main else None)[0]
    if base is None:
        with adapters_off(model.unet):
            base = _mean_losses(probe, model, dist, stop)
    if base is None:
        raise Stopped(stop.reason or "another process was asked to")
    return replace(probe, base=base)


def measure(probe: Probe, model: StableDiffusion, dist: Distributed, stop: StopRequest) -> dict[str, Ratio] | None:
    """The loss of the model as it is, divided by the base's. All processes together, each a share of the samples.

    The batches are the same on any number of processes and are added up in one order. So the same weights give the same
    figure, to the bit where each process has as many threads.

    Args:
        probe: what is measured.
        model: with its adapters; the UNet is put back into the mode it was in.
        dist: this process among the others.
        stop: measuring breaks off when it is requested.

    Returns:
        For "train" and "held_out" the ratio in each band, and their mean. None if a process was asked to stop.

    Raises:
        NonFiniteError: a loss is not finite; names the picture.
    """
    losses = _mean_losses(probe, model, dist, stop)
    if losses is None:
        return None
    bands = {name: [a / b for a, b in zip(losses[name], probe.base[name], strict=True)] for name in losses}
    return {name: Ratio(ratio=sum(ratios) / BANDS, bands=ratios) for name, ratios in bands.items()}


def is_measured(output: Path, step: int) -> bool:
    """Whether OUTPUT/validation.jsonl has a line of this step. Torn lines are gone: a run rewinds it at its start."""
    path = output / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(json.loads(line)["step"] == step for line in lines)


@contextmanager
def adapters_off(unet: nn.Module) -> Iterator[None]:
    """Make the UNet exactly the frozen base, by strength 0 of every adapter; afterwards each has its own again."""
    adapters = [module for module in unet.modules() if isinstance(module, LoRAAdapter)]
    scales = [adapter.lora_scale for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.lora_scale = 0.0
        yield
    finally:
        for adapter, scale in zip(adapters, scales, strict=True):
            adapter.lora_scale = scale


def _mean_losses(
    probe: Probe, model: StableDiffusion, dist: Distributed, stop: StopRequest
) -> dict[str, list[float]] | None:
    """Of each set, the mean loss in each band. None if a process was asked to stop. Raises NonFiniteError."""
    batches = [(part, place) for part in probe.sets.values() for place in PLACES]
    mine = batches[dist.rank :: dist.world_size]
    share: list[list[float]] = []
    was_training = model.unet.training
    model.unet.eval()  # no dropout in the adapters
    try:
        for part, place in mine:
            if stop.requested:
                break
            share.append(_losses(probe, model, part.batch(place).to(dist.device)).tolist())
    finally:
        model.unet.train(was_training)
    if not all(gather(dist, len(share) == len(mine))):
        return None
    losses = gather_shares(dist, share)  # by batch, by band: the same numbers in the same order on every rank
    for (part, place), found in zip(batches, losses, strict=True):
        if not all(map(math.isfinite, found)):
            raise NonFiniteError(
                f"{part.names()[place]!r}: its validation loss is not finite: {found}. Lower --learning-rate, or use "
                "--mixed-precision bf16 or no."
            )
    rows = {name: losses[i * PICTURES : (i + 1) * PICTURES] for i, name in enumerate(probe.sets)}
    return {name: [sum(band) / PICTURES for band in zip(*found, strict=True)] for name, found in rows.items()}


@torch.no_grad()
def _losses(probe: Probe, model: StableDiffusion, batch: Batch) -> Tensor:
    """The loss of each sample, not weighted (DDPM, arXiv:2006.11239, eq. 14): [B] float32."""
    assert batch.moments is not None
    model_pred, target = prediction_and_target(
        model.unet,
        probe.schedule,
        latents_of(model.vae, batch.moments, batch.posterior_noise),
        batch.noise,
        batch.timesteps,
        batch.conditioning(probe.dtype),
        dtype=probe.dtype,
    )
    return (model_pred - target).square().mean(dim=(1, 2, 3))  # [B, 4, h, w] -> [B]


def _stored_base(path: Path, wanted: str) -> dict[str, list[float]] | None:
    """The base's losses in a probe.json, if its identity is the one wanted."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["identity"] == wanted:
            return {name: stored[name]["base"] for name in ("train", "held_out")}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not ours
        return None
    log.warning(
        "%s is of other pictures, another model or another kind of device. The base is measured again, and the "
        "validation loss goes on from another level.", path
    )  # fmt: skip
    return None
