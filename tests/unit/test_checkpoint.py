"""Checkpoints: whole or not at all, checked when read, and what is not ours is left alone."""

import json
import os
import subprocess
import sys

import pytest
import torch

from minisd import checkpoint as ckpt
from minisd.errors import CheckpointError, DiskError

FILES = {"lora.safetensors": b"x" * 1000, "state.json": b"{}"}


def test_round_trip_and_order(tmp_path):
    for step in (9, 10, 1_000_000):
        assert ckpt.verify_checkpoint(ckpt.save_checkpoint(tmp_path, step, FILES)) == step
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step-000009", "step-000010", "step-1000000"]
    assert ckpt.newest_checkpoint(tmp_path).name == "step-1000000"
    assert (tmp_path / "step-000010" / "lora.safetensors").read_bytes() == FILES["lora.safetensors"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_every_flipped_bit_and_truncation_is_noticed(tmp_path):
    path = ckpt.save_checkpoint(tmp_path, 1, FILES)
    file = path / "lora.safetensors"
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        at, bit = int(torch.randint(1000, (), generator=generator)), int(torch.randint(8, (), generator=generator))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
            ckpt.verify_checkpoint(path)
    for length in range(0, 1000, 50):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"got {length} bytes"):
            ckpt.verify_checkpoint(path)
    file.write_bytes(whole)
    assert ckpt.verify_checkpoint(path) == 1


def test_a_damaged_newest_falls_back_and_none_sound_is_an_error(tmp_path, caplog):
    ckpt.save_checkpoint(tmp_path, 1, FILES)
    ckpt.save_checkpoint(tmp_path, 2, FILES)
    (tmp_path / "step-000002" / "state.json").unlink()
    assert ckpt.newest_checkpoint(tmp_path).name == "step-000001"
    assert "state.json" in caplog.text
    (tmp_path / "step-000001" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        ckpt.newest_checkpoint(tmp_path)
    assert ckpt.newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("manifest", ['{"format": 2, "step": 1, "files": {}}', "[]", "null", '{"format": 1}'])
def test_odd_manifests_are_refused(tmp_path, manifest):
    path = ckpt.save_checkpoint(tmp_path, 1, FILES)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError):
        ckpt.verify_checkpoint(path)


def test_pruning_keeps_the_newest_sound_ones_and_everything_that_is_not_ours(tmp_path):
    for step in range(1, 6):
        ckpt.save_checkpoint(tmp_path, step, FILES)
    (tmp_path / "step-000005" / "state.json").write_bytes(b"[]")  # damaged: does not count
    (tmp_path / "step-best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".tmp-step-000007-{dead.pid}").mkdir()
    (tmp_path / f".tmp-step-000008-{os.getppid()}").mkdir()  # of a process that lives
    ckpt.prune_checkpoints(tmp_path, keep=2)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [
        f".tmp-step-000008-{os.getppid()}",
        "notes.txt",
        "step-000003",
        "step-000004",
        "step-000005",
        "step-best",
    ]


@pytest.mark.parametrize("failing", ["write_synced", "sync_folder", "verify_checkpoint"])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, failing):
    ckpt.save_checkpoint(tmp_path, 1, FILES)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        ckpt.save_checkpoint(tmp_path, 2, FILES)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert ckpt.newest_checkpoint(tmp_path).name == "step-000001"


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path):
    path = ckpt.save_checkpoint(tmp_path, 1, FILES)
    (path / "state.json").write_bytes(b"damaged")
    assert ckpt.verify_checkpoint(ckpt.save_checkpoint(tmp_path, 1, FILES)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    order = []
    original = ckpt.write_synced
    monkeypatch.setattr(ckpt, "write_synced", lambda path, data: (order.append(path.name), original(path, data)))
    ckpt.save_checkpoint(tmp_path, 1, FILES)
    assert order == [*FILES, "manifest.json"]
    manifest = json.loads((tmp_path / "step-000001" / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES)


def adam(seed=0):
    torch.manual_seed(seed)
    parameters = [("a", torch.nn.Parameter(torch.randn(3, 2))), ("b", torch.nn.Parameter(torch.randn(4)))]
    return parameters, torch.optim.AdamW([p for _, p in parameters], lr=1e-2)


def steps(parameters, optimizer, count):
    for k in range(count):
        for _, p in parameters:
            p.grad = torch.full_like(p, 0.1 + k)
        optimizer.step()


def test_adam_goes_on_as_if_never_stopped():
    parameters, optimizer = adam()
    steps(parameters, optimizer, 3)
    saved = {k: v.clone() for k, v in ckpt.optimizer_tensors(optimizer, parameters).items()}
    values = [p.detach().clone() for _, p in parameters]
    steps(parameters, optimizer, 2)

    again, other = adam()
    for (_, p), value in zip(again, values, strict=True):
        p.data.copy_(value)
    ckpt.load_optimizer(other, again, saved)
    steps(again, other, 2)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(parameters, again, strict=True))


@pytest.mark.parametrize("item", ["exp_avg", "exp_avg_sq", "step"])
def test_each_item_of_adam_s_state_matters(item):
    """Mutants of the test above: it would not notice a forgotten item if one did not matter."""
    parameters, optimizer = adam()
    steps(parameters, optimizer, 3)
    saved = {k: v.clone() for k, v in ckpt.optimizer_tensors(optimizer, parameters).items()}
    saved[f"a/{item}"].zero_()
    again, other = adam()
    for (_, p), (_, q) in zip(again, parameters, strict=True):
        p.data.copy_(q)
    ckpt.load_optimizer(other, again, saved)
    steps(parameters, optimizer, 2)
    steps(again, other, 2)
    assert not torch.equal(parameters[0][1], again[0][1])


def test_optimizer_state_of_another_run_is_refused():
    parameters, optimizer = adam()
    steps(parameters, optimizer, 1)
    saved = dict(ckpt.optimizer_tensors(optimizer, parameters))
    for broken in (
        {k: v for k, v in saved.items() if k != "b/exp_avg"},
        saved | {"c/exp_avg": torch.zeros(1)},
        saved | {"a/exp_avg": torch.zeros(2, 3)},
    ):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            ckpt.load_optimizer(optimizer, parameters, broken)


def test_atomic_write_reports_the_path(tmp_path):
    from minisd.atomic import write_atomically

    with pytest.raises(DiskError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a.txt", b"")
    (tmp_path / "a.txt").write_bytes(b"old")
    write_atomically(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
