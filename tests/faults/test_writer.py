"""Whatever ends a save in the middle, the newest checkpoint or the one before it loads, and nothing torn does."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisd import checkpoint
from minisd.checkpoint import newest_checkpoint, prune_checkpoints, save_checkpoint, verify_checkpoint
from minisd.errors import CheckpointError, DiskError
from tests.faults import power
from tests.faults.harness import (
    CAREFUL,
    KILLED,
    NAIVE,
    POWER,
    SOAK,
    content,
    loaded_step,
    violations,
    with_fault,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("keep", POWER["keep"])
def test_every_operation_of_a_save_may_be_the_last_or_fail(disk, keep):
    assert violations(CAREFUL, disk / "careful", keep) == []


def test_the_harness_fails_a_writer_without_staging_and_hashes(disk):
    found = violations(NAIVE, disk / "naive", 2)
    assert any("kill" in line and "torn" in line for line in found)
    assert any("ENOSPC" in line for line in found)
    assert any("EIO" in line for line in found)


def test_a_step_saved_again_over_a_damaged_one(disk):
    """It is swapped, in two operations, so that the moment without either is one in which the older one loads."""
    at, code = 0, KILLED
    while code == KILLED:
        at += 1
        shutil.rmtree(disk)
        for step in (1, 2):
            save_checkpoint(disk, step, content(step))
        (disk / "step-000002" / "state.json").write_bytes(b"damaged")
        code = with_fault(lambda: save_checkpoint(disk, 2, content(2)), at, "kill")
        assert loaded_step(CAREFUL, disk) in (1, 2)
    assert code == 0
    assert at > 20
    assert loaded_step(CAREFUL, disk) == 2


def test_changed_bits_and_lengths_are_noticed(disk):
    path = save_checkpoint(disk, 1, content(1))
    whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
    generator = random.Random(0)
    for trial in range(POWER["changes"]):
        file, data = generator.choice(list(whole.items()))
        at = generator.randrange(len(data))
        changed = {
            0: data[:at],
            1: data + data[at:],
            2: data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :],
        }[min(trial % 4, 2)]
        file.write_bytes(changed)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)
        file.write_bytes(data)
    assert verify_checkpoint(path) == 1


def found_by_random_kills(disk: Path, name: str, kills: int) -> list[str]:
    """What goes wrong in that many kills, in an interpreter that no other test has used: its forks must be quick."""
    words = [sys.executable, "-m", "tests.faults.kills", str(disk), name, str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_kills_at_random_moments_change_nothing(disk):
    assert found_by_random_kills(disk, "careful", POWER["kills"]) == []


def test_kills_at_random_moments_end_the_run_of_a_naive_writer(disk):
    assert found_by_random_kills(disk, "naive", POWER["naive_kills"])


def lost_by_power_cuts(root: Path, count: int) -> list[str]:
    """Save and prune five times and cut the power at `count` random moments; returns what was lost."""
    log: list[power.Operation] = []
    durable = [(0, 0)]  # after so many operations this step has been reported as saved
    (root / "run").mkdir()
    for step in range(1, 6):

        def save(step: int = step) -> None:
            save_checkpoint(root / "run" / "checkpoints", step, content(step))

        power.record(root / "run", save, log)
        durable.append((len(log), step))
        power.record(root / "run", lambda: prune_checkpoints(root / "run" / "checkpoints", 2), log)
    generator = random.Random(0)
    found = []
    for number in range(count):
        at = generator.randint(0, len(log))
        power.after_power_cut(log[:at], root / "left", generator)
        step = loaded_step(CAREFUL, root / "left" / "checkpoints")
        promised = max(step for operations, step in durable if operations <= at)
        if not (step == "no checkpoint" and promised == 0) and not (isinstance(step, int) and step >= promised):
            found.append(f"cut {number} after {at} of {len(log)}: loads {step}, {promised} was saved")
        shutil.rmtree(root / "left")
    return found


def test_power_cuts_lose_nothing_that_was_saved(disk):
    assert lost_by_power_cuts(disk, POWER["power_cuts"]) == []


@pytest.mark.parametrize("careless", ["a folder's names", "the parent's name", "a file's content"])
def test_power_cuts_find_each_fsync_that_is_left_out(disk, monkeypatch, careless):
    sync_file, sync_folder = checkpoint.write_synced, checkpoint.sync_folder
    if careless == "a file's content":
        monkeypatch.setattr(checkpoint, "write_synced", lambda path, data: without_fsync(sync_file, path, data))
    else:
        staged = careless == "a folder's names"
        skip = lambda folder: folder.name.startswith(".tmp-") == staged  # noqa: E731
        monkeypatch.setattr(checkpoint, "sync_folder", lambda folder: None if skip(folder) else sync_folder(folder))
    assert lost_by_power_cuts(disk, 300)


def without_fsync(write, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        write(*arguments)


# A file system of 300 KB: one checkpoint is 90 KB, and the fourth does not fit.
FULL = """
import os, sys
from pathlib import Path
from minisd.checkpoint import newest_checkpoint, prune_checkpoints, save_checkpoint
from minisd.errors import DiskError
folder = Path(sys.argv[1])
files = {"lora.safetensors": os.urandom(30_000), "optim.safetensors": os.urandom(60_000)}
for step in (1, 2):
    save_checkpoint(folder, step, files)
(folder.parent / "filler").write_bytes(bytes(60_000))
try:
    save_checkpoint(folder, 3, files)
except DiskError as error:
    print(error)
assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
assert newest_checkpoint(folder).name == "step-000002"
(folder.parent / "filler").unlink()
save_checkpoint(folder, 3, files)
prune_checkpoints(folder, 2)
assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
"""


def test_a_disk_that_is_really_full(tmp_path):
    mount = f'mount -t tmpfs -o size=300k full "{tmp_path}"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a file system of his own")
    command = f'{mount} && exec "{sys.executable}" -c "$0" "{tmp_path}/run/checkpoints"'
    run = subprocess.run(["unshare", "-rm", "sh", "-c", command, FULL], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "No space left on device" in run.stdout
    assert "the newest checkpoint is step-000002" in run.stdout


TRACED = """
import os, sys
from pathlib import Path
from minisd.errors import MinisdError
from minisd.checkpoint import save_checkpoint
from tests.faults.harness import content
try:
    save_checkpoint(Path(sys.argv[1]), 2, content(2))
except MinisdError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(not SOAK, reason="only with MINISD_SOAK: it costs a torch import a case, under strace")
@pytest.mark.parametrize(
    ("fault", "code", "step"),
    [
        ("rename:signal=SIGKILL", -9, 1),
        ("fsync:error=EIO:when=2", 6, 1),
        ("fsync:error=ENOSPC:when=3", 6, 1),
        ("rename:error=EXDEV", 6, 1),
        ("rename:error=EROFS", 6, 1),
        ("fsync:error=EIO:when=6", 6, 2),  # the folder's: the new one is there, though not for certain
    ],
)
def test_the_same_from_outside(tmp_path, fault, code, step):
    """A cross-check of the faults above: strace puts them into the system calls."""
    save_checkpoint(tmp_path, 1, content(1))
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={fault}", sys.executable, "-B", "-c", TRACED]
    run = subprocess.run([*trace, str(tmp_path)], cwd=ROOT)
    assert run.returncode == code
    assert loaded_step(CAREFUL, tmp_path) == step


def test_errors_of_the_disk_are_disk_errors(tmp_path):
    save_checkpoint(tmp_path, 1, content(1))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError):
        save_checkpoint(tmp_path / "file", 2, content(2))
    with pytest.raises(DiskError):
        save_checkpoint(tmp_path, 2, {"n" * 300: b""})
    assert newest_checkpoint(tmp_path) is not None
