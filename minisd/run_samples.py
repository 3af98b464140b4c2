"""What is read for the samples of a run, and under which names it is kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from minisd.batches import TrainingSamples
from minisd.buckets import Geometry
from minisd.config import TrainConfig
from minisd.distributed import Distributed, gather
from minisd.held_out import Pictures
from minisd.latent_cache import cache_captions, cache_latents, identity
from minisd.plan import TrainingPlan
from minisd.probe_sets import ProbeSet
from minisd.tensor_cache import TensorCache
from minisd.text import TextEncoder
from minisd.weights import StableDiffusion, weights_id

log = logging.getLogger(__name__)


def model_identities(config: TrainConfig, dist: Distributed, model: StableDiffusion) -> dict[str, str]:
    """Network -> weights_id of it. The main process hashes the files, for all."""
    names = ("unet", "vae", "text_encoder")
    own = [weights_id(model.source, name, variant=config.variant) for name in names] if dist.is_main else []
    return dict(zip(names, gather(dist, own)[0], strict=True))


def samples_of(
    config: TrainConfig,
    dist: Distributed,
    model: StableDiffusion,
    pictures: Pictures,
    geometries: Sequence[Geometry],
    plan: TrainingPlan,
    weights: Mapping[str, str],
    chunks: int,
) -> TrainingSamples:
    """The samples of the run. What they read need not be in the cache yet."""
    text_weights = identity(weights["text_encoder"], model.text_encoder.dtype, dist.device)
    return TrainingSamples(
        pictures.examples,
        pictures.surveys,
        geometries,
        plan,
        TensorCache(config.cache_folder),
        text_weights=f"{text_weights}/{chunks}",
        vae_weights=identity(weights["vae"], model.vae.quant_conv.weight.dtype, dist.device),
        cache_latents=config.cache_latents,
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


def encode(
    config: TrainConfig,
    dist: Distributed,
    model: StableDiffusion,
    parts: Sequence[TrainingSamples | ProbeSet],
    chunks: int,
    *,
    check_stop: Callable[[], None],
) -> None:
    """Put what these samples read into the cache they share, where it is missing. All processes together.

    The text encoder leaves the device for the CPU: the VAE needs the room.

    Args:
        config: of the run.
        dist: this process among the others.
        model: its VAE and text encoder on the device.
        parts: samples of one run.
        chunks: to which captions are padded or cut.
        check_stop: called after each picture; raises to break off.

    Raises:
        DataError: a picture cannot be read; names it.
        NonFiniteError: latents or an embedding are not finite.
        DiskError: the cache cannot be written.
    """
    samples = parts[0].samples if isinstance(parts[0], ProbeSet) else parts[0]
    captions = [caption for part in parts for caption in part.captions()]
    views = [view for part in parts for view in part.views()]
    cache_captions(samples.cache, captions, model.text_encoder, samples.text_weights, dist, chunks=chunks)
    model.text_encoder.to(device="cpu")
    workers = config.dataloader_num_workers
    cache_latents(
        samples.cache, views, model.vae, samples.vae_weights, dist, num_workers=workers, check_stop=check_stop
    )


def chunks_of(config: TrainConfig, pictures: Pictures, text_encoder: TextEncoder) -> int:
    """Chunks to which every caption is padded or cut: what the longest trained on needs, up to --max-caption-tokens.

    One number for the whole run, so that a sample does not depend on those beside it in a batch. Warns of captions that
    say nothing, and of those that are cut.
    """
    captions = pictures.captions
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
