"""One run, split over processes and micro-steps in any way: the same samples, the same noise, the same gradients."""

import json
from itertools import product

import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

from minisd.config import TrainConfig
from minisd.pocket import scenes
from tests.e2e.gradient_probe import probe
from tests.e2e.running import ALONE, config_for, metrics_of, options_of, torchrun

SPLITS = [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)]  # processes, micro-steps, micro-batch
KINDS = list(product((True, False), (True, False)))  # buckets, cached latents


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Nine captioned pictures of three shapes, one with two captions."""
    folder = tmp_path_factory.mktemp("shapes")
    for index, size in enumerate([(64, 64)] * 3 + [(90, 46)] * 5 + [(40, 80)]):
        scene = scenes.scene_at(index, 0)
        scenes.draw(scene, "8bit").resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        second = "\nanother caption" if index == 2 else ""
        (folder / f"{index}.txt").write_text(f"8bit {scenes.caption(scene)}{second}")
    return folder


def config_of(tiny_folder, shapes, folder, split, kind):
    _, accumulation, batch = split
    buckets, cached = kind
    name = f"{'x'.join(map(str, split))} {'buckets' if buckets else 'squares'} {'cached' if cached else 'encoded'}"
    return config_for(
        tiny_folder, shapes, folder / name, max_train_steps=5, gradient_accumulation_steps=accumulation,
        train_batch_size=batch, buckets=buckets, cache_latents=cached, noise_offset=0.05, snr_gamma=5.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_folder, shapes, tmp_path_factory):
    """(split, kind, rank) -> (gradients, drawn) of five steps."""
    folder = tmp_path_factory.mktemp("topologies")
    found = {}
    for processes in (1, 2, 4):
        configs = {
            (split, kind): config_of(tiny_folder, shapes, folder, split, kind)
            for split in SPLITS
            if split[0] == processes
            for kind in KINDS
        }
        if processes == 1:
            for (split, kind), config in configs.items():
                found[split, kind, 0] = probe(config, ALONE)
            continue
        files = {key: folder / f"probe-{number}-{processes}" for number, key in enumerate(configs)}
        listed = {str(files[key]): options_of(config) for key, config in configs.items()}
        (folder / "runs.json").write_text(json.dumps(listed))
        done = torchrun("tests/e2e/gradient_probe.py", str(folder / "runs.json"), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        for (split, kind), path in files.items():
            for rank in range(processes):
                with safetensors.safe_open(f"{path}.rank{rank}.safetensors", "pt") as file:
                    drawn = json.loads(file.metadata()["drawn"])
                gradients = safetensors.torch.load_file(f"{path}.rank{rank}.safetensors")
                found[split, kind, rank] = gradients, drawn
    return found


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=["buckets-cached", "buckets", "squares-cached", "squares"])
def test_every_split_is_the_same_run(runs, split, kind):
    """Samples, timesteps and noise exactly; every gradient of every step to 1e-6 of the step's largest."""
    reference, reference_drawn = runs[SPLITS[0], kind, 0]
    assert len(reference_drawn) == 5 * 4
    for rank in range(split[0]):
        gradients, drawn = runs[split, kind, rank]
        assert drawn == reference_drawn
        assert gradients.keys() == reference.keys()
        for step in range(5):
            keys = [key for key in reference if key.startswith(f"{step}/")]
            largest = max(reference[key].abs().max().item() for key in keys)
            assert largest > 0
            for key in keys:
                assert (gradients[key] - reference[key]).abs().max().item() <= 1e-6 * largest, key


def test_ranks_agree_to_the_bit(runs):
    for (split, kind, rank), (gradients, _) in runs.items():
        assert all(torch.equal(gradient, runs[split, kind, 0][0][key]) for key, gradient in gradients.items()), rank


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_cached_and_encoded_latents_are_the_same_bits(runs, split, buckets):
    cached, encoded = (runs[split, (buckets, cached), 0][0] for cached in (True, False))
    assert all(torch.equal(cached[key], encoded[key]) for key in cached)


def test_buckets_see_other_shapes_than_squares(runs):
    bucketed, squares = (runs[SPLITS[0], (buckets, True), 0] for buckets in (True, False))
    assert bucketed[1] != squares[1]
    assert any(not torch.equal(bucketed[0][key], squares[0][key]) for key in squares[0])


def test_a_global_batch_size_gives_the_accumulation(tiny_folder, shapes, tmp_path):
    """Two processes of micro-batches of one: six pictures a step are three micro-steps."""
    config = config_for(tiny_folder, shapes, tmp_path / "two", max_train_steps=2, global_batch_size=6)
    done = torchrun("train.py", *options_of(config), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["images_seen"] for line in metrics_of(config.output)] == [6, 12]
    alone = TrainConfig(**{**vars(config), "output": tmp_path / "one", "train_batch_size": 3})
    probe(alone, ALONE)
    for ours, theirs in zip(metrics_of(alone.output)[:1], metrics_of(config.output)[:1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)

    refused = TrainConfig(**{**vars(config), "output": tmp_path / "odd", "global_batch_size": 7})
    done = torchrun("train.py", *options_of(refused), processes=2)
    assert done.returncode == 1
    assert "make multiples of 2. Choose 6 or 8" in done.stderr
    assert json.loads((refused.output / "run_status.json").read_text())["code"] == 2
