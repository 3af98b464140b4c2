"""Prompts from a text file, in the dialect of kohya's sd-scripts: one a line, with options of its own behind it.

    a castle by the sea --n blurred, text --w 512 --h 768 --d 7 --l 6.5 --s 30
    # a comment

The flags and their values are those of `line_to_prompt_dict` in sd-scripts. There a flag that is not understood is
ignored; here it is an error, for the picture would not be the one that was meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisd.errors import UsageError
from minisd.sample_config import SampleConfig

_WHOLE, _NUMBER = r"\d{1,20}", r"\d+\.?\d*|\.\d+"
# Flag, in either case -> the option it is, the values it takes, and how they are read.
_FLAGS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", r"(?s:.+)", str),
    "w": ("width", _WHOLE, int),
    "h": ("height", _WHOLE, int),
    "d": ("seed", _WHOLE, int),
    "l": ("guidance_scale", _NUMBER, float),
    "s": ("num_inference_steps", _WHOLE, int),
}


def one_config_a_prompt(config: SampleConfig) -> list[SampleConfig]:
    """The prompts of the command line, then those of the file, each as a config of its own.

    Raises:
        UsageError: the file cannot be read, or has no prompt; or a line has a flag that is unknown or malformed, or a
            value that the option does not take: names file and line.
    """
    configs = [replace(config, prompt=(prompt,), prompts_file=None) for prompt in config.prompt]
    path = config.prompts_file
    if path is None:
        return configs
    for number, line in _lines(path):
        try:
            prompt, options = parse_line(line)
            configs.append(replace(config, prompt=(prompt,), prompts_file=None, **options))
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
    if not configs:
        raise UsageError(f"--prompts-file {path}: there is no prompt in it. Write one a line.")
    return configs


def parse_line(line: str) -> tuple[str, dict[str, Any]]:
    """Split a line into the prompt and the options behind it, under the names of SampleConfig's fields.

    Raises:
        UsageError: there is no prompt, or a flag is unknown, malformed or given twice.
    """
    prompt, *parts = re.split(r"(?:^|\s+)--", line.strip())
    if not prompt:
        raise UsageError("there is no prompt, only options. Write it in front of them.")
    options: dict[str, Any] = {}
    for part in parts:
        flag, _, value = part.partition(" ")
        if flag.lower() not in _FLAGS:
            known = ", ".join(f"--{name}" for name in _FLAGS)
            raise UsageError(f"--{flag}: expected one of {known}. Leave it out, or give it as an option of sample.py.")
        name, values, read = _FLAGS[flag.lower()]
        if not re.fullmatch(values, value.strip()):
            wanted = {_WHOLE: "a whole number", _NUMBER: "a number"}.get(values, "text")
            raise UsageError(f"--{flag} {value.strip()[:50]!r}: expected {wanted}.")
        if name in options:
            raise UsageError(f"--{flag} is given twice. Leave one out.")
        options[name] = read(value.strip())
    return prompt, options


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that have a prompt, with their numbers from 1. Raises UsageError."""
    if path.suffix.lower() in (".toml", ".json"):
        raise UsageError(f"--prompts-file {path}: expected a text file, one prompt a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"--prompts-file {path}: no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts-file {path}: expected a text file in UTF-8 ({error}).") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line
