"""Read a network's configuration strictly from the Hub's JSON.

Ignoring an unknown field builds the wrong network without a word, so every field is either read into the dataclass,
known to be inert, required to have the one value the code is written for, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

MAX_LAYERS = 128  # in one block; the deepest published one has 10
MAX_SIZE = 1_000_000  # of anything that is a number of channels, heads or pixels


def known_fields(raw: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """Pick the constructor arguments of a config dataclass out of a Hub config.json.

    Args:
        raw: the parsed JSON object. An explicit null counts as absent.
        config_class: a dataclass; its field names are the JSON's, its annotations say what a value may be.

    Returns:
        Keyword arguments for config_class, JSON lists turned into tuples.

    Raises:
        ValueError: a field is of the wrong kind, not positive, or required and missing.
    """
    hints = get_type_hints(config_class)
    arguments = {}
    for field in fields(config_class):
        value = _as_tuple(raw.get(field.name))
        if value is not None:
            if not _fits(value, hints[field.name]):
                wanted = f"expected {field.type}, numbers above 0"
                raise ValueError(f"{field.name}={raw[field.name]!r} is not supported ({wanted})")
            arguments[field.name] = value
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    return arguments


def refuse_others(
    raw: Mapping[str, Any], config_class: type, fixed: Mapping[str, Any], inert: Collection[str] = ()
) -> None:
    """Raise ValueError naming the first field that asks for something the network does not do.

    Args:
        raw: the parsed JSON object. Keys that start with "_" are bookkeeping.
        config_class: the dataclass whose fields known_fields has read.
        fixed: field name -> the only value the code is written for. It may be absent, but not null: diffusers reads
            null as false or as none there (`mid_block_type: null` is a UNet without a middle).
        inert: fields that change nothing for us, whatever they say.
    """
    known = {field.name for field in fields(config_class)}
    for name, value in raw.items():
        if name.startswith("_") or name in known or name in inert:
            continue
        if name in fixed:
            only = fixed[name]
            # In Python True == 1, but `flip_sin_to_cos: 1` or `conv_in_kernel: true` is not a config anyone wrote.
            if _as_tuple(value) != only or isinstance(value, bool) != isinstance(only, bool):
                raise ValueError(f"{name}={value!r} is not supported (only {only!r} is)")
        # A newer diffusers writes its new switches as null or false. A zero may mean something: it is refused.
        elif value is not None and value is not False:
            raise ValueError(f"{name}={value!r} is not supported")


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise ValueError where a network would have so many layers that building it never ends."""
    for name, count in counts.items():
        if count > MAX_LAYERS:
            raise ValueError(f"{name}={count} is not supported (at most {MAX_LAYERS} are)")


def check_groups(block_out_channels: tuple[int, ...], norm_num_groups: int) -> None:
    """Raise ValueError where a GroupNorm could not split its channels."""
    for width in block_out_channels:
        if width % norm_num_groups:
            raise ValueError(f"norm_num_groups={norm_num_groups} does not divide {width} channels")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what the annotation says; a number is a size, a count or a scale, so positive."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and value != () and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and 0 < value < math.inf
    return type(value) is hint and (hint is not int or 0 < value <= MAX_SIZE)
