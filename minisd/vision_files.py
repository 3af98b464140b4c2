"""From the name of a model that looks at pictures to its folder: one on this machine, or a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minisd.errors import UsageError, WeightsError
from minisd.hub import Wanted, fetch_repository, is_repo_id, local_path
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES

WEIGHTS = "model.safetensors"
_PICTURES = ("preprocessor_config.json", "processor_config.json")  # how pictures are prepared: either file says it
_OPTIONAL = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")


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
