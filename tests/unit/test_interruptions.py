"""Signals: real ones, sent to real processes. Most of these never import torch."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minisd.interruptions import SIGNALS, StopRequest

ROOT = Path(__file__).parents[2]
PLAIN = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID")}
QUICK = "import minisd.interruptions\nminisd.interruptions.GRACE = 0.5\n"
START = "import os, signal, sys, time\nfrom minisd.interruptions import *\nstop = StopRequest()\nstop.install()\n"
READY = "print('ready', flush=True)\n"
RAISING = "up = stop.raising()\nup.__enter__()\n"


@pytest.fixture
def start():
    """Start a Python program; returns when it has printed its first line. What is left of it ends with the test."""
    started = []

    def run(code, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=PLAIN | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert select.select([process.stdout], [], [], 30)[0], "it says nothing"
        line = process.stdout.readline()
        assert line, process.stderr.read()
        process.first = line.strip()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ended(process, within=3.0):
    _, said = process.communicate(timeout=within)
    return process.returncode, said


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid, within):
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_one_that_was_never_installed_never_stops():
    stop = StopRequest()
    with stop.deferred():
        assert not stop.requested
        stop.check()
    assert stop.reason == ""
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", SIGNALS)
def test_while_importing_a_signal_ends_the_process_with_one_line(start, number):
    process = start(START + READY + "time.sleep(30)")
    process.send_signal(number)
    code = 130 if number == signal.SIGINT else 75
    assert ended(process) == (code, f"minisd: stopped ({number.name}); nothing new was to be saved\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_loop_a_signal_raises_what_run_script_reports(start, number):
    work = """
from minisd.errors import run_script
def main():
    with stop.raising():
        try:
            print("ready", flush=True)
            time.sleep(30)
        except Exception:
            pass
sys.exit(run_script(main, debug=False))
"""
    process = start(START + work)
    process.send_signal(number)
    code = 130 if number == signal.SIGINT else 75
    assert ended(process) == (code, f"minisd: stopped ({number.name}); nothing new was to be saved\n")


LOOP = """
up = stop.raising()
up.__enter__()
with stop.deferred():
    print('ready', flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print('saving', flush=True)
    time.sleep(0.5)
    print('saved', flush=True)
print(stop.reason, flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_a_signal_is_a_mark(start, number):
    process = start(START + LOOP)
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    if number != signal.SIGINT:
        for again in (number, signal.SIGTERM, signal.SIGHUP):  # the save is not disturbed
            process.send_signal(again)
    said, _ = process.communicate(timeout=5)
    assert (process.returncode, said) == (0, f"saved\n{number.name}\n")


def test_the_second_interrupt_does_not_wait_for_the_save(start):
    process = start(START + LOOP)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=5)
    assert (process.returncode, said) == (130, "")


def test_a_signal_is_kept_when_the_loop_begins(start):
    """An exception raised in a destructor is lost; the request is not."""
    code = """
up = stop.raising()
up.__enter__()
class Lossy:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
Lossy()
with stop.deferred():
    print(stop.requested, stop.reason, flush=True)
"""
    process = start(START + code)
    assert process.first == "True SIGTERM"


# Waits in C without running a Python instruction, as a rank in a collective that another one never joins.
STUCK = """
import ctypes
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
up = stop.raising()
up.__enter__()
print("ready", flush=True)
lock(mutex)
"""


def test_what_cannot_run_a_handler_ends_all_the_same(start):
    process = start(QUICK + START + STUCK)
    time.sleep(0.3)  # until it waits
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, "minisd: stopped (SIGTERM); nothing new was to be saved\n")


def test_after_the_work_a_signal_changes_nothing(start):
    code = "with stop.raising():\n    pass\n" + READY + "time.sleep(0.5)\nsys.exit(6)"
    process = start(START + code)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (6, "")


def test_a_forked_child_does_nothing_with_signals(start):
    code = """
up = stop.raising()
up.__enter__()
child = os.fork()
if child == 0:
    time.sleep(0.5)
    os._exit(7 if not stop.requested else 8)
time.sleep(0.1)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), stop.requested, flush=True)
time.sleep(1)  # nor has the child's signal reached the parent's watch
print("lives", flush=True)
"""
    process = start(QUICK + START + code)
    assert process.first == "7 False"
    assert process.stdout.readline() == "lives\n"


def test_a_reader_that_leaves_does_not_end_the_run(start):
    code = """
import logging
from tqdm import tqdm
print("ready", flush=True)
time.sleep(0.3)
for _ in tqdm(range(1000), mininterval=0):
    print("x" * 100, flush=True)
logging.warning("x")
try:
    os.write(1, b"x")
except BrokenPipeError:
    sys.exit(7)
"""
    process = start(START + code)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=5) == 7


def child_of_a_torchrun(child):
    """A program that starts another as torchrun does (a session of its own) and prints its process id."""
    return f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(READY + "time.sleep(60)", id="importing"),
        pytest.param(RAISING + READY + "time.sleep(60)", id="starting"),
        pytest.param(STUCK, id="stuck"),
        pytest.param(LOOP, id="loop"),
    ],
)
def test_an_orphan_ends_within_ten_seconds(start, work):
    torchrun = start(child_of_a_torchrun(START + work), TORCHELASTIC_RUN_ID="1")
    rank = int(torchrun.first)
    assert alive(rank)
    torchrun.kill()
    assert gone(rank, within=10)


def test_without_torchrun_the_end_of_the_parent_is_nothing(start):
    shell = start(child_of_a_torchrun(START + READY + "time.sleep(60)"))
    shell.kill()
    shell.wait()
    time.sleep(0.5)
    run = int(shell.first)
    assert alive(run)
    os.kill(run, signal.SIGKILL)


LOADER = """
import torch
from torch.utils.data import DataLoader
class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6
    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.zeros(1)
loader = DataLoader(Slow(), num_workers=2, worker_init_fn=ignore_signals, multiprocessing_context={method!r})
with signals_held():
    batches = iter(loader)
next(batches), next(batches)
up = stop.raising()
up.__enter__()
print(*[worker.pid for worker in batches._workers], flush=True)
"""
ENDS = {
    "normally": "time.sleep(0.5)",
    "by exception": "time.sleep(0.5)\n1 / 0",
    "by kill -9": "time.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)",
    "at once": "time.sleep(0.5)\nos._exit(130)",
    "stuck": "batches._index_queues = []\n_w = batches._workers\ntype(batches).__del__ = lambda self: None\n1 / 0",
}


@pytest.mark.parametrize("end", ENDS)
def test_workers_end_with_their_parent(start, end):
    process = start(START + LOADER.format(method="fork") + ENDS[end])
    workers = [int(pid) for pid in process.first.split()]
    assert len(workers) == 2
    assert all(map(alive, workers))
    process.wait(timeout=15)
    assert all(gone(worker, within=10) for worker in workers)


def test_workers_outlive_what_is_meant_for_the_run(start):
    code = """
with stop.deferred():
    print("looping", flush=True)
    while not stop.requested:
        next(batches)
    for _ in range(50):
        next(batches)
    print("saved", flush=True)
"""
    process = start(START + LOADER.format(method="fork") + code)
    workers = [int(pid) for pid in process.first.split()]
    assert process.stdout.readline() == "looping\n"
    for pid in [*workers, process.pid]:
        for number in SIGNALS:
            os.kill(pid, number)
    assert select.select([process.stdout], [], [], 10)[0]
    assert process.stdout.readline() == "saved\n"
    assert ended(process, within=10)[0] == 0
    assert all(gone(worker, within=1) for worker in workers)
