"""A LoRA file described in text, as `python -m minisd.lora_file inspect` prints it. No model is needed."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from minisd.errors import one_line
from minisd.lora_dialects import LoRAModule
from minisd.lora_raw import RawLoRA, read_raw, some
from minisd.lora_reader import family_name, info_of
from minisd.lora_resize import change_norm

# What kohya's scripts say of a run, as far as it helps to do another.
_KOHYAS = ("ss_sd_model_name", "ss_network_module", "ss_network_args", "ss_optimizer", "ss_learning_rate", "ss_unet_lr",
           "ss_text_encoder_lr", "ss_lr_scheduler", "ss_lr_warmup_steps", "ss_num_train_images", "ss_num_epochs",
           "ss_epoch", "ss_max_train_steps", "ss_total_batch_size", "ss_gradient_accumulation_steps",
           "ss_mixed_precision", "ss_resolution", "ss_clip_skip", "ss_noise_offset", "ss_min_snr_gamma",
           "ss_caption_dropout_rate", "ss_training_comment")  # fmt: skip
_BLOCK = re.compile(r"(?:(down|up)_blocks|(input|output)_blocks|mid_block|middle_block)(?:[._](\d{1,4}))?")
_LAYERS_IN_BLOCK = 9  # of a numbered file: a transformer block
_NAME_WIDTH = 28  # of the names' column, at least
_LONGEST = 300


def inspect(path: Path) -> str:
    """Describe a LoRA file, one line a fact. Nothing in it can reach a terminal as a control character.

    Raises:
        WeightsError: it is damaged, not a LoRA, or of a kind that is not supported.
    """
    raw = read_raw(path)
    rows = {**_facts(raw), **_recipe(raw), **_norms(raw)}
    lines = [(one_line(name)[:60], one_line(value[:_LONGEST])) for name, value in rows.items()]
    width = max(_NAME_WIDTH, *(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}} {value}".rstrip() for name, value in lines)


def _facts(raw: RawLoRA) -> dict[str, str]:
    info = info_of(raw)
    networks = Counter(module.part for module in raw.modules)
    doras = sum(lora.magnitude is not None for lora in raw.modules.values())
    return {
        "file": f"{raw.path.name}, {raw.path.stat().st_size} bytes",
        "base model": info.base_model or "not said",
        "base family": _family(raw, info.base_model_version),
        "modules": ", ".join(f"{count} in {part}" for part, count in networks.items())
        + (f"; {doras} of them DoRA" if doras else ""),
        "rank": _counted(f"{lora.rank}" for lora in raw.modules.values()),
        "alpha": _counted(f"{lora.alpha:g}" for lora in raw.modules.values()),
        "dtype": _counted(str(lora.down.dtype).removeprefix("torch.") for lora in raw.modules.values()),
        "targets": ", ".join(info.targets) or "not said",
        "trigger": info.trigger or "none",
        "title": info.title or "none",
        "embeddings": ", ".join(f"{token} {list(v.shape)}" for token, v in raw.embeddings.items()) or "none",
        "steps": "not said" if info.steps is None else f"{info.steps}",
        **({"keys of no known meaning": some(raw.unknown)} if raw.unknown else {}),
    }


def _family(raw: RawLoRA, said: str) -> str:
    """What the weights are for, by their sizes; and what the header says, where that is not the same word."""
    family = family_name(raw.guess)
    return family if said in ("", "unknown", family) else f"{family}; its header says {said}"


def _counted(values: Iterable[str]) -> str:
    """The one value, or each with how many modules have it, the most frequent first."""
    counts = Counter(values).most_common()
    shown = ", ".join(value if len(counts) == 1 else f"{value} ({count} modules)" for value, count in counts[:6])
    return f"{shown}, ..." if len(counts) > 6 else shown


def _recipe(raw: RawLoRA) -> dict[str, str]:
    """How it was made: minisd's recipe, or what kohya's header has instead."""
    recipe = {f"  {name}": json.dumps(value) for name, value in info_of(raw).recipe.items()}
    if recipe:
        return {"recipe": "", **recipe}
    said = {
        f"  {name}": raw.metadata[name] for name in _KOHYAS if raw.metadata.get(name) not in (None, "", "None", "{}")
    }
    tags = _most_frequent_tags(raw.metadata.get("ss_tag_frequency", ""))
    said |= {"  tags": tags} if tags else {}
    return {"recipe (header of kohya's)": "", **said} if said else {"recipe": "not said"}


def _most_frequent_tags(text: str) -> str:
    """The ten most frequent of kohya's caption tags, {folder: {tag: count}}; "" if the field is not of that form."""
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(text).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return ""
    return ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(10))


def _norms(raw: RawLoRA) -> dict[str, str]:
    """The Frobenius norm of the change of each block's weights, taken together, and of how many modules."""
    blocks: dict[str, list[float]] = {}
    for module, lora in raw.modules.items():
        blocks.setdefault(_block_of(module), []).append(change_norm(lora))
    ordered = sorted(
        blocks, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )
    rows = {f"  {name}": f"{math.hypot(*blocks[name]):<10.4g} {len(blocks[name])} modules" for name in ordered}
    return {"norm of the change": "", **rows}


def _block_of(module: LoRAModule) -> str:
    """The block of a network that a module is in, in the file's own spelling of it."""
    if module.numbered and module.part == "unet":
        return f"unet transformer block {int(module.name) // _LAYERS_IN_BLOCK}"
    found = _BLOCK.search(module.name)
    if module.part != "unet":
        return module.part
    return "unet, outside the blocks" if found is None else found[0].replace("_blocks_", "_blocks.")
