"""What a run has left in its OUTPUT folder so far: its options, and the LoRA of each checkpoint. Nothing is changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from minisd.checkpoint import checkpoints_in, verify_checkpoint
from minisd.command_line import read_config_file
from minisd.config import TrainConfig
from minisd.errors import CheckpointError, UsageError, WeightsError
from minisd.lora_reader import read_lora_info
from minisd.model_files import sha256_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """The adapter as it was after some steps.

    Attributes:
        step: updates made; 0 is the base model without adapter.
        lora: the file, relative to the run's folder; None at step 0.
        sha256: of the file, in hex; "" at step 0.
    """

    step: int
    lora: Path | None
    sha256: str


def read_train_config(run: Path) -> TrainConfig:
    """The options of a run, as it saved them; `output` is where the run is now.

    Raises:
        UsageError: this is no run's folder, or one of another version of minisd.
    """
    path = run / "config.json"
    if not path.is_file():
        raise UsageError(f"--run {run}: no config.json in it. Give the --output folder of train.py.")
    try:
        return replace(TrainConfig(**read_config_file(path, TrainConfig)), output=run)
    except (TypeError, UsageError) as error:  # a TypeError: an option that must be there is not
        raise UsageError(
            f"--run {run}: its config.json cannot be used: {str(error).removeprefix('--config ')}"
        ) from error


def candidates_in(run: Path) -> list[Candidate]:
    """The base, the sound checkpoints, and OUTPUT/lora.safetensors if its checkpoint is not among them; by step.

    A damaged checkpoint is passed over with a warning, and one that the run deletes meanwhile.

    Raises:
        UsageError: there is no adapter yet.
        WeightsError: OUTPUT/lora.safetensors cannot be read, or does not say of which step it is.
    """
    found = {0: Candidate(0, None, "")}
    for folder in checkpoints_in(run / "checkpoints"):
        try:
            step, lora = verify_checkpoint(folder), folder / "lora.safetensors"
            found[step] = Candidate(step, lora.relative_to(run), sha256_of(lora))
        except (CheckpointError, WeightsError) as error:
            log.warning("passing over a checkpoint: %s", error)
    final = run / "lora.safetensors"
    if final.exists():
        last = read_lora_info(final).steps
        if last is None:
            raise WeightsError(f"{final}: it does not say of which step it is, as those of train.py do. Delete it.")
        if last not in found:
            found[last] = Candidate(last, final.relative_to(run), sha256_of(final))
    if len(found) == 1:
        raise UsageError(
            f"--run {run}: there is no checkpoint yet. Wait for the first, or lower --checkpointing-steps."
        )
    return [found[step] for step in sorted(found)]
