"""Laws of the samples: each is what was drawn for its position, however the step is split and whoever reads it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minisd import draws
from minisd.batches import Batch, TrainingSamples, collate, training_batches
from minisd.buckets import Geometry, square_geometry
from minisd.data import Example, Survey
from minisd.distributed import Distributed
from minisd.errors import DataError, DiskError
from minisd.images import to_pixel_values
from minisd.latent_cache import cache_captions, cache_latents, caption_key, encode_moments
from minisd.picture_files import load_image
from minisd.plan import MicroBatches, TrainingPlan
from minisd.tensor_cache import TensorCache
from minisd.text import TextEncoder
from minisd.vae import AutoencoderKL

ALONE = Distributed(0, 1, torch.device("cpu"))
SEED = 3
SPLITS = [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)]  # processes, micro-steps, batch
BUCKETS = [Geometry((40, 40), (32, 40)), Geometry((40, 48), (40, 40)), Geometry((32, 32), (32, 32))]


Make = Callable[..., TrainingSamples]


@pytest.fixture
def make(tmp_path: Path, vae: AutoencoderKL, text_encoder: TextEncoder) -> Make:
    """Makes the samples of a dataset of nine pictures in three buckets, four a step, with latents cached or not."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 3), dtype=np.uint8)
    examples = []
    for i, colour in enumerate(colours):
        pixels = np.broadcast_to(colour, (60, 60, 3)).copy()
        pixels[:, 40:] //= 2  # one colour, and darker on the right: a mirrored one shows
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        examples.append(
            Example(tmp_path / f"{i}.png", (f"a {colour} picture", f"{i} again", f"number {i}")[: 1 + i % 3])
        )

    def made(*, cached: bool, geometries: list[Geometry] | None = None, **options: object) -> TrainingSamples:
        geometries = geometries or [BUCKETS[i % 3] for i in range(9)]
        cache = TensorCache(tmp_path / "cache")
        settings: dict[str, object] = {"center_crop": True, "random_flip": True, "caption_dropout": 0.3}
        samples = TrainingSamples(
            examples,
            [Survey(hashlib.sha256(example.path.read_bytes()).hexdigest(), (60, 60)) for example in examples],
            geometries,
            TrainingPlan(geometries, 4, SEED),
            cache,
            text_weights="text",
            vae_weights="vae",
            cache_latents=cached,
            **{**settings, "noise_offset": 0.0, **options},  # type: ignore[arg-type]
            seed=SEED,
            latent_channels=4,
            pixels_per_latent=4,
            num_train_timesteps=1000,
            is_xl=False,
        )
        captions = [caption for example in examples for caption in example.captions]
        cache_captions(cache, captions, text_encoder, "text", ALONE, chunks=1)
        if cached:
            cache_latents(cache, samples.views(), vae, "vae", ALONE, num_workers=0, check_stop=lambda: None)
        return samples

    return made


def _equal(a: Batch, b: Batch) -> bool:
    for field in fields(Batch):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if not (torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y):
            return False
    return True


def _read(samples: TrainingSamples, steps: range, split: tuple[int, int, int], workers: int) -> dict[int, Batch]:
    """Position -> its sample, as all processes of a run together read them."""
    world_size, accumulation, size = split
    found: dict[int, Batch] = {}
    for rank in range(world_size):
        micro_batches = MicroBatches(steps.start, steps.stop, rank, world_size, size, accumulation)
        for batch in training_batches(samples, micro_batches, num_workers=workers, pin_memory=False):
            assert len(batch.positions) == size
            for i, position in enumerate(batch.positions):
                assert position not in found
                found[position] = Batch(
                    **{
                        field.name: None if value is None else value[i : i + 1]
                        for field in fields(Batch)
                        for value in [getattr(batch, field.name)]
                    }
                )
    return found


# --- one sample ---


def test_a_sample_is_the_drawn_crop_and_flip_of_its_picture(make: Make) -> None:
    samples, centred = make(cached=False, center_crop=False), make(cached=False, random_flip=False)
    seen = set()
    for position in range(30):
        sample, index = samples[position], samples.plan.index(position)
        geometry, image = BUCKETS[index % 3], load_image(samples.examples[index].path)
        flip = draws.flip(SEED, position)
        seen.add(flip)
        wanted = to_pixel_values(image, geometry, crop=draws.crop(SEED, position), flip=flip)
        assert (sample.positions, sample.indices, sample.moments) == ([position], [index], None)
        assert sample.pixel_values is not None
        assert torch.equal(sample.pixel_values, wanted.unsqueeze(0))
        assert samples.path_of(position) == samples.examples[index].path
        plain = centred[position].pixel_values
        assert plain is not None
        assert torch.equal(plain[0], to_pixel_values(image, geometry, crop=None, flip=False))
    assert seen == {True, False}


def test_squares_are_the_samples_of_diffusers(make: Make) -> None:
    samples = make(cached=False, geometries=[square_geometry((60, 60), 32)] * 9)
    assert samples[0].noise.shape == (1, 4, 8, 8)


def test_a_sample_has_its_noise_and_its_time(make: Make) -> None:
    samples, shifted = make(cached=False), make(cached=False, noise_offset=0.1)
    for position in range(20):
        sample, other = samples[position], shifted[position]
        height, width = BUCKETS[samples.plan.index(position) % 3].size
        shape = (4, height // 4, width // 4)
        assert torch.equal(sample.noise[0], draws.noise(SEED, position, shape))
        assert torch.equal(sample.posterior_noise[0], draws.posterior_noise(SEED, position, shape))
        assert sample.timesteps.tolist() == [draws.timestep(SEED, position, 1000)]
        assert sample.timesteps.dtype == torch.int64
        shift = 0.1 * draws.noise_offset(SEED, position, 4)
        assert torch.equal(other.noise[0], sample.noise[0] + shift)
        assert other.noise.dtype == torch.float32
        assert torch.equal(other.posterior_noise, sample.posterior_noise)


def test_a_caption_is_drawn_from_those_of_its_picture_or_left_out(make: Make, text_encoder: TextEncoder) -> None:
    samples = make(cached=False)
    shown: dict[int, set[str]] = {}
    dropped = 0
    for position in range(400):
        caption, index = samples.caption_of(position), samples.plan.index(position)
        if draws.caption_dropout(SEED, position) < 0.3:
            assert caption is None
            dropped += 1
        else:
            captions = samples.examples[index].captions
            assert caption == captions[draws.caption_choice(SEED, position, len(captions))]
            shown.setdefault(index, set()).add(caption)
        if position < 30:
            assert torch.equal(samples[position].encoder_hidden_states, text_encoder([caption]).hidden_states)
    assert 90 < dropped < 150
    assert shown == {index: set(example.captions) for index, example in enumerate(samples.examples)}
    never, always = make(cached=False, caption_dropout=0.0), make(cached=False, caption_dropout=1.0)
    assert all(never.caption_of(position) for position in range(100))
    assert not any(always.caption_of(position) for position in range(100))


def test_views_are_all_that_a_run_can_show(make: Make) -> None:
    samples = make(cached=True)
    assert len(samples.views()) == 18
    assert len(make(cached=True, random_flip=False).views()) == 9
    for position in range(100):
        assert samples[position].moments is not None  # none is missing in the cache


# --- cached or not ---


def test_cached_and_computed_latents_are_equal_to_the_bit(make: Make, vae: AutoencoderKL) -> None:
    cached, computed = make(cached=True), make(cached=False)
    for step in range(5):
        positions = range(step * 4, step * 4 + 3)
        read, pixels = (collate([samples[position] for position in positions]) for samples in (cached, computed))
        assert pixels.pixel_values is not None
        assert read.moments is not None
        assert read.pixel_values is pixels.moments is None
        assert torch.equal(read.moments, encode_moments(vae, pixels.pixel_values))
        assert _equal(replace(read, moments=None), replace(pixels, pixel_values=None))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_has_the_latents_of_its_picture_and_the_words_of_its_caption(
    make: Make, vae: AutoencoderKL, text_encoder: TextEncoder, workers: int
) -> None:
    """What belongs together stays together through a shuffled epoch: recognised by content, not by index."""
    samples = make(cached=True)
    looks: dict[bytes, tuple[int, bool]] = {}
    for index, example in enumerate(samples.examples):
        for flip in (False, True):
            pixel_values = to_pixel_values(load_image(example.path), BUCKETS[index % 3], crop=None, flip=flip)
            looks[encode_moments(vae, pixel_values.unsqueeze(0)).numpy().tobytes()] = (index, flip)
    texts = [(index, caption) for index, example in enumerate(samples.examples) for caption in example.captions]
    words = {text_encoder([caption]).hidden_states.numpy().tobytes(): index for index, caption in texts}
    nothing = text_encoder([None]).hidden_states.numpy().tobytes()
    assert len(looks) == 18
    assert len(words) == len(texts)
    steps = samples.plan.steps_per_epoch
    seen, dropped, flipped = [], 0, set()
    for position, sample in _read(samples, range(steps), (1, 2, 2), workers).items():
        assert sample.moments is not None
        index, flip = looks[sample.moments.numpy().tobytes()]
        embedding = sample.encoder_hidden_states.numpy().tobytes()
        assert sample.indices == [index]
        assert flip == draws.flip(SEED, position)
        if embedding == nothing:
            dropped += 1
        else:
            assert words[embedding] == index
        seen.append(index)
        flipped.add(flip)
    assert sorted({*seen}) == list(range(9))
    assert 0 < dropped < len(seen) / 2
    assert flipped == {True, False}
    assert seen[:9] != sorted(seen[:9])


# --- micro-batches ---


@pytest.mark.parametrize(("cached", "workers"), [(True, 0), (False, 0), (True, 2), (False, 1)])
def test_batches_are_the_same_however_a_step_is_split(make: Make, cached: bool, workers: int) -> None:
    samples = make(cached=cached, noise_offset=0.1, center_crop=cached)
    state = torch.get_rng_state()
    for split in SPLITS if workers == 0 else SPLITS[2:3]:
        found = _read(samples, range(1, 4), split, workers)
        assert sorted(found) == list(range(4, 16))
        assert all(_equal(sample, samples[position]) for position, sample in found.items())
    assert torch.equal(state, torch.get_rng_state())  # reading draws nothing from the global generator


def test_a_rank_has_as_many_batches_as_the_others_even_with_fewer_pictures_than_ranks(make: Make) -> None:
    samples = make(cached=True)
    one = replace(samples, plan=TrainingPlan(samples.geometries[:1], 12, SEED))
    for rank in range(3):
        batches = list(training_batches(one, MicroBatches(0, 2, rank, 3, 4, 1), num_workers=0, pin_memory=False))
        assert [batch.indices for batch in batches] == [[0] * 4] * 2


def test_a_batch_keeps_its_fields_when_it_is_moved(make: Make) -> None:
    for cached in (True, False):
        samples = make(cached=cached)
        batch = collate([samples[position] for position in range(4)])
        moved = batch.to(torch.device("cpu"))
        assert _equal(batch, moved)
        assert all(len(getattr(batch, f.name)) == 4 for f in fields(Batch) if getattr(batch, f.name) is not None)
        meta = batch.to(torch.device("meta"))
        tensors = [value for value in vars(meta).values() if isinstance(value, Tensor)]
        assert len(tensors) == 5
        assert all(tensor.is_meta for tensor in tensors)


# --- what goes wrong ---


@pytest.mark.parametrize(("change", "workers"), [("gone", 0), ("gone", 1), ("another", 0)])
def test_a_picture_that_vanishes_or_changes_in_mid_run_is_named_in_one_line(
    make: Make, change: str, workers: int
) -> None:
    samples = make(cached=False)
    path = samples.examples[2].path
    if change == "gone":
        path.unlink()
    else:
        Image.new("RGB", (60, 60)).save(path)
    wanted = "cannot be opened: No such file" if change == "gone" else "has changed since it was checked"
    with pytest.raises(DataError, match=rf"^'.*2\.png': {wanted}") as caught:
        _read(samples, range(samples.plan.steps_per_epoch), (1, 4, 1), workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_is_damaged_in_mid_run_is_a_disk_error_in_one_line(make: Make, workers: int) -> None:
    samples = make(cached=True)
    path, _ = samples.cache._places[caption_key(None, "text")]
    data = bytearray(path.read_bytes())
    for place in range(len(data) - 100_000, len(data), 100):
        data[place] ^= 1
    path.unlink()  # and not written over: it may be open
    path.write_bytes(data)
    with pytest.raises(DiskError, match=r"^/.*safetensors: damaged since it was written") as caught:
        _read(samples, range(samples.plan.steps_per_epoch), (1, 4, 1), workers)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6


_SIGNALLED = """
import os, signal, sys
from pathlib import Path
import torch
from minisd.batches import TrainingSamples, training_batches
from minisd.buckets import square_geometry
from minisd.data import read_dataset, survey
from minisd.latent_cache import caption_key
from minisd.plan import MicroBatches, TrainingPlan
from minisd.tensor_cache import TensorCache

signal.signal(signal.SIGTERM, lambda *_: None)
examples = read_dataset(Path(sys.argv[1]))
surveys = survey(examples, quiet=True)
geometries = [square_geometry(found.size, 16) for found in surveys]
cache = TensorCache(Path(sys.argv[1]) / "cache")
cache.add(caption_key("x", "text"), torch.zeros(3, 4))
cache.flush()
samples = TrainingSamples(
    examples, surveys, geometries, TrainingPlan(geometries, 4, 0), cache,
    text_weights="text", vae_weights="", cache_latents=False, center_crop=True, random_flip=False, caption_dropout=0.0,
    noise_offset=0.0, seed=0, latent_channels=4, pixels_per_latent=8, num_train_timesteps=1000, is_xl=False,
)
micro_batches = MicroBatches(0, 20, 0, 1, 1, 4)
batches = training_batches(samples, micro_batches, num_workers=1, pin_memory=False)
next(batches)
if os.fork() == 0:  # another process, as torchrun is: what its own parent asks of it, a reader does
    os.killpg(os.getppid(), signal.SIGTERM)
    os._exit(0)
os.wait()
print(1 + sum(1 for _ in batches))
again = training_batches(samples, micro_batches, num_workers=1, pin_memory=False)
next(again)
keep = [again, sys.exc_info]
keep.append(keep)  # a cycle, as a traceback makes one: the reader is alive when the interpreter ends
"""


def test_readers_outlive_a_signal_to_the_group_and_end_with_their_parent(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", _SIGNALLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=90,
        start_new_session=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout.strip()) == (0, "80"), done.stderr
