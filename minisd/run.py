"""Everything before the loop: data, model, adapter, optimizer, plan, checkpoint, caches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.batches import Batch, TrainingSamples, training_batches
from minisd.config import DEFAULT_STEPS, TrainConfig
from minisd.ddpm import NoiseSchedule
from minisd.distributed import Distributed, wait_for_all
from minisd.held_out import read_pictures
from minisd.hub import resolve_model
from minisd.interruptions import StopRequest
from minisd.lora import lora_parameters
from minisd.optimizer import make_optimizer
from minisd.plan import MicroBatches, TrainingPlan, describe, picture_table
from minisd.probe_sets import probe_sets
from minisd.run_samples import chunks_of, encode, model_identities, samples_of
from minisd.run_setup import add_adapter, base_model, geometries_of, lora_info, resolution_of
from minisd.run_state import Progress, TrainingState, describe_run, start_or_resume, write_if_new
from minisd.training import Precision, recompute_activations
from minisd.validation_loss import Probe, make_probe
from minisd.weights import StableDiffusion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What `prepare` makes for the loop.

    Attributes:
        model: the networks, adapters in the UNet.
        predict: the UNet's forward, compiled or not.
        schedule: of the noise, on the device.
        precision: what runs in which dtype.
        samples: of the run, by position.
        probe: of the validation loss; None if no pictures are held out.
        accumulation_steps: micro-steps in a step.
        images_per_step: over all processes.
        max_train_steps: the run's length.
        state: what a checkpoint holds.
    """

    model: StableDiffusion
    predict: Callable[..., Tensor]
    schedule: NoiseSchedule
    precision: Precision
    samples: TrainingSamples
    probe: Probe | None
    accumulation_steps: int
    images_per_step: int
    max_train_steps: int
    state: TrainingState


def prepare(config: TrainConfig, dist: Distributed, stop: StopRequest) -> Run:
    """Read, load, plan, resume and cache. All processes together.

    Raises:
        MinisdError: bad data, weights, checkpoint or settings.
        Stopped: a signal came.
    """
    pictures, held_out = read_pictures(config, dist)
    accumulation_steps = config.accumulation_steps(dist.world_size)
    images_per_step = dist.world_size * accumulation_steps * config.train_batch_size

    # --- model, adapter, optimizer ---
    if dist.is_main:
        resolve_model(config.model, revision=config.revision, variant=config.variant)  # downloads once, for all
    wait_for_all(dist)
    precision = Precision(config.mixed_precision, dist.device.type)
    model = base_model(config, dist.device)
    unet, schedule = model.unet.train(), model.schedule.to(dist.device)
    adapted = add_adapter(config, unet)
    if config.gradient_checkpointing:
        recompute_activations(unet)
    parameters = [parameter for _, parameter in lora_parameters(unet)]
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate, config.weight_decay)

    # --- the plan, and where the run stands ---
    geometries = geometries_of(config, model, pictures)
    geometries_held_out = [] if held_out is None else geometries_of(config, model, held_out)
    plan = TrainingPlan(geometries, images_per_step, config.seed)
    max_train_steps = steps_of_run(config, plan.steps_per_epoch)
    weights = model_identities(config, dist, model)
    resolution = resolution_of(config, model)
    description = describe_run(
        config, pictures, resolution=resolution, images_per_step=images_per_step, steps=max_train_steps, weights=weights
    )
    info = lora_info(config, model, schedule, resolution, max_train_steps)
    state = TrainingState(unet, optimizer, precision.scaler(), Progress(), description, info)
    start_or_resume(config, dist, state)
    if dist.is_main:
        table = picture_table(pictures.names, [found.size for found in pictures.surveys], geometries)
        write_if_new(config.output / "pictures.csv", table.encode())
    log.info("%s", describe(plan, geometries, max_train_steps))
    stands = f"resuming at step {state.progress.step}" if state.progress.step else "starting at step 0"
    ratio = config.scale_alpha / config.rank
    log.info("rank %d, alpha / rank %g, in %d layers; %s", config.rank, ratio, len(adapted), stands)

    # --- what the samples read ---
    chunks = chunks_of(config, pictures, model.text_encoder)
    samples = samples_of(config, dist, model, pictures, geometries, plan, weights, chunks)
    sets = {} if held_out is None else probe_sets(samples, held_out, geometries_held_out)
    encode(config, dist, model, [samples, *sets.values()], chunks, check_stop=stop.check)
    if config.cache_latents:
        model.vae.to("cpu")
    probe = None
    if sets:
        probe = make_probe(config.output, dist, model, sets, precision.dtype, weights["unet"], stop)
        if dist.is_main:
            write_if_new(config.output / "probe.json", probe.as_json().encode())
    predict = torch.compile(unet) if config.compile else unet
    return Run(
        model, predict, schedule, precision, samples, probe, accumulation_steps, images_per_step, max_train_steps, state
    )


def probe_of(config: TrainConfig, dist: Distributed, model: StableDiffusion) -> Probe | None:
    """What the validation loss of a run is measured on, for who looks at its checkpoints. All processes together.

    Args:
        config: of the run. The base's losses are taken from config.output / "probe.json"; the cache may be written.
        dist: this process among the others.
        model: as `run_setup.base_model` loads it for this config, on the device, where it is afterwards; with or
            without adapters.

    Returns:
        What `validation_loss.measure` takes; None if the run holds no pictures out.

    Raises:
        DataError: a dataset cannot be used.
        DiskError: the cache cannot be written.
        NonFiniteError: latents, an embedding or a loss of the base is not finite.
    """
    pictures, held_out = read_pictures(config, dist)
    if held_out is None:
        return None
    weights, stop = model_identities(config, dist, model), StopRequest()
    geometries = geometries_of(config, model, pictures)
    chunks = chunks_of(config, pictures, model.text_encoder)
    plan = TrainingPlan(geometries, 1, config.seed)  # which step shows a picture does not matter here
    samples = samples_of(config, dist, model, pictures, geometries, plan, weights, chunks)
    sets = probe_sets(samples, held_out, geometries_of(config, model, held_out))
    encode(config, dist, model, list(sets.values()), chunks, check_stop=stop.check)
    model.text_encoder.to(device=dist.device)  # which `encode` has sent away
    dtype = Precision(config.mixed_precision, dist.device.type).dtype
    return make_probe(config.output, dist, model, sets, dtype, weights["unet"], stop)


def steps_of_run(config: TrainConfig, steps_per_epoch: int) -> int:
    """Length of the run in optimizer steps."""
    if config.num_train_epochs is not None:
        return config.num_train_epochs * steps_per_epoch
    return DEFAULT_STEPS if config.max_train_steps is None else config.max_train_steps


def batches_from(config: TrainConfig, dist: Distributed, run: Run) -> Iterator[Batch]:
    """The micro-batches of this process from where the run stands to its end."""
    micro_batches = MicroBatches(
        run.state.progress.step,
        run.max_train_steps,
        dist.rank,
        dist.world_size,
        config.train_batch_size,
        run.accumulation_steps,
    )
    pin_memory = dist.device.type == "cuda"
    return training_batches(
        run.samples, micro_batches, num_workers=config.dataloader_num_workers, pin_memory=pin_memory
    )
