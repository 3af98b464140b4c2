"""The status file tells how a run stands and how it ended, whoever ended it."""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from minisd.errors import DataError, DiskError, Stopped
from minisd.run_status import dead_ranks, read_status, reported, write_status

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def status(folder):
    return json.loads((folder / "run_status.json").read_text())


def run(folder, error=None, rank=0, processes=()):
    with reported(folder, rank) as report:
        report.processes = processes
        if rank == 0:
            report.saved(5, folder / "checkpoints" / "step-000005")
        if error is not None:
            raise error


def test_every_field(tmp_path):
    write_status(tmp_path, state="failed", step=7, checkpoint=tmp_path / "checkpoints" / "step-000005", code=6,
                 error="a\nb")  # fmt: skip
    said = status(tmp_path)
    assert datetime.fromisoformat(said.pop("updated")).utcoffset().total_seconds() == 0
    assert said == {
        "state": "failed",
        "step": 7,
        "checkpoint": "checkpoints/step-000005",
        "code": 6,
        "error": "a\\nb",
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }


def test_running_then_done(tmp_path):
    with reported(tmp_path) as report:
        assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("running", None)
        report.step = 3
        report.saved(4, tmp_path / "step-000004")
        assert (status(tmp_path)["state"], status(tmp_path)["checkpoint"]) == ("running", "step-000004")
        report.step = 6
    assert (status(tmp_path)["state"], status(tmp_path)["code"], status(tmp_path)["step"]) == ("done", 0, 6)


@pytest.mark.parametrize(
    ("error", "state", "code", "text"),
    [
        (Stopped("SIGTERM", Path("x")), "preempted", 75, None),
        (Stopped("SIGINT"), "preempted", 130, None),
        (KeyboardInterrupt(), "preempted", 130, None),
        (DataError("bad\npicture"), "failed", 3, "bad\\npicture"),
        (OSError(28, "No space left on device"), "failed", 6, "No space left on device. "),
        (ValueError("ours"), "failed", 1, "ValueError: ours"),
        (LOST, "failed", 1, "lost another process of the run"),
    ],
)
def test_how_it_ended(tmp_path, error, state, code, text):
    with pytest.raises(type(error)):
        run(tmp_path, error)
    said = status(tmp_path)
    assert (said["state"], said["code"]) == (state, code)
    assert said["checkpoint"] == "checkpoints/step-000005"
    assert said["error"] is None if text is None else said["error"].startswith(text)


def test_the_rank_with_the_cause_writes_it_and_the_main_rank_leaves_it(tmp_path):
    main = reported(tmp_path)
    main.__enter__().saved(5, tmp_path / "step-000005")
    with pytest.raises(DataError):
        run(tmp_path, DataError("bad picture"), rank=1)
    with pytest.raises(RuntimeError):
        run(tmp_path, LOST, rank=2)
    assert not main.__exit__(RuntimeError, LOST, None)
    said = status(tmp_path)
    assert (said["state"], said["code"], said["error"]) == ("failed", 3, "rank 1: bad picture")
    assert (said["step"], said["checkpoint"]) == (5, "step-000005")


def test_other_ranks_write_nothing_else(tmp_path):
    run(tmp_path, rank=1)
    with pytest.raises(Stopped):
        run(tmp_path, Stopped("SIGTERM"), rank=1)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_cannot_be_noted_is_still_that_failure(tmp_path):
    with pytest.raises(DataError):
        run(tmp_path / "nowhere", DataError("x"), rank=1)
    with pytest.raises(DiskError):
        run(tmp_path / "nowhere")


def test_the_rank_that_was_killed_is_named(tmp_path):
    here = socket.gethostname()
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    processes = [(here, os.getpid()), (here, killed.pid), ("elsewhere", 2**22 - 1)]
    assert dead_ranks(processes, patience=0) == []
    killed.send_signal(signal.SIGKILL)
    assert dead_ranks(processes) == [1]  # a zombie: nobody has waited for it
    killed.wait()
    assert dead_ranks(processes) == [1]
    with pytest.raises(RuntimeError):
        run(tmp_path, LOST, processes=processes)
    assert status(tmp_path)["error"].startswith("rank 1 ended: lost another process")

    write_status(tmp_path, state="running", step=5)  # the main rank's last word, if it is the one that was killed
    with pytest.raises(RuntimeError):
        run(tmp_path, LOST, rank=2, processes=processes)
    assert status(tmp_path)["state"] == "running"
    with pytest.raises(RuntimeError):
        run(tmp_path, LOST, rank=2, processes=[processes[1], processes[0]])
    assert status(tmp_path)["error"].startswith("rank 0 ended: lost another process")
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("failed", 5)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_what_is_not_a_status_is_none(tmp_path, content):
    (tmp_path / "run_status.json").write_text(content)
    assert read_status(tmp_path) == {}
    assert read_status(tmp_path / "nowhere") == {}
