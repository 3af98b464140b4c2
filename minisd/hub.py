"""From the name of a model to what holds it: "pocket", a folder in diffusers layout, a single file, a Hub repository.

The only file that knows the Hub. A folder, a file, or a repository in the cache is found without a single request.
Models of another kind (vision_files.py) are fetched with `fetch_repository`, too.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import tqdm, validate_repo_id

from minisd.errors import MinisdError, NetworkError, UsageError, WeightsError
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES, read_header, sha256_of
from minisd.model_folder import (
    LAYOUT,
    check_folder,
    explain,
    missing_files,
    networks_among,
    networks_in,
    weight_files,
    weight_names,
)

log = logging.getLogger(__name__)

_PROBE_SECONDS = 5.0
_MOST_RESTARTS = 10  # in the download of a model, all files together


class _NoProgressError(Exception):
    """A server cuts every answer, and begins anew instead of where the last one ended."""


class _Progress(tqdm):  # type: ignore[misc]
    """The library's progress bar, which also ends a download that gets nowhere.

    The library gives up after five tries without a new byte. Where a server ignores from where it is to go on, the same
    bytes count as new at each try, and it would fetch half of a file hundreds of times. Its bar then goes back.
    """

    restarts = 0

    def update(self, n: float | None = 1) -> bool | None:
        """As in tqdm. Raises _NoProgressError."""
        if n is not None and n < 0:
            self.restarts += 1
            if self.restarts > _MOST_RESTARTS:
                raise _NoProgressError
        return super().update(n)


@dataclass(frozen=True)
class Wanted:
    """Which files of a repository are wanted, and when they are all there."""

    patterns: Sequence[str]  # of their names
    landmark: str  # a file that every such repository has: where it is in the cache, the others are looked for
    misfit: Callable[[Collection[str]], str]  # why a repository with these files will not do; "" if it will
    check: Callable[[Path], None]  # raises WeightsError if something is missing in a folder
    weights: Callable[[Path], list[Path]]  # the safetensors files in a folder that `check` has passed


def resolve_model(model: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """Find the folder or file of a model, downloading it if it is nowhere on this machine.

    Args:
        model: "pocket", a folder in diffusers layout, a .safetensors file, or a Hub repository id "owner/name".
        revision: branch, tag or commit of a repository; None is its main branch.
        variant: load the files of this variant ("fp16": model.fp16.safetensors); None is the plain ones.

    Returns:
        A folder in which every file that a model needs exists, or a single file, not yet looked into.

    Raises:
        WeightsError: there is no such model, it is incomplete, or not in a layout that can be read.
        NetworkError: the Hub cannot be reached, or refuses.
        UsageError: a revision of something that is not a repository, a variant of a single file.
        OSError: the Hub's cache cannot be written.
    """
    pocket = Path(__file__).parent / "pocket" / "weights"
    path = pocket if model == "pocket" else local_path(model)
    if path is None:
        if not is_repo_id(model):
            raise WeightsError(
                f"model {model[:200]!r}: no such folder or file, and not the id of a repository on the Hub "
                "(owner/name) or 'pocket'. Check the path."
            )
        return fetch_repository(model, revision, _wanted_of_model(variant))
    if revision is not None:
        raise UsageError(f"--revision {revision}: only a Hub repository has revisions, not {model!r}.")
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise WeightsError(f"{model}: pickled weights. {CONVERT_HINT}.")
        if path.suffix != ".safetensors":
            raise WeightsError(f"{model}: a file, not a model. {LAYOUT}; a single file ends in .safetensors.")
        if variant is not None:
            raise UsageError(f"--variant {variant}: a single file has no variants. Leave it out.")
        return path
    check_folder(path, variant)
    return path


def commit_of(source: Path) -> str | None:
    """The commit of the repository that a folder in the Hub's cache is a snapshot of; None for any other place."""
    is_commit = source.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", source.name)
    return source.name if is_commit else None


def local_path(model: str) -> Path | None:
    """The file or folder of this name, or None."""
    if not model:
        return None  # not the current folder
    try:
        path = Path(model).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError):  # not there; a NUL in the name; no home folder
        return None
    return path


def is_repo_id(model: str) -> bool:
    """Whether a name has the form of a Hub repository that could hold a model, "owner/name"."""
    if model.count("/") != 1 or Path(model).suffix in (*PICKLE_SUFFIXES, ".safetensors"):
        return False
    try:
        validate_repo_id(model)
    except errors.HFValidationError:
        return False
    return True


def fetch_repository(repo: str, revision: str | None, wanted: Wanted) -> Path:
    """Take files of a repository from the cache if all are there, else download them.

    Returns:
        The folder of the cache that they are in.

    Raises:
        WeightsError: the repository is not what is wanted.
        NetworkError: the Hub cannot be reached, or refuses.
        OSError: the Hub's cache cannot be written.
    """
    cached = try_to_load_from_cache(repo, wanted.landmark, revision=revision)
    if isinstance(cached, str):
        folder = Path(cached).parents[wanted.landmark.count("/")]
        try:
            wanted.check(folder)
        except WeightsError:
            pass  # another program cached other files of it: fetch the rest
        else:
            if not _removed_damaged(wanted.weights(folder)):
                return folder
    fetch = ["hf", "download", repo, *(["--revision", revision] if revision else []), *wanted.patterns]
    with _hub_failures(repo, revision, shlex.join(fetch)):
        # Asked once and with a deadline, because snapshot_download repeats itself before it reports a dead network.
        info = HfApi().model_info(repo, revision=revision, timeout=_PROBE_SECONDS)
    misfit = wanted.misfit({sibling.rfilename for sibling in info.siblings or ()})
    if misfit:
        raise WeightsError(f"{repo} on the Hub: {misfit}")
    with _hub_failures(repo, revision, shlex.join(fetch)):
        patterns = list(wanted.patterns)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=_Progress))
    wanted.check(folder)
    for path in wanted.weights(folder):
        if _is_the_hubs(path) is False:  # the library compares the size only
            _remove_from_cache(path)
            raise NetworkError(
                f"{repo}: {path.relative_to(folder)} is not what the Hub has (its sha256 differs), so it was removed "
                "from the cache. Run the command again."
            )
    return folder


def _removed_damaged(weights: Sequence[Path]) -> bool:
    """Remove weight files from the cache that were damaged there; returns whether there were any."""
    found = False
    for path in weights:
        try:
            read_header(path)
        except WeightsError as error:
            if not _is_the_hubs(path):  # else it is no better there
                log.warning("fetching a damaged file of the cache again: %s", error)
                _remove_from_cache(path)
                found = True
    return found


def _is_the_hubs(path: Path) -> bool | None:
    """Whether a file of a snapshot has the content that the Hub said it has; None if the cache does not tell."""
    name = path.readlink().name if path.is_symlink() else ""
    return sha256_of(path) == name if re.fullmatch("[0-9a-f]{64}", name) else None  # so are large files named there


def _remove_from_cache(path: Path) -> None:
    """Remove a file of a snapshot: the link, and what it leads to."""
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)


def _wanted_of_model(variant: str | None) -> Wanted:
    """What is worth downloading of a model: no pickles, no EMA twin, no safety checker."""
    patterns = ["model_index.json", "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt"]
    # The second text encoder of an XL model has the files of the first.
    for part, folder in {"unet": "unet", "vae": "vae", "text_encoder": "text_encoder*"}.items():
        single, index = weight_names(part, variant)
        shards = single.replace(".safetensors", "-*.safetensors")
        patterns += [f"{folder}/{name}" for name in ("config.json", single, index, shards)]

    def misfit(names: Collection[str]) -> str:
        missing = missing_files(names, variant, networks_among(names))
        return explain(missing, names, variant) if missing else ""

    return Wanted(
        patterns,
        landmark="unet/config.json",
        misfit=misfit,
        check=lambda folder: check_folder(folder, variant),
        weights=lambda folder: [path for part in networks_in(folder) for path in weight_files(folder, part, variant)],
    )


@contextmanager
def _hub_failures(repo: str, revision: str | None, fetch: str) -> Iterator[None]:
    """Turn what the Hub library raises into a NetworkError; let a full disk, or a bug, pass."""
    try:
        yield
    except MinisdError:
        raise
    except Exception as error:
        reason = _reason(error, repo, revision, fetch)
        if reason is None:
            raise
        raise NetworkError(f"{repo} cannot be fetched from {constants.ENDPOINT}: {reason}.") from error


def _reason(error: BaseException, repo: str, revision: str | None, fetch: str) -> str | None:
    """Say why a request failed and what to do; None if it was not the network's fault.

    The library folds most causes into one "check your connection", so the chain of causes is searched. Its own texts
    are not quoted: they run over several lines.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    beforehand = f"to fetch it beforehand, where the Hub can be reached: {fetch}"
    for cause in chain:
        name = type(cause).__name__
        if isinstance(cause, errors.HfHubHTTPError):
            return _http_reason(cause, repo, revision, beforehand)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, and not all of it is in the cache; {beforehand}"
        if "SSL" in str(cause) or "CERTIFICATE" in str(cause):
            return f"the secure connection failed, as behind a proxy with its own certificate (TLS); {beforehand}"
        if isinstance(cause, TimeoutError) or "Timeout" in name:
            return f"no answer in time (timeout); {beforehand}"
        if isinstance(cause, _NoProgressError | RecursionError):  # it tries again by calling itself
            return f"the download was cut again and again; {beforehand}"
        if isinstance(cause, ConnectionError) or type(cause).__module__.startswith("httpx"):
            return f"no connection ({str(chain[-1])[:100]}); {beforehand}"
    if isinstance(error, OSError):
        # Without a number the library raised it: a download of the wrong length, for one.
        return f"the download was cut short; run the command again, or {beforehand}" if error.errno is None else None
    if isinstance(error, ValueError | KeyError | TypeError):
        return f"something other than the Hub answered, such as a proxy's login page; {beforehand}"
    return None


def _http_reason(error: errors.HfHubHTTPError, repo: str, revision: str | None, beforehand: str) -> str:
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return f"gated (HTTP {status}); accept its terms at {page}, then log in with `hf auth login`; {beforehand}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r} (HTTP {status}); check the revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one (HTTP {status}); check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"a file of it is gone (HTTP {status}); run the command again"
    if status in (401, 403):
        return f"access refused (HTTP {status}); log in with `hf auth login`; {beforehand}"
    if status == 429:
        return f"too many requests (HTTP {status}); wait some minutes; {beforehand}"
    return f"the Hub failed (HTTP {status}); try again later; {beforehand}"
