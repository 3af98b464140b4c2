"""From the name of a model that looks at pictures to its folder: one on this machine, or a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minisd.errors import UsageError, WeightsError
from minisd.hub import Wanted, fetch_repository, is_repo_id, local_path
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES

WEIGHTS = "model.safetensors"
_PICTURES = ("preprocessor_config.json", "processor_config.json")  # how pictures are prepared: either file says it
_OPTIONAL = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# The numbers of config.json that shape the network, and what bounds them: a billion layers, say, would be built for
# ever before any weight is missed.
WIDEST = 16_384
_SIZES = {
    "hidden_size": WIDEST,
    "intermediate_size": 65_536,
    "num_hidden_layers": 128,
    "num_attention_heads": 256,
}
TEXT_SIZES = _SIZES | {"vocab_size": 1_000_000, "max_position_embeddings": 4_096}
VISION_SIZES = _SIZES | {"image_size": 2_048, "patch_size": 256}


@dataclass(frozen=True)
class VisionModel:
    """A kind of model, in the files that transformers writes.

    Attributes:
        name: of the kind.
        option: where a user names such a model.
        tokenizer: the files of which either is a tokenizer.
    """

    name: str
    option: str
    tokenizer: tuple[str, str]

    @property
    def needed(self) -> list[tuple[str, ...]]:
        """What a folder must have: of each entry one file."""
        return [("config.json",), (WEIGHTS,), self.tokenizer, _PICTURES]


BLIP = VisionModel("BLIP", "--caption-model", ("tokenizer.json", "vocab.txt"))
CLIP = VisionModel("CLIP", "--clip", ("tokenizer.json", "vocab.json"))


def resolve_vision_model(kind: VisionModel, name: str, *, revision: str | None = None) -> Path:
    """Find the folder of a model, downloading it if it is nowhere on this machine.

    Args:
        kind: BLIP or CLIP.
        name: a folder, or a Hub repository id "owner/name".
        revision: branch, tag or commit of a repository; None is its main branch.

    Returns:
        A folder in which every file of kind.needed exists, not yet looked into.

    Raises:
        WeightsError: there is no such model, or it is incomplete.
        NetworkError: the Hub cannot be reached, or refuses.
        UsageError: a revision of something that is not a repository.
        OSError: the Hub's cache cannot be written.
    """
    folder = local_path(name)
    if folder is None:
        if not is_repo_id(name):
            raise WeightsError(
                f"{kind.option} {name[:200]!r}: no such folder, and not the id of a repository on the Hub "
                "(owner/name). Check the path."
            )
        patterns = [*(file for either in kind.needed for file in either), *_OPTIONAL]
        wanted = Wanted(
            patterns, "config.json", partial(_misfit, kind), partial(_check, kind), lambda folder: [folder / WEIGHTS]
        )
        return fetch_repository(name, revision, wanted)
    if revision is not None:  # which only captioners have an option for
        raise UsageError(f"--caption-revision {revision}: only a Hub repository has revisions, not {name!r}.")
    _check(kind, folder)
    return folder


def checked_section(
    section: str, values: Mapping[str, Any], sizes: Mapping[str, int], activations: Sequence[str]
) -> dict[str, Any]:
    """The fields of config.json that shape one of a model's two networks, those that are given; null counts as absent.

    Args:
        section: its name, such as "text_config".
        values: its content.
        sizes: TEXT_SIZES or VISION_SIZES.
        activations: those that can be had.

    Raises:
        ValueError: a field is of the wrong type or too large.
    """
    given = {name: values[name] for name in (*sizes, "layer_norm_eps", "hidden_act") if values.get(name) is not None}
    for name, most in sizes.items():
        if name in given and (type(given[name]) is not int or not 1 <= given[name] <= most):
            raise ValueError(f"{section}: {name}={given[name]!r} is not a whole number from 1 to {most}")
    eps = given.get("layer_norm_eps", 1e-5)
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"{section}: layer_norm_eps={eps!r} is not a small number")
    if "hidden_act" in given and given["hidden_act"] not in activations:
        kinds = f"only {' and '.join(map(repr, activations))} {'is' if len(activations) == 1 else 'are'}"
        raise ValueError(f"{section}: hidden_act={given['hidden_act']!r} is not supported ({kinds})")
    return given


def _check(kind: VisionModel, folder: Path) -> None:
    """Raise WeightsError if a file is missing."""
    # A link to nothing does not count.
    misfit = _misfit(kind, {path.name for path in folder.glob("*") if path.is_file()})
    if misfit:
        raise WeightsError(f"{folder}: {misfit}")


def _misfit(kind: VisionModel, names: Collection[str]) -> str:
    """Why a model with these files cannot be loaded, and what to do; "" if it can."""
    missing = [either[0] for either in kind.needed if not any(name in names for name in either)]
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES) and "/" not in name)
    if missing == [WEIGHTS] and pickles:
        return f"{WEIGHTS} missing, only {pickles[0]} is there. {CONVERT_HINT}."
    expected = f"A {kind.name} model has config.json, {WEIGHTS}, a tokenizer and preprocessor_config.json"
    return f"not a {kind.name} model that can be read: {', '.join(missing)} missing. {expected}." if missing else ""
