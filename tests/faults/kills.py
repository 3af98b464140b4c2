"""Train, kill, go on: `python -m tests.faults.kills FOLDER careful|naive KILLS` prints what went wrong, as JSON.

A program of its own, because the kills have to come while something is being done: in a process that has run a thousand
other tests, a fork and the first step after it can take longer than the child is let live.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

from minisd.checkpoint import newest_checkpoint, verify_checkpoint
from tests.faults import toy
from tests.faults.harness import CAREFUL, NAIVE, Store, kill_after


def result(output: Path) -> bytes:
    return (output / "lora.safetensors").read_bytes()


def kill_at_random(output: Path, kills: int, store: Store, expected: bytes) -> list[str]:
    """Train again and again, killed at random moments and started again; returns what went wrong.

    The naive writer is let off at its first mishap.
    """
    generator = random.Random(kills)
    folder = output / "checkpoints"
    found: list[str] = []
    newest = done = gained = 0
    while done < kills and not (store is NAIVE and found):
        code = kill_after(
            lambda begin: toy.train(output, steps=100, every=1, store=store, begin=begin),
            generator.uniform(0.0, 0.06),
            begun=generator.random() < 0.9,
        )
        done += code == -9
        if code > 0:
            found.append(f"kill {done}: cannot go on, exit code {code}")
        elif store is CAREFUL:
            path = newest_checkpoint(folder)
            step = 0 if path is None else verify_checkpoint(path)
            if step < newest:
                found.append(f"kill {done}: step {newest} is lost, {step} is left")
            gained += step - newest
            newest = step
        if code == 0 and result(output) != expected:
            found.append(f"kill {done}: another result")
        if code >= 0:  # finished, or lost
            shutil.rmtree(output)
            newest = 0
    if store is CAREFUL and gained < 2 * done:
        found.append(f"{done} kills came before the runs did anything: {gained} steps")
    return found


if __name__ == "__main__":
    folder, name, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    toy.train(folder / "uninterrupted", steps=100, every=1)  # and a child inherits what torch loads with the first step
    store = {"careful": CAREFUL, "naive": NAIVE}[name]
    print(json.dumps(kill_at_random(folder / "run", kills, store, result(folder / "uninterrupted"))))
