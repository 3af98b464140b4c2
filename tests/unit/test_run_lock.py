"""One run a folder, between real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minisd.errors import DiskError, OutputInUseError, UsageError
from minisd.run_lock import output_lock

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from minisd.run_lock import output_lock
with output_lock(Path(sys.argv[1])):
    worker = os.fork() if sys.argv[2] == "forks" else -1
    if worker != 0:
        print(worker, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of tmp_path / "run", with or without a forked child."""
    started = []

    def start(forks):
        code = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "forks" if forks else "alone"]
        process = subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.worker = int(process.stdout.readline())
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        if process.worker > 0:
            os.kill(process.worker, signal.SIGKILL)


def test_it_makes_the_folder_and_says_who_holds_it(tmp_path):
    with output_lock(tmp_path / "a" / "b"):
        said = json.loads((tmp_path / "a" / "b" / "run.lock").read_text())
    assert said["pid"] == os.getpid()
    assert said["host"] == socket.gethostname()
    assert said["started"].endswith("+00:00")


def test_a_second_run_is_told_who_has_the_folder(tmp_path, holder):
    first = holder(forks=False)
    expected = f"run: in use by process {first.pid} on {socket.gethostname()}"
    with pytest.raises(OutputInUseError, match=expected), output_lock(tmp_path / "run"):
        pass
    with output_lock(tmp_path / "other"):
        pass


@pytest.mark.parametrize("forks", [False, True])
def test_the_lock_goes_with_the_process(tmp_path, holder, forks):
    """A DataLoader worker outlives a parent that was killed by seconds, and must not hold up the next run."""
    first = holder(forks)
    first.kill()
    first.wait()
    if forks:
        os.kill(first.worker, 0)  # it lives
    with output_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == os.getpid()


def test_patience_waits_for_a_run_that_is_just_ending(tmp_path, holder, caplog):
    first = holder(forks=False)
    started = time.monotonic()
    with pytest.raises(OutputInUseError), output_lock(tmp_path / "run", patience=0.3):
        pass
    assert time.monotonic() - started > 0.3
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {first.pid}"])
    with output_lock(tmp_path / "run", patience=10):
        assert f"waiting for process {first.pid}" in caplog.text
    killer.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_what_an_older_run_left_does_not_matter(tmp_path, content):
    (tmp_path / "run.lock").write_text(content + " " * 200)
    with output_lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    with output_lock(tmp_path):  # nor does one that has ended
        pass


def test_impossible_folders(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="got a file"), output_lock(path):
            pass
    for path in (tmp_path / ("n" * 300), Path("/proc/nowhere")):
        with pytest.raises(DiskError), output_lock(path):
            pass
