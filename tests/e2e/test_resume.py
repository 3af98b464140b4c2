"""A run that was stopped ends with the same bits as one that was not."""

import shutil

import pytest
import torch

import train
from minisd import checkpoint, run_state
from minisd.checkpoint import newest_checkpoint
from minisd.config import TrainConfig
from minisd.errors import CheckpointError, UsageError
from minisd.lora_reader import load_lora
from minisd.plan import MicroBatches
from minisd.weights import load_unet
from tests.e2e.running import ALONE, config_for, metrics_of, options_of, state_of, torchrun

STEPS = 6


class KilledError(BaseException):
    """As by kill -9: nothing is closed or cleaned up."""


def run_until(config, step, monkeypatch):
    """Run until a checkpoint of `step` is written, then die in the middle of the next line of metrics.jsonl."""
    original = train.save

    def save_then_die(config, dist, run):
        path = original(config, dist, run)
        if run.state.progress.step == step:
            with (config.output / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "loss": 99.0')
            raise KilledError
        return path

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_then_die)
        with pytest.raises(KilledError):
            train.train(config, ALONE)
    assert newest_checkpoint(config.output / "checkpoints").name == f"step-{step:06d}"


@pytest.fixture(scope="module")
def whole(tiny_folder, dataset, tmp_path_factory):
    """Uninterrupted runs of six steps, over the edge of an epoch, by accumulation: adapter dropout, flips and all."""
    runs = {}
    for accumulation in (1, 2, 4):
        config = config_for(
            tiny_folder, dataset, tmp_path_factory.mktemp("whole"), lora_dropout=0.1, max_train_steps=STEPS,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        train.train(config, ALONE)
        runs[accumulation] = config
    return runs


def again(config, output, **options):
    """The same run in another folder, with a checkpoint after each step, and the latents that are there already."""
    return TrainConfig(
        **{**vars(config), "output": output, "checkpointing_steps": 1, "cache_dir": config.cache_folder, **options}
    )


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopped_anywhere_it_ends_with_the_same_bits(whole, tmp_path, monkeypatch, stop, accumulation):
    config = again(whole[accumulation], tmp_path)
    run_until(config, stop, monkeypatch)
    train.train(config, ALONE)
    assert state_of(tmp_path, STEPS) == state_of(whole[accumulation].output, STEPS)
    assert metrics_of(tmp_path) == metrics_of(whole[accumulation].output)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stopped_four_times_and_read_by_workers(whole, tmp_path, monkeypatch, workers):
    """kohya's second resume starts to count anew; torchtitan's went back to the first."""
    config = again(whole[1], tmp_path, dataloader_num_workers=workers)
    for stop in (1, 2, 4, 5):
        run_until(config, stop, monkeypatch)
    train.train(config, ALONE)
    assert state_of(tmp_path, STEPS) == state_of(whole[1].output, STEPS)
    assert metrics_of(tmp_path) == metrics_of(whole[1].output)


def forget(item):
    """Restore the optimizer without one of its items."""

    def load(optimizer, parameters, tensors):
        original(optimizer, parameters, tensors)
        for state in optimizer.state.values():
            state[item].zero_()

    original = run_state.load_optimizer
    return lambda patch: patch.setattr(run_state, "load_optimizer", load)


def forget_weights(patch):
    patch.setattr(torch.Tensor, "copy_", lambda self, other, **_: self)


def forget_position(patch):
    patch.setattr(MicroBatches, "__iter__", lambda self, original=MicroBatches.__iter__: original(
        MicroBatches(0, self.max_steps, self.rank, self.world_size, self.train_batch_size, self.accumulation_steps)
    ))  # fmt: skip


def forget_progress(patch):
    original = run_state.restore_run

    def restore(checkpoint, state, allow_change):
        original(checkpoint, state, allow_change)
        state.progress.step = 0

    patch.setattr(run_state, "restore_run", restore)


def forget_skipped(patch):
    """The learning rate stands still at a skipped step, so the count of them is a part of where the run stands."""
    original = run_state.restore_run

    def restore(checkpoint, state, allow_change):
        original(checkpoint, state, allow_change)
        state.progress.skipped_steps += 1

    patch.setattr(run_state, "restore_run", restore)


def other_randomness(what):
    from minisd import draws

    original = getattr(draws, what)

    def shifted(seed, *arguments):
        return original(seed + 1, *arguments)

    return lambda patch: patch.setattr(draws, what, shifted)


def keep_metrics(patch):
    patch.setattr(run_state, "rewind_metrics", lambda path, step: None)


MUTANTS = {
    "exp_avg": forget("exp_avg"),
    "exp_avg_sq": forget("exp_avg_sq"),
    "step count of Adam": forget("step"),
    "weights": forget_weights,
    "position in the data": forget_position,
    "step": forget_progress,
    "skipped steps": forget_skipped,
    "noise": other_randomness("noise"),
    "timesteps": other_randomness("timestep"),
    "order of the epoch": other_randomness("permutation"),
    "dropout masks": other_randomness("dropout_seed"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_part_of_the_state_matters(whole, tmp_path, monkeypatch, mutant):
    """The test above would see it if any of them were lost."""
    config = again(whole[1], tmp_path)
    run_until(config, 3, monkeypatch)
    with monkeypatch.context() as patch:
        MUTANTS[mutant](patch)
        train.train(config, ALONE)
    assert state_of(tmp_path, STEPS) != state_of(whole[1].output, STEPS)


def test_a_lost_loss_scale_is_seen(tiny_folder, dataset, tmp_path, monkeypatch):
    """float16's scale is found in the first steps, and belongs to the state."""
    config = config_for(tiny_folder, dataset, tmp_path, mixed_precision="fp16", max_train_steps=4)
    config = again(config, tmp_path)
    run_until(config, 2, monkeypatch)
    path = tmp_path / "checkpoints" / "step-000002" / "state.json"
    assert '"scale": 65536.0' in path.read_text()
    seen = []
    original = torch.amp.GradScaler.load_state_dict
    monkeypatch.setattr(
        torch.amp.GradScaler, "load_state_dict", lambda self, state: (seen.append(state), original(self, state))
    )
    train.train(config, ALONE)
    assert seen[0]["scale"] == 65536.0


def test_a_complete_run_is_left_untouched(whole):
    config = whole[2]
    before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*") if path.is_file()}
    train.train(config, ALONE)
    assert {path: path.stat().st_mtime_ns for path in config.output.rglob("*") if path.is_file()} == before


def test_a_run_of_two_processes_resumes_bit_for_bit_and_on_one_process(tiny_folder, dataset, tmp_path):
    """torchrun, killed at the last step and started again; then the same run goes on with another split."""
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    through = config_for(tiny_folder, dataset, tmp_path / "through", **options)
    assert torchrun("train.py", *options_of(through), processes=2).returncode == 0

    halted = config_for(tiny_folder, dataset, tmp_path / "halted", **options)
    shutil.copytree(through.output, halted.output)
    for leftover in ("checkpoints/step-000004/manifest.json", "lora.safetensors"):
        (halted.output / leftover).unlink()  # as if killed while the last checkpoint was written
    (halted.output / "checkpoints/step-000004").rename(halted.output / "checkpoints/.tmp-step-000004-999999999")
    assert torchrun("train.py", *options_of(halted), processes=2).returncode == 0
    assert state_of(halted.output, 4) == state_of(through.output, 4)
    assert metrics_of(halted.output) == metrics_of(through.output)

    alone = TrainConfig(**{**vars(through), "output": tmp_path / "alone", "gradient_accumulation_steps": 1,
                           "train_batch_size": 4})  # fmt: skip
    shutil.copytree(through.output / "checkpoints" / "step-000002", alone.output / "checkpoints" / "step-000002")
    train.train(alone, ALONE)
    for ours, theirs in zip(metrics_of(alone.output), metrics_of(through.output)[2:], strict=True):
        assert (ours["images_seen"], ours["lr"]) == (theirs["images_seen"], theirs["lr"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_another_run_s_checkpoint_is_refused_naming_the_difference_and_the_options(whole):
    config = whole[2]
    for name, value in {"rank": 8, "learning_rate": 2e-3, "seed": 1, "mixed_precision": "bf16"}.items():
        with pytest.raises(UsageError, match=rf"{name} was .*, now '?{value}.*--allow-change {name}"):
            train.train(TrainConfig(**{**vars(config), name: value}), ALONE)
    with pytest.raises(UsageError, match="images_per_step was 2, now 4"):
        train.train(TrainConfig(**{**vars(config), "train_batch_size": 2}), ALONE)
    with pytest.raises(UsageError, match="--allow-change colour: expected one of"):
        train.train(TrainConfig(**{**vars(config), "allow_change": ("colour",)}), ALONE)


def test_another_dataset_or_base_model_is_refused(whole, dataset, tiny_folder, tmp_path):
    config = whole[1]
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes((dataset / "train" / "4.png").read_bytes())
    with pytest.raises(UsageError, match="dataset was"):
        train.train(TrainConfig(**{**vars(config), "data": tmp_path / "data"}), ALONE)

    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match="model_unet was"):
        train.train(TrainConfig(**{**vars(config), "model": str(tmp_path / "model")}), ALONE)


def test_a_default_that_is_spelt_out_is_no_change(whole, tmp_path, monkeypatch):
    config = again(whole[1], tmp_path)
    run_until(config, 3, monkeypatch)
    train.train(again(whole[1], tmp_path, resolution=64, train_batch_size=1), ALONE)
    assert state_of(tmp_path, STEPS)[1] == state_of(whole[1].output, STEPS)[1]  # Adam's; the header names the option


def test_a_change_that_is_allowed_is_made(whole, tmp_path, monkeypatch, caplog):
    config = again(whole[1], tmp_path)
    run_until(config, 3, monkeypatch)
    changed = TrainConfig(**{**vars(config), "learning_rate": 5e-4, "allow_change": ("learning_rate",)})
    train.train(changed, ALONE)
    assert "learning_rate was 0.001, now 0.0005" in caplog.text
    lines, before = metrics_of(tmp_path), metrics_of(whole[1].output)
    assert lines[:3] == before[:3]
    assert lines[3]["lr"] == pytest.approx(before[3]["lr"] / 2)


def test_a_damaged_checkpoint_is_passed_over_and_named_it_is_an_error(whole, tmp_path, monkeypatch, caplog):
    config = again(whole[1], tmp_path)
    run_until(config, 4, monkeypatch)
    newest = tmp_path / "checkpoints" / "step-000004"
    data = bytearray((newest / "optim.safetensors").read_bytes())
    data[-5] ^= 16
    (newest / "optim.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optim\.safetensors"):
        train.train(TrainConfig(**{**vars(config), "resume_from_checkpoint": str(newest)}), ALONE)
    train.train(config, ALONE)
    assert "passing over a damaged checkpoint" in caplog.text
    assert state_of(tmp_path, STEPS) == state_of(whole[1].output, STEPS)

    for path in (tmp_path / "checkpoints").iterdir():
        (path / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="none of"):
        train.train(config, ALONE)


def test_starting_from_a_lora_is_not_resuming(whole, tmp_path, tiny_folder, caplog):
    trained = whole[1].output / "lora.safetensors"
    config = again(whole[1], tmp_path, init_lora=trained, max_train_steps=1, learning_rate=1e-9)
    with caplog.at_level("INFO"):
        train.train(config, ALONE)
    assert "with a fresh optimizer; this is not a resumed run" in caplog.text
    assert metrics_of(tmp_path)[0]["step"] == 1
    unet = load_unet(tiny_folder)
    before, after = (load_lora(path, {"unet": unet}).parts["unet"] for path in (trained, tmp_path / "lora.safetensors"))
    for path, lora in after.items():
        assert torch.allclose(lora.up, before[path].up, atol=1e-7)
    with pytest.raises(UsageError, match="Give the same --rank, --alpha and --lora-targets"):
        train.train(again(whole[1], tmp_path / "other", init_lora=trained, rank=2), ALONE)


def test_the_checkpoint_is_a_lora_and_nothing_is_pickled(whole):
    folder = whole[1].output / "checkpoints" / f"step-{STEPS:06d}"
    assert checkpoint.verify_checkpoint(folder) == STEPS
    assert sorted(path.name for path in folder.iterdir()) == [
        "lora.safetensors", "manifest.json", "optim.safetensors", "state.json",
    ]  # fmt: skip
