"""From the name of a captioner to the folder of a BLIP model: one on this machine, or a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from minisd.errors import UsageError, WeightsError
from minisd.hub import Wanted, fetch_repository, is_repo_id, local_path
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES

WEIGHTS = "model.safetensors"
# A tokenizer is described in one of two ways, the preparation of pictures likewise.
TOKENIZER = ("tokenizer.json", "vocab.txt")
PICTURES = ("preprocessor_config.json", "processor_config.json")
_NEEDED = (("config.json",), (WEIGHTS,), TOKENIZER, PICTURES)
_PATTERNS = ("config.json", WEIGHTS, *TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", *PICTURES)
_EXPECTED = "A BLIP model has config.json, model.safetensors, a tokenizer and preprocessor_config.json"


def resolve_captioner(name: str, *, revision: str | None = None) -> Path:
    """Find the folder of a BLIP model, downloading it if it is nowhere on this machine.

    Args:
        name: a folder, or a Hub repository id "owner/name".
        revision: branch, tag or commit of a repository; None is its main branch.

    Returns:
        A folder in which every file of _NEEDED exists, not yet looked into.

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
                f"--caption-model {name[:200]!r}: no such folder, and not the id of a repository on the Hub "
                "(owner/name). Check the path."
            )
        wanted = Wanted(_PATTERNS, "config.json", _misfit, _check, lambda folder: [folder / WEIGHTS])
        return fetch_repository(name, revision, wanted)
    if revision is not None:
        raise UsageError(f"--caption-revision {revision}: only a Hub repository has revisions, not {name!r}.")
    _check(folder)
    return folder


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
    return f"not a BLIP model that can be read: {', '.join(missing)} missing. {_EXPECTED}." if missing else ""
