"""How a picture was drawn, in the words of the AUTOMATIC1111 web UI, which others read as well.

The form is that of its `parse_generation_parameters`: the prompt, a line with the negative one, a line of names and
values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minisd.sampling import SamplingSettings

# Name here -> name there, and whether it lets its noise levels be spaced in several ways.
_SAMPLERS = {
    "ddpm": ("DDPM", False),
    "ddim": ("DDIM", False),
    "pndm": ("PLMS", False),
    "euler": ("Euler", True),
    "euler-a": ("Euler a", True),
    "heun": ("Heun", True),
    "dpm++2m": ("DPM++ 2M", True),
    "dpm++2m-sde": ("DPM++ 2M SDE", True),
    "unipc": ("UniPC", False),
    "lcm": ("LCM", False),
}


def parameters_text(settings: SamplingSettings, prompt: str, seed: int, model: str, details: Sequence[str] = ()) -> str:
    """How a picture was drawn, in the form that A1111 writes into a PNG's "parameters", and reads back.

    Line breaks in prompts become spaces, which mean the same to CLIP: a line of a prompt that begins with "Negative
    prompt:" would be taken for one.

    Args:
        settings: how.
        prompt: what was drawn.
        seed: of the picture.
        model: its name; of a path the last component is written.
        details: more of it, "Name: value", in `quoted` where needed.
    """
    sampler, spaced = _SAMPLERS[settings.scheduler]
    schedule = "Karras" if settings.karras else "Uniform" if spaced else None
    fields = {
        "Steps": settings.num_inference_steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": quoted(Path(model).stem if model.endswith(".safetensors") else Path(model).name),
        "Denoising strength": f"{settings.strength:g}" if settings.strength < 1 else None,
        "Clip skip": settings.clip_skip + 1 if settings.clip_skip else None,  # it counts the layer that is read
    }
    said = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    lines = [" ".join(prompt.split())]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {' '.join(settings.negative_prompt.split())}")
    return "\n".join([*lines, ", ".join([*said, *details, "Version: minisd"])])


def quoted(value: str) -> str:
    """A value as it stands, or in quotation marks where A1111 would misread it."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
