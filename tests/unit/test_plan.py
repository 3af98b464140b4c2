"""Laws of the plan: every picture in every epoch, one bucket a step, whatever the numbers; and as documented."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
import torch

from minisd import draws
from minisd.buckets import Geometry, Size
from minisd.plan import MicroBatches, TrainingPlan, describe, positions_of

SIZES = [(64, 64), (32, 96), (96, 32), (48, 80), (80, 48)]


def _geometries(sizes: list[Size]) -> list[Geometry]:
    return [Geometry((size[0] + 6, size[1]), size) for size in sizes]


def _random_sets(count: int) -> list[tuple[list[Size], int, int]]:
    """The size of each picture, pictures a step, seed."""
    rng = random.Random(0)
    sets = []
    for _ in range(count):
        sizes = rng.sample(SIZES, rng.randint(1, 5))
        pictures = [rng.choice(sizes) for _ in range(rng.randint(1, 60))]
        sets.append((pictures, rng.randint(1, 9), rng.randrange(10)))
    return sets


# --- epochs ---


def test_every_epoch_has_every_picture_and_every_batch_one_bucket() -> None:
    for sizes, per_step, seed in _random_sets(300):
        plan = TrainingPlan(_geometries(sizes), per_step, seed)
        assert plan.steps_per_epoch == sum(-(-n // per_step) for n in Counter(sizes).values())
        for epoch in range(3):
            seen: Counter[int] = Counter()
            for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
                batch = plan.batch(step)
                assert len(batch) == per_step
                assert len({sizes[index] for index in batch}) == 1
                seen.update(batch)
            assert sorted(seen) == list(range(len(sizes)))  # none is left out
            # What comes again is the least that fills the last batch of each bucket, spread over it.
            assert seen.total() - len(sizes) == plan.repeats_per_epoch
            for size, members in Counter(sizes).items():
                times = [seen[index] for index in range(len(sizes)) if sizes[index] == size]
                assert sum(times) - members == -members % per_step
                assert max(times) - min(times) <= 1


def test_a_batch_holds_a_picture_twice_only_where_its_bucket_is_too_small() -> None:
    for sizes, per_step, seed in _random_sets(100):
        plan = TrainingPlan(_geometries(sizes), per_step, seed)
        for step in range(2 * plan.steps_per_epoch):
            batch = plan.batch(step)
            members = sizes.count(sizes[batch[0]])
            assert len(set(batch)) == min(per_step, members)


def test_the_plan_is_pure() -> None:
    for sizes, per_step, seed in _random_sets(30):
        plan = TrainingPlan(_geometries(sizes), per_step, seed)
        positions = list(range(4 * plan.steps_per_epoch * per_step))
        wanted = [plan.index(position) for position in positions]
        again = TrainingPlan(_geometries(sizes), per_step, seed)
        random.Random(1).shuffle(positions)
        assert all(again.index(position) == wanted[position] for position in positions[:200])
        assert [index for step in range(plan.steps_per_epoch) for index in plan.batch(step)] == wanted[
            : plan.steps_per_epoch * per_step
        ]


def test_epochs_differ_and_so_do_seeds() -> None:
    sizes = [SIZES[i % 3] for i in range(40)]
    plans = [TrainingPlan(_geometries(sizes), 4, seed) for seed in (0, 1)]
    steps = plans[0].steps_per_epoch
    orders = [
        tuple(index for step in range(epoch * steps, (epoch + 1) * steps) for index in plan.batch(step))
        for plan in plans
        for epoch in range(4)
    ]
    assert len(set(orders)) == 8


def test_steps_go_from_bucket_to_bucket() -> None:
    """Batches are shuffled over the buckets: no bucket keeps the start of the epoch, nor its own place."""
    sizes = [size for size in SIZES[:4] for _ in range(40)]
    plan = TrainingPlan(_geometries(sizes), 4, 0)
    firsts = set()
    for epoch in range(12):
        shown = [sizes[plan.batch(epoch * 40 + step)[0]] for step in range(40)]
        assert sum(a != b for a, b in pairwise(shown)) > 18  # 30 on average, 3 if bucket came after bucket
        firsts.add(shown[0])
    assert len(firsts) >= 3


def test_fewer_pictures_than_a_step() -> None:
    plan = TrainingPlan(_geometries([(64, 64), (32, 96)]), 7, 3)
    assert plan.steps_per_epoch == 2
    assert plan.repeats_per_epoch == 12
    assert sorted(plan.batch(0) + plan.batch(1)) == [0] * 7 + [1] * 7
    three = TrainingPlan(_geometries([(64, 64)] * 3), 7, 3)
    assert sorted(Counter(three.batch(5)).values()) == [2, 2, 3]


# --- positions ---


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_split_of_a_step_covers_the_same_positions(world_size: int, accumulation: int, batch: int) -> None:
    size = world_size * accumulation * batch
    for step in (0, 1, 17):
        parts = [
            positions_of(step, rank, world_size, batch, accumulation, micro_step)
            for micro_step in range(accumulation)
            for rank in range(world_size)
        ]
        assert all(len(part) == batch for part in parts)
        # In the order of the docstring: the first blocks are micro-step 0 of rank 0, 1 ...
        assert [p for part in parts for p in part] == list(range(step * size, (step + 1) * size))


def test_micro_batches_of_a_rank() -> None:
    later = MicroBatches(3, 5, rank=1, world_size=2, train_batch_size=2, accumulation_steps=2)
    assert list(later) == [[26, 27], [30, 31], [34, 35], [38, 39]]
    assert list(later) == list(later)
    assert len(later) == 4
    whole = MicroBatches(0, 5, rank=1, world_size=2, train_batch_size=2, accumulation_steps=2)
    assert list(whole)[6:] == list(later)
    for start in (5, 6):
        nothing = MicroBatches(start, 5, 0, 1, 1, 1)
        assert len(nothing) == len(list(nothing)) == 0


def test_every_rank_has_as_many_micro_batches_as_the_others() -> None:
    for world_size in (1, 2, 3):
        ranks = [MicroBatches(2, 6, rank, world_size, 2, 3) for rank in range(world_size)]
        assert {len(list(rank)) for rank in ranks} == {len(rank) for rank in ranks} == {12}


# --- in words ---


def test_the_description_has_every_number_that_a_user_checks() -> None:
    # 10 of one shape, 3 of another: 3 + 1 steps of 4, of which 2 + 1 samples are repeats.
    geometries = [Geometry((64, 80), (64, 64))] * 10 + [Geometry((32, 96), (32, 96))] * 3
    plan = TrainingPlan(geometries, 4, 0)
    text = describe(plan, geometries, 10)
    assert all(line.strip() for line in text.splitlines())
    assert "13 images" in text
    assert "4 a step" in text
    assert "4 steps an epoch" in text
    assert "10 steps in all (2.5 epochs)" in text
    assert "64 x 64 (10), 96 x 32 (3)" in text  # width x height
    assert f"{10 * 0.2 / 13:.1%} of a picture on average, 20.0% at most" in text
    assert re.search(r"batch.*\b3\b|\b3\b.*batch", text)
    even = TrainingPlan([geometries[0]] * 8, 4, 0)
    assert "last batch" not in describe(even, [geometries[0]] * 8, 10)


def test_the_description_of_many_buckets_is_short() -> None:
    geometries = [Geometry((8 * i, 64), (8 * i, 64)) for i in range(1, 41)]
    text = describe(TrainingPlan(geometries, 2, 0), geometries, 10)
    assert "and 28 more" in text
    assert max(len(line) for line in text.splitlines()) < 300


# --- as documented ---


class _FromTheText:
    """The plan and the draws, written from the docstrings of plan.py and draws.py with hashlib and torch alone."""

    def __init__(self, sizes: list[Size], per_step: int, seed: int) -> None:
        self.sizes, self.per_step, self.seed = sizes, per_step, seed

    def generator(self, purpose: str, position: int) -> torch.Generator:
        digest = hashlib.sha256(f"minisd/1/{purpose}/{self.seed}/{position}".encode("ascii")).digest()
        key = int.from_bytes(digest[:8], byteorder="big") // 2
        generator = torch.Generator()
        generator.manual_seed(key)
        return generator

    def epoch(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(len(self.sizes), generator=self.generator("epoch", epoch)).tolist()
        batches = []
        for size in sorted(set(self.sizes)):
            bucket = [index for index in order if self.sizes[index] == size]
            place = 0
            while len(bucket) % self.per_step:
                bucket.append(bucket[place])
                place += 1
            batches += [bucket[i : i + self.per_step] for i in range(0, len(bucket), self.per_step)]
        places = torch.randperm(len(batches), generator=self.generator("batches", epoch)).tolist()
        return [batches[place] for place in places]

    def index(self, position: int) -> int:
        step, place = position // self.per_step, position % self.per_step
        batches = len(self.epoch(0))
        return self.epoch(step // batches)[step % batches][place]


def test_a_reimplementation_from_the_docstrings_sees_the_same_samples() -> None:
    for sizes, per_step, seed in _random_sets(25):
        plan, text = TrainingPlan(_geometries(sizes), per_step, seed), _FromTheText(sizes, per_step, seed)
        for position in random.Random(seed).sample(range(5 * plan.steps_per_epoch * per_step), 5):
            assert plan.index(position) == text.index(position)

            def drawn(purpose: str, text: _FromTheText = text, position: int = position) -> torch.Generator:
                return text.generator(purpose, position)

            shape = (4, 8, 8)
            assert torch.equal(draws.noise(seed, position, shape), torch.randn(shape, generator=drawn("noise")))
            posterior = torch.randn(shape, generator=drawn("posterior"))
            assert torch.equal(draws.posterior_noise(seed, position, shape), posterior)
            offset = torch.randn((4, 1, 1), generator=drawn("offset"))
            assert torch.equal(draws.noise_offset(seed, position, 4), offset)
            assert draws.timestep(seed, position, 1000) == torch.randint(1000, (), generator=drawn("timestep"))
            assert draws.caption_choice(seed, position, 3) == torch.randint(3, (), generator=drawn("choice"))
            uniform = torch.rand(1, generator=drawn("flip"), dtype=torch.float64)
            assert draws.flip(seed, position) == (uniform.item() < 0.5)
            assert draws.crop(seed, position) == tuple(torch.rand(2, generator=drawn("crop"), dtype=torch.float64))
            dropped = torch.rand(1, generator=drawn("caption"), dtype=torch.float64)
            assert draws.caption_dropout(seed, position) == dropped.item()
            assert draws.dropout_seed(seed, position) == drawn("dropout").initial_seed()
