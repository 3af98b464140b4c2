"""Checkpoints: whole or not at all, checked when read, and what is not ours is left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from minisd import checkpoint as ckpt
from minisd import optimizer as optimizer_state
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
    (tmp_path / f".tmp-step-000001-old-{dead.pid}").mkdir()
    (tmp_path / f".tmp-config.json-{dead.pid}").write_text("{")
    (tmp_path / f".tmp-step-000008-{os.getpid()}").mkdir()  # of an earlier process with our number
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / f".tmp-step-000008-{os.getppid()}").mkdir()  # of a process that lives
    ckpt.prune_checkpoints(tmp_path, keep=2)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [
        ".tmp-mine",
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
    with pytest.raises(DiskError, match=r"step-000002.*No space left.*free.*newest checkpoint is step-000001"):
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


def test_a_file_too_many_and_a_manifest_of_another_step_are_damage(tmp_path):
    first, second = (ckpt.save_checkpoint(tmp_path, step, FILES) for step in (1, 2))
    (second / "extra").write_bytes(b"")
    with pytest.raises(CheckpointError, match="extra: not part of the checkpoint"):
        ckpt.verify_checkpoint(second)
    (second / "extra").unlink()
    (second / "manifest.json").write_bytes((first / "manifest.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"manifest\.json: of step 1, expected 2"):
        ckpt.verify_checkpoint(second)
    assert ckpt.newest_checkpoint(tmp_path) == first
    second.rename(tmp_path / "a copy of mine")  # under a name that says no step
    assert ckpt.verify_checkpoint(tmp_path / "a copy of mine") == 1


def test_a_pipe_or_a_folder_for_a_file_does_not_hang(tmp_path):
    for make in (os.mkfifo, os.mkdir):
        path = ckpt.save_checkpoint(tmp_path, 1, FILES)
        (path / "state.json").unlink()
        make(path / "state.json")
        with pytest.raises(CheckpointError, match=r"state\.json: expected a file"):
            ckpt.verify_checkpoint(path)


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no such checkpoint"), ("file", "Not a directory"),
                                            ("", "not a checkpoint")])  # fmt: skip
def test_what_is_named_to_resume_from_and_is_none(tmp_path, name, said):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{said}.*Give a folder named step-NNNNNN"):
        ckpt.verify_checkpoint(tmp_path / name)


def test_pruning_takes_a_link_and_not_what_it_points_to(tmp_path):
    elsewhere = ckpt.save_checkpoint(tmp_path / "elsewhere", 1, FILES)
    folder = tmp_path / "checkpoints"
    for step in (2, 3):
        ckpt.save_checkpoint(folder, step, FILES)
    (folder / "step-000001").symlink_to(elsewhere)
    ckpt.prune_checkpoints(folder, keep=2)
    assert [p.name for p in ckpt.checkpoints_in(folder)] == ["step-000002", "step-000003"]
    assert ckpt.verify_checkpoint(elsewhere) == 1


@pytest.mark.parametrize("failing", ["rename", "rmdir"])
def test_what_cannot_be_pruned_is_a_warning(tmp_path, monkeypatch, caplog, failing):
    for step in (1, 2, 3):
        ckpt.save_checkpoint(tmp_path, step, FILES)

    def fail(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, failing, fail)
    ckpt.prune_checkpoints(tmp_path, keep=2)
    assert "Permission denied" in caplog.text
    monkeypatch.undo()
    ckpt.prune_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_the_mode_is_the_umask_s(tmp_path):
    before = os.umask(0o027)
    try:
        path = ckpt.save_checkpoint(tmp_path, 1, FILES)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}
    assert oct(path.stat().st_mode & 0o777) == "0o750"


def test_space_is_asked_for_in_the_folder_that_is_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=1000))
    ckpt.check_space(tmp_path / "not" / "yet", 1000)
    assert asked == [tmp_path]
    with pytest.raises(DiskError, match="1001 bytes are needed, 1000 are free"):
        ckpt.check_space(tmp_path / "not" / "yet", 1001)


def test_a_leftover_of_our_own_number_does_not_stop_a_save(tmp_path):
    """In a container every run has the same process id."""
    ckpt.save_checkpoint(tmp_path, 1, FILES)
    for name in ("step-000002", "step-000001-old"):
        (tmp_path / f".tmp-{name}-{os.getpid()}").mkdir()
        (tmp_path / f".tmp-{name}-{os.getpid()}" / "half").write_bytes(b"")
    for step in (1, 2):
        ckpt.save_checkpoint(tmp_path, step, FILES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-format-1" / "step-000002"


def test_a_checkpoint_of_format_1_loads_for_ever():
    """Made by tests/faults/toy.py, train(OUTPUT, steps=2, every=2). It stays; a new format gets one of its own."""
    assert ckpt.verify_checkpoint(FIXTURE) == 2
    weight = safetensors.torch.load((FIXTURE / "lora.safetensors").read_bytes())["weight"]
    parameters = [("weight", torch.nn.Parameter(weight))]
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    optimizer_state.load_optimizer(
        optimizer, parameters, safetensors.torch.load((FIXTURE / "optim.safetensors").read_bytes())
    )
    assert optimizer.state[parameters[0][1]]["step"] == 2
    assert json.loads((FIXTURE / "state.json").read_bytes())["step"] == 2


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
    saved = {k: v.clone() for k, v in optimizer_state.optimizer_tensors(optimizer, parameters).items()}
    values = [p.detach().clone() for _, p in parameters]
    steps(parameters, optimizer, 2)

    again, other = adam()
    for (_, p), value in zip(again, values, strict=True):
        p.data.copy_(value)
    optimizer_state.load_optimizer(other, again, saved)
    steps(again, other, 2)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(parameters, again, strict=True))


@pytest.mark.parametrize("item", ["exp_avg", "exp_avg_sq", "step"])
def test_each_item_of_adam_s_state_matters(item):
    """Mutants of the test above: it would not notice a forgotten item if one did not matter."""
    parameters, optimizer = adam()
    steps(parameters, optimizer, 3)
    saved = {k: v.clone() for k, v in optimizer_state.optimizer_tensors(optimizer, parameters).items()}
    saved[f"a/{item}"].zero_()
    again, other = adam()
    for (_, p), (_, q) in zip(again, parameters, strict=True):
        p.data.copy_(q)
    optimizer_state.load_optimizer(other, again, saved)
    steps(parameters, optimizer, 2)
    steps(again, other, 2)
    assert not torch.equal(parameters[0][1], again[0][1])


def test_optimizer_state_of_another_run_is_refused():
    parameters, optimizer = adam()
    steps(parameters, optimizer, 1)
    saved = dict(optimizer_state.optimizer_tensors(optimizer, parameters))
    for broken in (
        {k: v for k, v in saved.items() if k != "b/exp_avg"},
        saved | {"c/exp_avg": torch.zeros(1)},
        saved | {"a/exp_avg": torch.zeros(2, 3)},
    ):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            optimizer_state.load_optimizer(optimizer, parameters, broken)


def test_a_write_that_is_cut_short_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    path = ckpt.save_checkpoint(tmp_path, 1, FILES)
    assert (path / "lora.safetensors").read_bytes() == FILES["lora.safetensors"]


def test_atomic_write_reports_the_path(tmp_path):
    from minisd.atomic import write_atomically

    with pytest.raises(DiskError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a.txt", b"")
    (tmp_path / "a.txt").write_bytes(b"old")
    write_atomically(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
