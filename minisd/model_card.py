"""The model card: the README.md of a LoRA's repository on the Hub, which its page there shows.

Its head is YAML, which the Hub reads (base model, licence, trigger, pictures); the rest is Markdown. Whatever comes
from outside is escaped, and prompts stand in code: nothing of it can be a tag, or a link, or the end of a table.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from minisd.config import TrainConfig
from minisd.errors import one_line
from minisd.hub import is_repo_id
from minisd.lora_info import LoRAInfo, public_name

RECIPE = "recipe.json"

# By what a LoRA's header says of its base: the family in words, and the licence that its first model came under.
_FAMILIES = {
    "sd_v1": ("Stable Diffusion 1.x", "creativeml-openrail-m"),
    "sd_v2": ("Stable Diffusion 2.x", "openrail++"),
    "sd_v2_v": ("Stable Diffusion 2.x, v-prediction", "openrail++"),
    "sdxl_base_v1-0": ("Stable Diffusion XL", "openrail++"),
    "pocket": ("minisd's pocket model", None),
}
_TAGS = ("text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora", "minisd")
# What Markdown, as GitHub and the Hub know it, may take for more than text. At the start of a line, where "#", "-" and
# digits would be as well, the template has text of its own.
_ACTIVE = re.compile(r"([\\`*_\[\]<>|~&@$]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture that the card shows.

    Args:
        name: in the repository.
        prompt: what was drawn.
        seed: of it, in digits.
    """

    name: str
    prompt: str
    seed: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of the card's table of figures: of the base without the LoRA, and with it; as they are to be shown."""

    title: str
    base: str
    trained: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says.

    Args:
        repo: USER/NAME on the Hub, a well-formed name.
        info: of the LoRA file.
        file_name: of the LoRA in the repository.
        is_kohya: its keys are kohya's, which ComfyUI and A1111 look for.
        license_name: as the Hub spells it; None for that of the base's family.
        step: of the run, after which the LoRA was saved; None if not known.
        pictures: how many it was trained on; 0 if not known.
        samples: pictures, the first ones as in the grid.
        grid: name of the picture that has them beside those of the base; "" if there is none.
        columns: pictures side by side in the grid.
        figures: of the evaluation.
        why: a sentence of the evaluation about this step; "" if it picked another.
        strength: that the LoRA is best used with.
    """

    repo: str
    info: LoRAInfo
    file_name: str
    is_kohya: bool
    license_name: str | None
    step: int | None = None
    pictures: int = 0
    samples: Sequence[Sample] = ()
    grid: str = ""
    columns: int = 0
    figures: Sequence[Figure] = ()
    why: str = ""
    strength: float = 1.0


class _Verbatim(str):
    """Text that stands in the card as it is."""


def card_text(card: Card) -> str:
    """The whole README.md."""
    info = card.info
    base = _in_a_line(public_name(info.base_model))
    prompt = card.samples[0].prompt if card.samples else f"{info.trigger} a castle".strip()
    return (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            card=card,
            head=_Verbatim(_metadata(card)),
            name=card.repo.partition("/")[2],
            base=base,
            base_on_hub=is_repo_id(base),
            family=family_of(info),
            prompt=_in_a_line(prompt),
            recipe=recipe_rows(info),
            recipe_file=RECIPE if info.recipe else "",
        )
    )


def family_of(info: LoRAInfo) -> str:
    """The base's family in words; "" if the header does not name one that is known."""
    return _FAMILIES.get(info.base_model_version, ("", None))[0]


def license_of(license_name: str | None, info: LoRAInfo) -> str | None:
    """The licence given, or that of the base's family; None if neither is known."""
    return license_name or _FAMILIES.get(info.base_model_version, ("", None))[1]


def recipe_json(info: LoRAInfo) -> str:
    """The recipe in the LoRA's header as a file for `train.py --config`. No path is in it, as none is in the header."""
    options = {field.name for field in fields(TrainConfig)}
    recipe = {name: value for name, value in info.recipe.items() if name in options}
    return json.dumps(recipe | ({"trigger": info.trigger} if info.trigger else {}), indent=2) + "\n"


def recipe_rows(info: LoRAInfo) -> dict[str, str]:
    """The recipe as a table: what everybody asks for, then the other options that are not as by default."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    asked = {
        "rank": f"{info.rank}",
        "alpha": f"{info.alpha:g}",
        "targets": ", ".join(info.targets),
        "resolution": info.resolution and f"{info.resolution}",
        "learning rate": f"{info.recipe.get('learning_rate', '')}",
        "seed": "" if info.seed is None else f"{info.seed}",
    }
    told = {"rank", "alpha", "lora_targets", "resolution", "learning_rate", "seed", "max_train_steps", "model"}
    others = {
        name.replace("_", " "): json.dumps(value)
        for name, value in info.recipe.items()
        if name not in told and value != defaults.get(name)
    }
    return {name: value for name, value in (asked | others).items() if value}


def escaped(value: Any) -> str:
    """Text from outside in one line, in which Markdown finds nothing but text."""
    if isinstance(value, _Verbatim):
        return value
    return _ACTIVE.sub(r"\\\1", _in_a_line(str(value)))


def _in_a_line(text: str) -> str:
    return one_line(" ".join(text.split()))


def _code_span(text: str) -> _Verbatim:
    """Text in one line as code, between more backticks than there are in it: there is no Markdown inside."""
    line = _in_a_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return _Verbatim(f"{fence}{room}{line}{room}{fence}")


def _metadata(card: Card) -> str:
    """The YAML at the head. The Hub knows a base by the id of its repository only."""
    info = card.info
    base: Mapping[str, Any] = {}
    if is_repo_id(info.base_model) and public_name(info.base_model) == info.base_model:
        base = {"base_model": info.base_model, "base_model_relation": "adapter"}
    trigger = {"instance_prompt": _in_a_line(info.trigger)} if info.trigger else {}
    pictures = [{"text": _in_a_line(s.prompt), "output": {"url": s.name}} for s in card.samples]
    return ModelCardData(
        license=license_of(card.license_name, info),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(_TAGS),
        **base,
        **trigger,
        **({"widget": pictures} if pictures else {}),
    ).to_yaml()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=False,  # that is for HTML; here every value goes through `finalize`
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # In blocks of code nothing is escaped: a value there is one line, quoted for its language.
    environment.filters["python"] = lambda value: _Verbatim(json.dumps(value, ensure_ascii=False))
    environment.filters["shell"] = lambda value: _Verbatim(shlex.quote(value))
    environment.filters["span"] = _code_span
    environment.filters["plain"] = _Verbatim
    return environment
