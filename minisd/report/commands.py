"""The lines that draw a picture again and train a run again: every option they need, quoted for a shell."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minisd.config import TrainConfig
from minisd.report.evaluation import Evaluation, Prompt, Row
from minisd.report.run_files import RunFiles

_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DEFAULT_SCHEDULER = "dpm++2m"  # of sample.py, and of pictures along a run
# The last line of a picture's text, as a1111_text.parameters_text writes it for a picture along a run.
_LAST_LINE = re.compile(
    r"Steps: (\d+), Sampler: DPM\+\+ 2M, (?:Schedule type: Uniform, )?CFG scale: ([\d.e+-]+), Seed: (\d+), "
    r"Size: (\d+)x(\d+), Model: "
)
# Classes of characters that reorder what follows them.
_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@dataclass(frozen=True)
class Recipe:
    """How a picture was drawn, but for the model and the LoRA."""

    prompt: str
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str = _DEFAULT_SCHEDULER


@dataclass(frozen=True)
class Command:
    """The line, broken for reading as a shell lets it be, or else why there is none."""

    line: str = ""
    missing: str = ""


def recipe_of(parameters: str, config: TrainConfig) -> Recipe | None:
    """Read a recipe off the text in a picture that was drawn along a run; None if it is not all there.

    The text has six digits of the guidance scale, the options of the run have all.
    """
    prompt, _, last = parameters.rpartition("\n")
    found = _LAST_LINE.match(last)
    if found is None or "\n" in prompt:
        return None
    guidance = config.validation_guidance_scale
    if f"{guidance:g}" != found[2]:
        try:
            guidance = float(found[2])
        except ValueError:
            return None
    return Recipe(prompt, int(found[3]), int(found[5]), int(found[4]), int(found[1]), guidance)


def repeat_along_run(run: RunFiles, recipe: Recipe | None, step: int, name: str) -> Command:
    """The command for a picture in samples/, drawn after `step` updates."""
    if recipe is None:
        return Command(missing="The picture does not say how it was drawn.")
    config = run.config
    where = f"step-{step:06d}/{name}"
    if step == 0:
        lora = "none" if config.init_lora is None else str(config.init_lora)
        if config.zero_terminal_snr:  # of a LoRA's header sample.py learns that the noise schedule is another one
            lora = f"{_newest_lora(run)}:0" if config.init_lora is None and _newest_lora(run) else ""
        return _command(config, recipe, lora, where)
    if step == run.step and run.final_lora:
        return _command(config, recipe, f"{_output(run)}/lora.safetensors", where)
    return _command(config, recipe, _checkpoint(run, step), where)


def repeat_evaluation(run: RunFiles, evaluation: Evaluation, row: Row, prompt: Prompt, name: str) -> Command:
    """The command for a picture in evaluation/."""
    settings = evaluation.settings
    try:
        recipe = Recipe(
            " ".join(prompt.text.split()),
            prompt.seed,
            int(settings["height"]),
            int(settings["width"]),
            int(settings["num_inference_steps"]),
            float(settings["guidance_scale"]),
            str(settings["scheduler"]),
        )
    except (KeyError, TypeError, ValueError):
        return Command(missing="evaluation.json does not say how it was drawn.")
    lora = "none"
    if row.lora:
        lora = f"{_output(run)}/{row.lora}" if (run.folder / row.lora).is_file() else ""
        lora += f":{row.scale:g}" if lora and row.scale != 1 else ""
    elif run.config.zero_terminal_snr:
        lora = f"{_newest_lora(run)}:0" if _newest_lora(run) else ""
    return _command(run.config, recipe, lora, f"evaluation/{name}")


def repeat_training(run: RunFiles) -> Command:
    """The command that trains the same again, beside the run: it publishes nothing, where the run did."""
    options: dict[str, object] = {"config": f"{_output(run)}/config.json", "output": "trained-again"}
    unpublished = " --no-push-to-hub --hub-model-id None --no-hub-private-repo --hub-license None"
    return _line("python train.py" + (unpublished if run.config.push_to_hub else ""), options)


def _command(config: TrainConfig, recipe: Recipe, lora: str, name: str) -> Command:
    """`lora` is the value of --lora, "" if its file is gone."""
    if not lora:
        return Command(missing="The checkpoint of this step was not kept, so it cannot be drawn again.")
    options: dict[str, object] = {
        "model": config.model,
        "revision": config.revision,
        "variant": config.variant,
        "prediction-type": config.prediction_type,
        "lora": lora,
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "num-images": 1,
        "num-inference-steps": recipe.num_inference_steps,
        "guidance-scale": repr(recipe.guidance_scale),
        "height": recipe.height,
        "width": recipe.width,
        "scheduler": recipe.scheduler,
        "precision": _PRECISIONS[config.mixed_precision],
        "output": f"drawn-again/{name}",
    }
    return _line("python sample.py", options)


def _line(program: str, options: Mapping[str, object]) -> Command:
    """The program with those of its options that are not None."""
    lines = [program]
    for option, value in options.items():
        if value is not None:
            said = str(value)
            if any(map(_misleads, said)):
                return Command(missing=f"Its {option} has characters that are not for a command line.")
            text = shlex.quote(said)
            # Joined by "=", a value may begin with a dash.
            lines.append(f"--{option}={text}" if said.startswith("-") else f"--{option} {text}")
    return Command(line=" \\\n  ".join(lines))


def _misleads(character: str) -> bool:
    """Whether a terminal may act on it, or show a line with it in another order than it is in."""
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _REORDERING


def _output(run: RunFiles) -> str:
    """The run's folder as train.py was given it: the commands are for the same place."""
    return Path(run.config.output).as_posix()


def _checkpoint(run: RunFiles, step: int) -> str:
    """The LoRA of a checkpoint; "" if it is gone."""
    return f"{_output(run)}/checkpoints/step-{step:06d}/lora.safetensors" if step in run.checkpoints else ""


def _newest_lora(run: RunFiles) -> str:
    """A LoRA of the run's; "" if there is none yet."""
    if run.final_lora:
        return f"{_output(run)}/lora.safetensors"
    return _checkpoint(run, run.checkpoints[-1]) if run.checkpoints else ""
