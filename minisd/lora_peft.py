"""The alpha of each module as PEFT keeps it: a configuration with patterns, in the header or in adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

CONFIG_FIELD = "lora_adapter_metadata"  # the header field of diffusers

# Ways to start an adapter that also change the weights beside it: the file alone does not say how.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


class Size(NamedTuple):
    """Rank and alpha of a module."""

    rank: int
    alpha: float


def config_of(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """One network's part of a configuration that may hold several, as diffusers writes it into the header."""
    prefixed = any(name.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for name in config)
    if not prefixed:
        return config
    return {name.removeprefix(f"{part}."): value for name, value in config.items() if name.startswith(f"{part}.")}


def peft_alpha(config: Mapping[str, Any], module: str, rank: int, *, is_dora: bool) -> float:
    """The alpha of a module under a PEFT configuration.

    Args:
        config: of the network the module is in.
        module: its path.
        rank: its rank.
        is_dora: whether the file has a magnitude for it.

    Raises:
        ValueError: the configuration asks for something that is not supported, or is damaged.
    """
    others = {name for name, value in config.items() if name.startswith("use_") and value}
    others -= {"use_rslora", "use_dora"}
    if others:
        raise ValueError(f"PEFT's {min(others)} is not supported")
    started = str(config.get("init_lora_weights"))
    if started.lower().startswith(_CHANGES_BASE):
        raise ValueError(f"PEFT's init_lora_weights={started[:50]!r} is not supported: it changes the base model, too")
    if config.get("use_dora") and not is_dora:
        raise ValueError("PEFT's use_dora is set, and the file has no lora_magnitude_vector for it")
    alpha = config.get("lora_alpha")
    for pattern, value in _mapping(config.get("alpha_pattern")).items():
        if _matches(pattern, module):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"lora_alpha must be a number, got {str(alpha)[:100]!r}")
    # Rank-stabilised LoRA (arXiv:2312.03732) divides by sqrt(r) instead of r.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def peft_config(parts: Mapping[str, Mapping[str, Size]], *, dora: Mapping[str, bool]) -> str:
    """Write a configuration for several networks, as diffusers reads it from the header: ranks and alphas are exact.

    Args:
        parts: "unet", "text_encoder", "text_encoder_2" -> path of a module -> its size.
        dora: part -> whether its modules are DoRA, all of them.

    Returns:
        JSON.
    """
    config: dict[str, Any] = {}
    for part, sizes in parts.items():
        common = max(sizes.values(), key=list(sizes.values()).count)
        fields = {
            "peft_type": "LORA",
            "r": common.rank,
            "lora_alpha": common.alpha,
            # As regular expressions, which PEFT takes them for: a dot is any character, and no two paths differ in one.
            "rank_pattern": {path: size.rank for path, size in sizes.items() if size.rank != common.rank},
            "alpha_pattern": {path: size.alpha for path, size in sizes.items() if size.alpha != common.alpha},
            "target_modules": sorted(sizes),
            "use_dora": dora[part],
        }
        config |= {f"{part}.{name}": value for name, value in fields.items()}
    return json.dumps(config, sort_keys=True)


def _matches(pattern: str, module: str) -> bool:
    """As PEFT: the whole path or its end in whole components. Raises ValueError for a true regular expression."""
    # PEFT takes regular expressions here, of which programs only ever write plain names.
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix("text_model.")
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(f"alpha_pattern {pattern[:100]!r} is not a plain name, which is not supported")
    module = module.removeprefix("text_model.")
    return module == name if pattern.startswith("^") else f".{module}".endswith(f".{name}")


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError("alpha_pattern must be an object")
    return value or {}
