"""From the name of a model to a folder that holds it: "pocket", a folder in diffusers layout, or a Hub repository.

The only file that knows the Hub. A folder, or a repository already in the cache, is found without a single request.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from minisd.errors import MinisdError, NetworkError, UsageError, WeightsError
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES
from minisd.model_folder import LAYOUT, STEMS, check_folder, explain, missing_files, weight_names

_PROBE_SECONDS = 5.0


def resolve_model(model: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """Find the folder of a model, downloading it if it is nowhere on this machine.

    Args:
        model: "pocket", a folder in diffusers layout, or a Hub repository id "owner/name".
        revision: branch, tag or commit of a repository; None is its main branch.
        variant: load the files of this variant ("fp16": model.fp16.safetensors); None is the plain ones.

    Returns:
        A folder in which every file that a model needs exists.

    Raises:
        WeightsError: there is no such model, it is incomplete, or not in a layout that can be read.
        NetworkError: the Hub cannot be reached, or refuses.
        UsageError: a revision of something that is not a repository.
    """
    pocket = Path(__file__).parent / "pocket" / "weights"
    path = pocket if model == "pocket" else _local_path(model)
    if path is None:
        if not _is_repo_id(model):
            raise WeightsError(f"model {model!r}: not a folder, a repo id, or 'pocket'.")
        return _from_hub(model, revision, variant)
    if revision is not None:
        raise UsageError(f"--revision {revision}: only a Hub repository has revisions, not {model!r}.")
    if path.is_file():
        raise WeightsError(f"{model}: {_not_a_folder(path)}")
    check_folder(path, variant)
    return path


def _local_path(model: str) -> Path | None:
    """The file or folder of this name, or None."""
    if not model:
        return None  # not the current folder
    try:
        path = Path(model).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError):  # not there; a NUL in the name; no home folder
        return None
    return path


def _is_repo_id(model: str) -> bool:
    """Whether a name has the form of a Hub repository that could hold a model, "owner/name"."""
    if model.count("/") != 1 or Path(model).suffix in (*PICKLE_SUFFIXES, ".safetensors"):
        return False
    try:
        validate_repo_id(model)
    except errors.HFValidationError:
        return False
    return True


def _not_a_folder(path: Path) -> str:
    """Say what to do with a single file given as a model."""
    if path.suffix == ".safetensors":
        return (
            "a single-file checkpoint cannot be read yet. Give a folder in diffusers layout, or a repo id that has "
            "one; if this is a LoRA, pass it with --lora."
        )
    if path.suffix in PICKLE_SUFFIXES:
        return f"pickled weights. {CONVERT_HINT}."
    return f"a file, not a model. {LAYOUT}."


def _from_hub(repo: str, revision: str | None, variant: str | None) -> Path:
    """Take a model from the cache if all of it is there, else download it."""
    cached = try_to_load_from_cache(repo, "unet/config.json", revision=revision)
    if isinstance(cached, str):
        folder = Path(cached).parent.parent
        try:
            check_folder(folder, variant)
        except WeightsError:
            pass  # another program cached other files of it: fetch the rest
        else:
            return folder
    fetch = ["hf", "download", repo, *(["--revision", revision] if revision else []), *_patterns(variant)]
    with _hub_failures(repo, revision, shlex.join(fetch)):
        # Asked once and with a deadline, because snapshot_download repeats itself before it reports a dead network.
        info = HfApi().model_info(repo, revision=revision, timeout=_PROBE_SECONDS)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    missing = missing_files(names, variant)
    if missing:
        raise WeightsError(f"{repo} on the Hub: {explain(missing, names, variant)}")
    with _hub_failures(repo, revision, shlex.join(fetch)):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_patterns(variant)))
    check_folder(folder, variant)
    return folder


def _patterns(variant: str | None) -> list[str]:
    """The files of a repository that are worth downloading: no pickles, no EMA twin, no safety checker."""
    patterns = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]
    for part in STEMS:
        single, index = weight_names(part, variant)
        shards = single.replace(".safetensors", "-*.safetensors")
        patterns += [f"{part}/{name}" for name in ("config.json", single, index, shards)]
    return patterns


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
            return f"no answer in {_PROBE_SECONDS:.0f} seconds (timeout); {beforehand}"
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
        return f"it has no revision {revision!r} (HTTP {status}); check --revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one (HTTP {status}); check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"a file of it is gone (HTTP {status}); run the command again"
    if status in (401, 403):
        return f"access refused (HTTP {status}); log in with `hf auth login`; {beforehand}"
    if status == 429:
        return f"too many requests (HTTP {status}); wait some minutes; {beforehand}"
    return f"the Hub failed (HTTP {status}); try again later; {beforehand}"
