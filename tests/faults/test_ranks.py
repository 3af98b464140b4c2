"""Two processes, one of which is killed at a random moment, started again until the run is done: the same files."""

import os
import random
import shutil
import signal
from dataclasses import replace

import pytest

from minisd.checkpoint import newest_checkpoint
from tests.e2e.running import config_for, metrics_of, state_of
from tests.e2e.test_signals import Launch
from tests.faults.harness import SOAK

STEPS = 24
TRIALS = {"": 2, "nightly": 60, "release": 300}[SOAK]
# A run that is killed again and again: recovery is always by a new torchrun.
RELAUNCHES = {"": 1, "nightly": 20, "release": 20}[SOAK]


@pytest.fixture(scope="module")
def whole(tiny_folder, dataset, tmp_path_factory):
    """The run that nobody kills."""
    config = config_for(
        tiny_folder, dataset, tmp_path_factory.mktemp("ranks") / "whole", max_train_steps=STEPS,
        checkpointing_steps=3, gradient_accumulation_steps=1, lora_dropout=0.1,
    )  # fmt: skip
    launch = Launch(config, processes=2)
    assert launch.wait(120) == 0, launch.said
    return config


def killed_at_random(config, rng):
    """Start the run and kill one of its ranks some steps later; its torchrun ends the other one."""
    launch = Launch(config, processes=2)
    at = newest_checkpoint(config.output / "checkpoints")
    done = 0 if at is None else int(at.name.removeprefix("step-"))
    launch.wait_for_steps(done + 1 + rng.randrange(STEPS - done - 1) if done < STEPS - 1 else done)
    ranks = launch.ranks()
    if len(ranks) == 2:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    launch.wait(60)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_random_rank_is_killed_and_the_files_are_the_same(whole, tmp_path, trial):
    rng = random.Random(trial)
    config = replace(whole, output=tmp_path / "run", cache_dir=whole.cache_folder)
    for _ in range(RELAUNCHES):
        killed_at_random(config, rng)
    last = Launch(config, processes=2)
    assert last.wait(120) == 0, last.said
    assert last.status["state"] == "done"
    assert state_of(config.output, STEPS) == state_of(whole.output, STEPS)
    assert metrics_of(config.output) == metrics_of(whole.output)
    shutil.rmtree(config.output)
