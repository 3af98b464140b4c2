"""From the name of a CLIP model to its folder: one on this machine, or a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from minisd.errors import WeightsError
from minisd.hub import Wanted, fetch_repository, is_repo_id, local_path
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES

WEIGHTS = "model.safetensors"
_NEEDED = (
    ("config.json",),
    (WEIGHTS,),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)
_PATTERNS = (*(name for either in _NEEDED for name in either), "merges.txt", "tokenizer_config.json",
             "special_tokens_map.json")  # fmt: skip
_EXPECTED = "A CLIP model has config.json, model.safetensors, a tokenizer and preprocessor_config.json"


def resolve_clip(name: str) -> Path:
    """Find the folder of a CLIP model, downloading it if it is nowhere on this machine.

    Args:
        name: a folder, or a Hub repository id "owner/name".

    Returns:
        A folder in which every file of _NEEDED exists, not yet looked into.

    Raises:
        WeightsError: there is no such model, or it is incomplete.
        NetworkError: the Hub cannot be reached, or refuses.
        OSError: the Hub's cache cannot be written.
    """
    folder = local_path(name)
    if folder is not None:
        _check(folder)
        return folder
    if not is_repo_id(name):
        raise WeightsError(
            f"--clip {name[:200]!r}: no such folder, and not the id of a repository on the Hub (owner/name). Check the "
            "path."
        )
    return fetch_repository(
        name, None, Wanted(_PATTERNS, "config.json", _misfit, _check, lambda folder: [folder / WEIGHTS])
    )


def _check(folder: Path) -> None:
    """Raise WeightsError if a file is missing."""
    # A link to nothing does not count.
    misfit = _misfit({path.name for path in folder.glob("*") if path.is_file()})
    if misfit:
        raise WeightsError(f"{folder}: {misfit}")


def _misfit(names: Collection[str]) -> str:
    """Why a model with these files cannot be loaded, and what to do; "" if it can."""
    missing = [either[0] for either in _NEEDED if not any(name in names for name in either)]
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES) and "/" not in name)
    if missing == [WEIGHTS] and pickles:
        return f"{WEIGHTS} missing, only {pickles[0]} is there. {CONVERT_HINT}."
    return f"not a CLIP model that can be read: {', '.join(missing)} missing. {_EXPECTED}." if missing else ""
