"""The options of `python -m minisd.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minisd.command_line import refuse, tyros_refusal
from minisd.config import check
from minisd.errors import UsageError
from minisd.sweep_grid import SWEEP

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Draw the same prompts with every checkpoint of a run, measure the pictures, and pick a checkpoint."""

    run: Path
    """The OUTPUT folder of train.py. The run may still go on."""
    prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt in the style's domain; may be given several times. If none is given: captions of held-out pictures, or
    of training pictures if none are held out; on the pocket model, scenes as in the demo, but none of them."""
    outside_prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt outside the style's domain, drawn as it stands; may be given several times. If none is given: four
    general ones, with the run's trigger word; on the pocket model, scenes without a word for a style."""
    seed: int = 0
    """Seed of the first prompt's picture; the others follow."""
    num_inference_steps: int = 25
    """Steps of the sampler."""
    guidance_scale: float = 7.5
    """How strongly the prompt steers."""
    clip: str | None = None
    """The CLIP model that compares pictures: a repo id or a folder. If not given, openai/clip-vit-large-patch14; on the
    pocket model, its own measures of the pixels take CLIP's place."""
    sweep: bool = True
    """Draw a few of the prompts with the pick at several strengths, too."""
    sweep_scales: tuple[float, ...] = SWEEP
    """Those strengths."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        most = 2**63 - 1000  # the prompts' seeds follow
        check("seed", self.seed, 0 <= self.seed < most, "from 0 to 2^63 - 1000")
        check("num_inference_steps", self.num_inference_steps, self.num_inference_steps >= 1, "at least 1")
        check("guidance_scale", self.guidance_scale, 0 <= self.guidance_scale < 1000, "a number from 0 to 1000")
        for scale in self.sweep_scales:
            check("sweep_scales", scale, math.isfinite(scale), "numbers, such as 0 0.5 1")
        if self.sweep and not any(scale > 0 for scale in self.sweep_scales):
            raise UsageError("--sweep-scales: expected at least one strength above 0. Or give --no-sweep.")
        if len(set(self.sweep_scales)) != len(self.sweep_scales):
            raise UsageError("--sweep-scales: a strength is given twice. Leave one out.")
        if any(not prompt.strip() for prompt in (*self.prompts, *self.outside_prompts)):
            raise UsageError("a prompt is empty. Write what to draw, or leave it out.")


def parse_options(arguments: Sequence[str] | None = None) -> EvaluateConfig:
    """Read the command line; a mistake ends the process with one line on stderr and exit code 2."""
    try:
        with tyros_refusal():
            return tyro.cli(
                EvaluateConfig,
                args=arguments,
                prog="python -m minisd.evaluate",
                description=EvaluateConfig.__doc__,
            )
    except UsageError as error:
        refuse(str(error))
