"""The command line of `python -m minisd.lora_file`: its options, and mistakes said in one line.

Imports nothing slow, so that `--help` and a refusal come before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minisd.command_line import refuse, tyros_refusal
from minisd.errors import UsageError

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Inspect:
    """Say what is in a LoRA file: what it is for, its sizes, how it was made, and where it changes the model most."""

    file: tyro.conf.Positional[Path]
    """A LoRA file in any layout, or the folder of a PEFT adapter."""


@dataclass(frozen=True)
class Convert:
    """Write a LoRA file in another layout."""

    file: tyro.conf.Positional[Path]
    """A LoRA file in any layout, or the folder of a PEFT adapter."""
    output: Path
    """The .safetensors file to write."""
    lora_format: Literal["kohya", "peft"] = "kohya"
    """Names that every program reads, or those of diffusers and PEFT."""
    dtype: Dtype | None = None
    """Of the weights; if not given, as they are."""
    model: str | None = None
    """What the LoRA is for: a folder, a file, a repo id or "pocket". Needed where the LoRA does not show its family."""
    variant: str | None = None
    """Of that model's files, such as fp16."""
    allow_partial: bool = False
    """Leave out what has no place in the model, instead of refusing the file."""
    overwrite: bool = False
    """Replace a file that is there."""


@dataclass(frozen=True)
class Merge:
    """Add up LoRA files: into one, exactly, if OUTPUT is a .safetensors file; else into a model, as a folder that
    diffusers opens.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """PATH or PATH:SCALE, such as style.safetensors:0.8. A scale may be negative."""
    output: Path
    """The .safetensors file or the folder to write."""
    model: str | None = None
    """The model to merge into: a folder, a file, a repo id or "pocket". With a .safetensors file as OUTPUT: what the
    LoRAs are for, where they do not show it."""
    revision: str | None = None
    """Of the model's repository: branch, tag or commit."""
    variant: str | None = None
    """Of the model's files, such as fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the model predicts, for a single file that does not say."""
    rank: int | None = None
    """Bring the merged LoRA to this rank, which loses something; if not given, the ranks add up."""
    lora_format: Literal["kohya", "peft"] = "kohya"
    """Names that every program reads, or those of diffusers and PEFT."""
    dtype: Dtype = "float32"
    """Of the weights written."""
    allow_partial: bool = False
    """Leave out what has no place in the model, instead of refusing a file."""
    overwrite: bool = False
    """Replace a file that is there. A folder is never replaced."""


@dataclass(frozen=True)
class Resize:
    """Bring a LoRA file to a lower rank, with the least loss (singular value decomposition)."""

    file: tyro.conf.Positional[Path]
    """A LoRA file in any layout, or the folder of a PEFT adapter."""
    rank: int
    """The rank wanted; modules of a lower one stay as they are."""
    output: Path
    """The .safetensors file to write."""
    lora_format: Literal["kohya", "peft"] = "kohya"
    """Names that every program reads, or those of diffusers and PEFT."""
    dtype: Dtype | None = None
    """Of the weights; if not given, as they are."""
    model: str | None = None
    """What the LoRA is for: a folder, a file, a repo id or "pocket". Needed where the LoRA does not show its family."""
    variant: str | None = None
    """Of that model's files, such as fp16."""
    overwrite: bool = False
    """Replace a file that is there."""


Options = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Resize, tyro.conf.subcommand("resize")]
)


def parse_options(arguments: Sequence[str] | None = None) -> Inspect | Convert | Merge | Resize:
    """Read the command line; a mistake ends the process with one line on stderr and exit code 2."""
    try:
        with tyros_refusal():
            options: Inspect | Convert | Merge | Resize = tyro.cli(
                Options,
                args=arguments,
                prog="python -m minisd.lora_file",
                description="Look into LoRA files, convert them, add them up, make them smaller.",
            )
            return options
    except UsageError as error:
        refuse(str(error))
