"""Publishing with the Hub's own client, against a Hub on the loopback: one commit, or one line and an exit code."""

from __future__ import annotations

import logging
import shlex
import socket
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file

from minisd import hub_upload
from minisd.errors import NetworkError, UsageError, run_script
from minisd.hub_upload import check_can_push
from minisd.lora_reader import read_lora_info
from minisd.publish import Publish, main, parse_options, publish
from tests.fake_hub import Failure, fake_hub, log_in, send_to
from tests.unit.test_model_card import REPO, write_run

TOKEN = "hf_secret_token"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty repository, and a client that is logged in."""
    log_in(TOKEN, tmp_path, monkeypatch)
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_is_what_can_be_fetched(
    run: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with fake_hub(hub, REPO, token=TOKEN) as served:
        send_to(served, monkeypatch)
        check_can_push(REPO, private=True, license_name="cc-by-4.0")
        assert publish(Publish(run=run, hub_model_id=REPO, private=True)) == f"{served.endpoint}/{REPO}"
        assert contents(hub) == contents(run / "hub")
        assert served.commits == [sorted(contents(run / "hub"))]  # one commit
        assert [repo.get("visibility") for repo in served.created] == ["private", "private"]

        publish(Publish(run=run, hub_model_id=REPO, license="cc-by-4.0"))
        assert b"license: cc-by-4.0" in contents(hub)["README.md"]
        assert served.created[-1].get("visibility") is None

        fetched = Path(hf_hub_download(REPO, "my-8bit_style.safetensors", revision=served.commit))
        assert load_file(fetched).keys() == load_file(run / "lora.safetensors").keys()
        assert read_lora_info(fetched).trigger == "8bit"
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in content for content in contents(run).values())


FAILURES: list[tuple[Failure, str, str]] = [
    (401, "", "the token is not valid (HTTP 401)"),
    (403, "/api/", "the token may not write there (HTTP 403)"),
    (403, "/commit/", "the token may not write there (HTTP 403)"),
    ((404, "RepoNotFound"), "/preupload/", "no such repository, or none that the token may see (HTTP 404)"),
    (409, "/commit/", "somebody else is changing it (HTTP 409)"),
    (413, "/large/", "the Hub refuses (HTTP 413)"),
    (429, "/commit/", "too many requests (HTTP 429)"),
    (500, "/large/", "the Hub failed (HTTP 500)"),
    (503, "/objects/batch", "the Hub failed (HTTP 503)"),
    ("cut", "/api/repos/create", "no connection, or one that was cut"),
    ("cut", "/large/", "no connection, or one that was cut"),
    ("cut", "/commit/", "no connection, or one that was cut"),
    ("html", "", "something other than the Hub answered"),
    ("slow", "/commit/", "no answer in time (timeout)"),
]


@pytest.mark.parametrize(("failure", "only", "fragment"), FAILURES)
def test_a_failure_is_one_line_and_says_how_to_publish_later(
    failure: Failure,
    only: str,
    fragment: str,
    run: Path,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hub_upload, "_SECONDS", 0.3 if failure == "slow" else 10.0)
    with fake_hub(hub, REPO, failure, only, token=TOKEN) as served:
        send_to(served, monkeypatch)
        options = Publish(run=run, hub_model_id=REPO, license="openrail++", private=True, lora=run / "lora.safetensors")
        assert run_script(partial(main, options), debug=False) == NetworkError.exit_code
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"minisd: error E-NETWORK: {REPO}: not published at {served.endpoint}: {fragment}")
        assert TOKEN not in said
        assert not served.commits
        command = said.partition("To publish it later: python -m minisd.publish ")[2]
        assert parse_options(shlex.split(command)) == options
        served.failure = None
        publish(parse_options(shlex.split(command)))
        assert contents(hub) == contents(run / "hub")


def test_a_run_learns_at_its_start_that_it_cannot_push(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(hub, REPO, token=TOKEN) as served:
        send_to(served, monkeypatch)
        with pytest.raises(UsageError, match="licence 'mine': the Hub does not know it"):
            check_can_push(REPO, private=False, license_name="mine")
        served.failure, served.only = 403, "/auth-check/write"
        with pytest.raises(NetworkError, match=r"may not write there .* leave --push-to-hub out"):
            check_can_push(REPO, private=False, license_name=None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
            check_can_push(REPO, private=False, license_name=None)
        served.requests.clear()
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(UsageError, match=r"you must be logged in. Run `hf auth login`"):
            check_can_push(REPO, private=False, license_name=None)
        for name in (
            "name",
            "a/b/c",
            "/a",
            "a/",
            "a b/c",
            "a/b--c",
            "a/..",
            "a/.b",
            "a/b.git",
            "a/" + 95 * "b",
            "a/\u00e9",
        ):
            with pytest.raises(UsageError, match="expected USER/NAME"):
                check_can_push(name, private=False, license_name=None)
        assert not served.requests


def test_what_the_library_for_large_files_says_is_understood(
    run: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet, which is not used here, for there is no server for it: it puts the status into words."""

    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("Network error: Request error: HTTP status client error (403 Forbidden), domain: there")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refused)
    with fake_hub(hub, REPO, token=TOKEN) as served:
        send_to(served, monkeypatch)
        with pytest.raises(NetworkError, match=r"the token may not write there \(HTTP 403\)"):
            publish(Publish(run=run, hub_model_id=REPO))


def test_no_connection_is_said_in_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(NetworkError, match="no connection, or one that was cut"):
            check_can_push(REPO, private=False, license_name=None)


def test_a_dry_run_asks_nobody(run: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(socket, "socket", None)
    publish(Publish(run=run, hub_model_id=REPO, dry_run=True))
    assert "README.md" in contents(run / "hub")
