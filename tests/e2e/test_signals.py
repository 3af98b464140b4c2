"""Runs of real processes that are told to stop, killed, or stuck: what is saved, who ends, and what is left to read."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train
from minisd.checkpoint import newest_checkpoint, verify_checkpoint
from tests.e2e.running import ALONE, ROOT, config_for, environment, metrics_of, options_of, torchrun_command

LONG = {"max_train_steps": 5000, "checkpointing_steps": 5000, "gradient_accumulation_steps": 1, "random_flip": False}


class Launch:
    """A running train.py, alone or under torchrun."""

    def __init__(self, config, *, processes=None, torchrun_options=()):
        self.config, self.log = config, config.output.with_suffix(".log")
        words = ["train.py", *options_of(config)]
        if processes is None:
            command = [sys.executable, *words]
        else:
            command = torchrun_command(*torchrun_options, *words, processes=processes)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment())

    def wait_for_steps(self, count):
        """Return when so many steps are in metrics.jsonl."""
        deadline = time.monotonic() + 90
        path = self.config.output / "metrics.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") >= count):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ranks(self):
        """Process ids of the ranks, in order."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (folder / "environ").read_bytes().decode().split("\0")
            except (OSError, IndexError):
                continue
            if parent == self.process.pid and "train.py" in words:
                rank = next(int(entry[5:]) for entry in variables if entry.startswith("RANK="))
                found[rank] = int(folder.name)
        return [found[rank] for rank in sorted(found)]

    def everyone(self):
        """Every process that still has this run's output folder on its command line, DataLoader workers included."""
        mark = str(self.config.output).encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and mark in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def wait(self, seconds=40):
        """The exit code, when every process is gone."""
        deadline = time.monotonic() + seconds
        code = self.process.wait(seconds)
        while self.everyone():
            assert time.monotonic() < deadline, (self.everyone(), self.said)
            time.sleep(0.05)
        return code

    @property
    def said(self):
        return self.log.read_text()[-4000:]

    @property
    def status(self):
        return json.loads((self.config.output / "run_status.json").read_text())


@pytest.fixture
def run(tiny_folder, dataset, tmp_path):
    launches = []

    def start(processes=None, torchrun_options=(), **options):
        config = config_for(tiny_folder, dataset, tmp_path / "run", **(LONG | options))
        launches.append(Launch(config, processes=processes, torchrun_options=torchrun_options))
        return launches[-1]

    yield start
    for launch in launches:
        for pid in [*launch.everyone(), launch.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launch.process.wait(10)


def saved_once(launch):
    """The one checkpoint of a run that was stopped, sound and at most a step behind what was written last."""
    folders = [path.name for path in (launch.config.output / "checkpoints").iterdir()]
    path = newest_checkpoint(launch.config.output / "checkpoints")
    assert folders == [path.name], folders
    step = verify_checkpoint(path)
    assert metrics_of(launch.config.output)[-1]["step"] == step
    status = launch.status
    assert (status["state"], status["step"], status["code"]) == ("preempted", step, 75), status
    assert status["checkpoint"] == f"checkpoints/{path.name}"
    return step


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_sigterm_to_torchrun_is_one_save_by_all(run, workers):
    """torchrun signals the readers of pictures, too, and first."""
    launch = run(processes=2, dataloader_num_workers=workers)
    launch.wait_for_steps(3 + workers)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 1  # torchrun's own, whatever its processes return
    saved_once(launch)


def test_after_a_stop_the_run_goes_on_as_if_there_had_been_none(run, tiny_folder, dataset, tmp_path):
    launch = run(max_train_steps=40)
    launch.wait_for_steps(2)
    launch.process.send_signal(signal.SIGHUP)
    assert launch.wait() == 75, launch.said
    step = saved_once(launch)
    assert step < 40
    assert f"saved {launch.config.output}/checkpoints/step-{step:06d}. The same command goes on" in launch.said
    whole = replace(launch.config, output=tmp_path / "whole")
    train.train(whole, ALONE)
    train.train(launch.config, ALONE)
    assert metrics_of(launch.config.output) == metrics_of(whole.output)
    assert (launch.config.output / "lora.safetensors").read_bytes() == (whole.output / "lora.safetensors").read_bytes()


def test_one_rank_is_told_and_all_stop(run):
    launch = run(processes=2)
    launch.wait_for_steps(2)
    os.kill(launch.ranks()[1], signal.SIGUSR1)
    assert launch.wait() == 1
    saved_once(launch)


def test_sigusr1_to_torchrun_with_the_documented_options(run):
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=60"]
    launch = run(processes=2, torchrun_options=options)
    launch.wait_for_steps(2)
    launch.process.send_signal(signal.SIGUSR1)
    assert launch.wait(70) == 1
    saved_once(launch)


def test_ctrl_c_once_saves_and_twice_does_not_wait(run):
    launch = run()
    launch.wait_for_steps(2)
    launch.process.send_signal(signal.SIGINT)
    assert launch.wait() == 75
    saved_once(launch)
    before = len(metrics_of(launch.config.output))

    again = Launch(launch.config)
    try:
        again.wait_for_steps(before + 1)
        os.kill(again.process.pid, signal.SIGSTOP)  # so that both arrive within one step
        again.process.send_signal(signal.SIGINT)
        os.kill(again.process.pid, signal.SIGCONT)
        while again.process.poll() is None:
            again.process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        assert again.process.returncode in (130, 75)  # 75: the step was over before the second one came
    finally:
        again.process.kill()
    assert newest_checkpoint(launch.config.output / "checkpoints") is not None


def test_without_torchrun_the_ranks_save_and_end(run):
    """kill -9 of torchrun leaves its processes alone in the world; they would write into the next run's folder."""
    launch = run(processes=2)
    launch.wait_for_steps(2)
    launch.process.kill()
    started = time.monotonic()
    launch.wait(20)
    assert time.monotonic() - started < 10
    saved_once(launch)
    assert "torchrun is gone" in launch.said


def test_a_killed_rank_ends_the_others_and_the_next_start_goes_on(run):
    launch = run(processes=2, checkpointing_steps=2)
    launch.wait_for_steps(5)
    os.kill(launch.ranks()[1], signal.SIGKILL)
    started = time.monotonic()
    assert launch.wait() == 1
    assert time.monotonic() - started < 30
    status = launch.status
    assert (status["state"], status["code"]) == ("failed", 1), status
    assert "rank 1 ended" in status["error"]
    assert 'Traceback (most recent call last):\n  File "/work' not in launch.said
    kept = verify_checkpoint(newest_checkpoint(launch.config.output / "checkpoints"))

    again = Launch(launch.config, processes=2)
    try:
        again.wait_for_steps(kept + 2)
        steps = [line["step"] for line in metrics_of(launch.config.output)]
        assert steps == list(range(1, len(steps) + 1))
        again.process.send_signal(signal.SIGTERM)
        again.wait()
    finally:
        again.process.kill()


def test_a_stuck_rank_is_given_up_after_the_timeout(run):
    launch = run(processes=2, dist_timeout=4, torchrun_options=["--shutdown-timeout=3"])
    launch.wait_for_steps(3)
    stuck = launch.ranks()[1]
    os.kill(stuck, signal.SIGSTOP)
    started = time.monotonic()
    while launch.ranks()[:1] != [stuck]:  # the other one has given up
        assert time.monotonic() - started < 30, launch.said
        time.sleep(0.1)
    os.kill(stuck, signal.SIGCONT)
    assert launch.wait() == 1
    assert "--dist-timeout" in launch.said
    assert launch.status["state"] == "failed"


def test_a_second_run_in_the_folder_is_refused(run):
    launch = run()
    launch.wait_for_steps(2)
    second = subprocess.run(
        [sys.executable, "train.py", *options_of(launch.config)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment(),
    )  # fmt: skip
    assert second.returncode == 10, second.stderr
    assert f"in use by process {launch.process.pid}" in second.stderr
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75


def test_a_loss_that_is_no_number_on_one_rank_stops_all_without_a_save(tiny_folder, dataset, tmp_path):
    """The program below poisons the second rank's third step."""
    config = config_for(tiny_folder, dataset, tmp_path / "run", **(LONG | {"checkpointing_steps": 1}))
    program = tmp_path / "poisoned.py"
    program.write_text(
        "import os, sys\nimport train\nfrom functools import partial\nfrom minisd.command_line import parse_args\n"
        "from minisd.config import TrainConfig\nfrom minisd.errors import run_script\n"
        "original, calls = train.loss_of, []\n"
        "def loss_of(*args):\n    calls.append(None)\n"
        "    bad = os.environ['RANK'] == '1' and len(calls) == 3\n"
        "    return original(*args) * (float('nan') if bad else 1.0)\n"
        "train.loss_of = loss_of\n"
        "sys.exit(run_script(partial(train.main, parse_args(TrainConfig)), debug=False))\n"
    )
    done = subprocess.run(
        torchrun_command(str(program), *options_of(config), processes=2),
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    status = json.loads((config.output / "run_status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 7, 2), status
    facts = json.loads((config.output / "bad_batch.json").read_text())
    assert [entry["finite"] for entry in facts["ranks"]] == [True, False]
    assert "step 3" in status["error"]
    assert "rank 1: " in status["error"]
    assert newest_checkpoint(config.output / "checkpoints").name == "step-000002"
