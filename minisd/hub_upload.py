"""A LoRA on its way to the Hugging Face Hub: what is made sure of before a run, and the one commit that publishes.

The token comes from the library's own places (`hf auth login`, HF_TOKEN) and from nowhere else: it is no option of
ours, and in no file and no message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, constants, errors, get_token
from huggingface_hub.utils import get_session

from minisd.config import check_hub_model_id
from minisd.errors import MinisdError, NetworkError, UsageError

_SECONDS = 120.0  # of silence, after which a connection is given up; the library itself would wait for ever
_STATUS_IN_TEXT = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")  # the library hf_xet's way to say it
_LATER = "To train now and publish later, leave --push-to-hub out, and then run: python -m minisd.publish"


def check_can_push(repo: str, *, private: bool, license_name: str | None) -> None:
    """Make sure of all that publishing needs, so that no run learns after hours that it cannot push.

    There is a token, it is valid and may write to the repository, and the Hub knows the licence. The repository is made
    if it is not there: only so is it known that it can be.

    Args:
        repo: USER/NAME.
        private: a repository that is made is seen by its owner alone.
        license_name: as the Hub spells it; None if there is none to check.

    Raises:
        UsageError: no token, a malformed name, an unknown licence.
        NetworkError: the Hub cannot be reached, or refuses.
    """
    check_hub_model_id(repo)
    _check_token(repo)
    with _hub_failures(repo, _LATER):
        api = HfApi()
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        api.auth_check(repo, write=True)
        if license_name is not None:
            _check_license(license_name)


def upload(repo: str, folder: Path, names: Sequence[str], *, private: bool, message: str) -> str:
    """Put files into the repository in one commit, making the repository if it is not there.

    Args:
        repo: USER/NAME.
        folder: where the files are.
        names: of the files, relative to `folder` and to the repository.
        private: a repository that is made is seen by its owner alone.
        message: of the commit.

    Returns:
        The address of the repository's page.

    Raises:
        UsageError: there is no token.
        NetworkError: the Hub cannot be reached, or refuses. No file in the repository has changed then.
    """
    _check_token(repo)
    with _hub_failures(repo):
        api = HfApi()
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        api.create_commit(repo, additions, commit_message=message)
    return f"{constants.ENDPOINT}/{repo}"


def _check_token(repo: str) -> None:
    """Refuse to go on without a token. Raises UsageError."""
    if get_token() is None:
        raise UsageError(
            f"{repo}: to publish on the Hub you must be logged in. Run `hf auth login`, or set HF_TOKEN, with a token "
            "that may write."
        )


def _check_license(name: str) -> None:
    """Ask the Hub whether it knows a licence. Raises UsageError if not."""
    card = ModelCard(f"---\n{ModelCardData(license=name).to_yaml()}\n---\n")
    try:
        card.validate()
    except ValueError as error:  # so the library reports an answer of status 400
        if type(error) is not ValueError:
            raise
        known = "https://huggingface.co/docs/hub/repositories-licenses"
        raise UsageError(f"licence {name!r}: the Hub does not know it. Choose one of {known}, or none.") from error


@contextmanager
def _hub_failures(repo: str, advice: str = "") -> Iterator[None]:
    """Turn what the Hub library raises into a NetworkError; let a full disk, or a bug, pass."""
    session = get_session()
    patience, session.timeout = session.timeout, _SECONDS
    try:
        yield
    except MinisdError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise NetworkError(f"{repo}: not published at {constants.ENDPOINT}: {reason}. {advice}".rstrip()) from error
    finally:
        session.timeout = patience


def _reason(error: BaseException) -> str | None:
    """Say why a request failed and what to do; None if it was not the network's fault.

    The library wraps a failure in others, so the chain of causes is searched. Its texts run over several lines, and are
    not quoted.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, errors.HfHubHTTPError):
            return _http_reason(cause.response.status_code, cause.server_message or "")
        if found := _STATUS_IN_TEXT.search(str(cause)):
            return _http_reason(int(found[1]), "")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it"
        if "SSL" in str(cause) or "CERTIFICATE" in str(cause):
            return "the secure connection failed, as behind a proxy with its own certificate (TLS)"
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return "no answer in time (timeout); try again later"
        if isinstance(cause, ConnectionError) or type(cause).__module__.startswith("httpx"):
            return "no connection, or one that was cut; try again where the Hub can be reached"
        if isinstance(cause, ValueError) and "Invalid metadata in README.md" in str(cause):
            return f"the Hub refuses the model card: {' '.join(str(cause).split())[:300]}"
    if isinstance(error, OSError) and error.errno is not None:
        return None
    if isinstance(error, ValueError | KeyError | TypeError):
        return "something other than the Hub answered, such as a proxy's login page"
    # Of the library for large files, hf_xet, whose own kinds of failure are not public.
    from_xet = isinstance(error, RuntimeError) or type(error).__module__.startswith("hf_xet")
    return "the upload broke off; try again later, or with HF_HUB_DISABLE_XET=1" if from_xet else None


def _http_reason(status: int, server_message: str) -> str:
    if status == 401:
        return "the token is not valid (HTTP 401); run `hf auth login`, and see that HF_TOKEN has no old one"
    if status == 403:
        return (
            "the token may not write there (HTTP 403); take one with the right to write, and a repository of your own "
            "or of an organisation that you belong to"
        )
    if status == 404:
        return "no such repository, or none that the token may see (HTTP 404); check the name"
    if status in (409, 412):
        return f"somebody else is changing it (HTTP {status}); run the command again"
    if status == 429:
        return f"too many requests (HTTP {status}); wait some minutes"
    if status < 500:
        said = " ".join(server_message.split())[:300]
        return f"the Hub refuses (HTTP {status}{f': {said}' if said else ''})"
    return f"the Hub failed (HTTP {status}); try again later"
