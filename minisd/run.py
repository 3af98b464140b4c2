"""Everything before the loop: data, model, adapter, optimizer, plan, checkpoint, caches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.batches import Batch, TrainingSamples, training_batches
from minisd.buckets import Geometry
from minisd.config import DEFAULT_STEPS, TrainConfig
from minisd.data import Example, Survey
from minisd.ddpm import NoiseSchedule
from minisd.distributed import Distributed, gather, wait_for_all
from minisd.hub import resolve_model
from minisd.interruptions import StopRequest
from minisd.latent_cache import cache_captions, cache_latents, identity
from minisd.lora import lora_parameters
from minisd.optimizer import make_optimizer
from minisd.plan import MicroBatches, TrainingPlan, describe, picture_table
from minisd.run_setup import add_adapter, base_model, geometries_of, lora_info, read_data, resolution_of
from minisd.run_state import Progress, TrainingState, describe_run, start_or_resume, write_if_new
from minisd.tensor_cache import TensorCache
from minisd.text import TextEncoder
from minisd.training import Precision, recompute_activations
from minisd.weights import StableDiffusion, weights_id

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
    examples, surveys = read_data(config, dist)
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
    resolution = resolution_of(config, model)
    geometries = geometries_of(config, examples, surveys, resolution, model.vae.pixels_per_latent)
    plan = TrainingPlan(geometries, images_per_step, config.seed)
    max_train_steps = steps_of_run(config, plan.steps_per_epoch)
    weights = model_identities(config, dist, model)
    description = describe_run(
        config,
        examples,
        surveys,
        resolution=resolution,
        images_per_step=images_per_step,
        steps=max_train_steps,
        weights=weights,
    )
    info = lora_info(config, model, schedule, resolution, max_train_steps)
    state = TrainingState(unet, optimizer, precision.scaler(), Progress(), description, info)
    start_or_resume(config, dist, state)
    if dist.is_main:
        table = picture_table([e.path.name for e in examples], [found.size for found in surveys], geometries)
        write_if_new(config.output / "pictures.csv", table.encode())
    log.info("%s", describe(plan, geometries, max_train_steps))
    stands = f"resuming at step {state.progress.step}" if state.progress.step else "starting at step 0"
    ratio = config.scale_alpha / config.rank
    log.info("rank %d, alpha / rank %g, in %d layers; %s", config.rank, ratio, len(adapted), stands)

    samples = samples_of(config, dist, model, examples, surveys, geometries, plan, weights, check_stop=stop.check)
    predict = torch.compile(unet) if config.compile else unet
    return Run(
        model, predict, schedule, precision, samples, accumulation_steps, images_per_step, max_train_steps, state
    )


def steps_of_run(config: TrainConfig, steps_per_epoch: int) -> int:
    """Length of the run in optimizer steps."""
    if config.num_train_epochs is not None:
        return config.num_train_epochs * steps_per_epoch
    return DEFAULT_STEPS if config.max_train_steps is None else config.max_train_steps


def model_identities(config: TrainConfig, dist: Distributed, model: StableDiffusion) -> dict[str, str]:
    """Network -> weights_id of it. The main process hashes the files, for all."""
    names = ("unet", "vae", "text_encoder")
    own = [weights_id(model.source, name, variant=config.variant) for name in names] if dist.is_main else []
    return dict(zip(names, gather(dist, own)[0], strict=True))


def samples_of(
    config: TrainConfig,
    dist: Distributed,
    model: StableDiffusion,
    examples: Sequence[Example],
    surveys: Sequence[Survey],
    geometries: Sequence[Geometry],
    plan: TrainingPlan,
    weights: Mapping[str, str],
    *,
    check_stop: Callable[[], None],
) -> TrainingSamples:
    """The samples of the run, what they read cached. The text encoder leaves the device, and the VAE if it can."""
    cache = TensorCache(config.cache_folder)
    captions = [caption for example in examples for caption in example.captions]
    chunks = chunks_of(config, captions, model.text_encoder)
    text_weights = f"{identity(weights['text_encoder'], model.text_encoder.dtype, dist.device)}/{chunks}"
    vae_weights = identity(weights["vae"], model.vae.quant_conv.weight.dtype, dist.device)
    samples = TrainingSamples(
        examples,
        surveys,
        geometries,
        plan,
        cache,
        text_weights=text_weights,
        vae_weights=vae_weights if config.cache_latents else None,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        caption_dropout=config.caption_dropout,
        noise_offset=config.noise_offset,
        seed=config.seed,
        latent_channels=model.vae.config.latent_channels,
        pixels_per_latent=model.vae.pixels_per_latent,
        num_train_timesteps=model.schedule.config.num_train_timesteps,
        is_xl=model.unet.config.is_xl,
    )
    cache_captions(cache, captions, model.text_encoder, text_weights, dist, chunks=chunks)
    model.text_encoder.to(device="cpu")
    if config.cache_latents:
        workers = config.dataloader_num_workers
        cache_latents(cache, samples.views(), model.vae, vae_weights, dist, num_workers=workers, check_stop=check_stop)
        model.vae.to("cpu")
    return samples


def chunks_of(config: TrainConfig, captions: Sequence[str], text_encoder: TextEncoder) -> int:
    """Chunks to which every caption is padded or cut: what the longest needs, up to --max-caption-tokens.

    One number for the whole run, so that a sample does not depend on those beside it in a batch. Warns of captions that
    say nothing, and of those that are cut.
    """
    empty = sum(not caption.strip() for caption in captions)
    if empty:
        log.warning("%d of %d captions are empty", empty, len(captions))
    chunk = text_encoder.max_tokens - 2
    chunks = min(text_encoder.chunks(captions), max(1, config.max_caption_tokens // chunk))
    long = [caption for caption in captions if text_encoder.token_count(caption) > chunks * chunk]
    if long:
        log.warning("%d of %d captions are cut at %d tokens: %r ...", len(long), len(captions), chunks * chunk,
                    long[0][:80])  # fmt: skip
    if chunks > 1:
        log.info("captions are read in %d chunks of %d tokens", chunks, chunk)
    return chunks


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
