"""Downloads that go wrong halfway, and a cache that is not as it was left: each ends whole, or with a plain reason."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download
from safetensors.torch import load_file

from minisd.errors import MinisdError, NetworkError, WeightsError
from minisd.hub import commit_of, resolve_model
from minisd.weights import load_model
from tests.fake_hub import COMMIT, Failure, FakeHub, fake_hub
from tests.tiny import TinyModel, write_tiny_model

REPO = "someone/tiny-model"
ROOT = Path(__file__).parent.parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a client that does not wait before it tries again."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # a half of a file is more
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    waited = time.sleep
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: waited(min(seconds, 0.01)))
    return tmp_path / "cache"


def serve(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refusal(kind: type[MinisdError], call: Callable[[], object]) -> str:
    with pytest.raises(MinisdError) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert "hf_secret_token" not in str(error.value)
    return str(error.value)


def is_the_repository(folder: Path, repository: TinyModel) -> bool:
    names = [path.relative_to(repository.folder) for path in repository.folder.rglob("*") if path.is_file()]
    return all((folder / name).read_bytes() == (repository.folder / name).read_bytes() for name in names)


def half_files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.endswith(".incomplete")]


@pytest.mark.parametrize(("failure", "begins_again"), [("cut once", False), ("cut once, no ranges", True)])
def test_a_cut_download_goes_on(
    failure: str, begins_again: bool, repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub(repository.folder, REPO, failure) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO)
        assert is_the_repository(folder, repository)
        assert len(served.ranges) == 3  # one for each network, from where it was cut
        assert all(int(found.removeprefix("bytes=").rstrip("-")) >= 10_000 for found in served.ranges)
        assert served.requests.count(f"GET /{REPO}/resolve/{COMMIT}/{UNET}") == 2
    assert not half_files(cache)


@pytest.mark.parametrize(
    ("failure", "only", "fragment"),
    [
        ("cut", TEXT, "the download was cut again and again"),
        ("short", UNET, "the download was cut short; run the command again"),
        ("stall", UNET, "no answer in time (timeout)"),
        (403, UNET, "access refused (HTTP 403); log in with `hf auth login`"),
        ((403, "GatedRepo"), UNET, "gated (HTTP 403); accept its terms at"),
        ((404, "EntryNotFound"), UNET, "a file of it is gone (HTTP 404); run the command again"),
        (429, UNET, "too many requests (HTTP 429)"),
        (500, UNET, "the Hub failed (HTTP 500)"),
        (503, "/tree/", "the Hub failed (HTTP 503)"),
        ("html", "/tree/", "something other than the Hub answered"),
    ],
)
def test_a_download_that_fails_names_the_reason_and_leaves_no_half_file(
    failure: Failure,
    only: str,
    fragment: str,
    repository: TinyModel,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    with fake_hub(repository.folder, REPO, failure, only) as served:
        serve(served, monkeypatch)
        message = refusal(NetworkError, lambda: resolve_model(REPO))
        assert message.startswith(f"{REPO} cannot be fetched from {served.endpoint}: ")
        assert fragment in message
        assert not half_files(cache)
        assert not (cache / "models--someone--tiny-model" / "snapshots" / COMMIT / only).is_file()
        served.failure = None
        assert is_the_repository(resolve_model(REPO), repository)  # a second try succeeds, without help


def test_a_server_that_always_cuts_and_begins_anew_is_soon_given_up(
    repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself would fetch the same half again until Python's stack is full."""
    with fake_hub(repository.folder, REPO, "cut", TEXT) as served:
        serve(served, monkeypatch)
        assert "the download was cut again and again" in refusal(NetworkError, lambda: resolve_model(REPO))
        assert served.requests.count(f"GET /{REPO}/resolve/{COMMIT}/{TEXT}") == 12


def test_bytes_that_are_not_the_hubs_are_noticed_and_removed(
    repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub(repository.folder, REPO, "corrupt", UNET) as served:
        serve(served, monkeypatch)
        message = refusal(NetworkError, lambda: resolve_model(REPO))
        assert f"{UNET} is not what the Hub has (its sha256 differs)" in message
        snapshot = cache / "models--someone--tiny-model" / "snapshots" / COMMIT
        assert not os.path.lexists(snapshot / UNET)
        blobs = [path.read_bytes() for path in (snapshot.parent.parent / "blobs").iterdir()]
        assert not any(blob.endswith(b"\0\1\2\3") for blob in blobs)
        served.failure = None
        served.requests.clear()
        assert is_the_repository(resolve_model(REPO), repository)
        fetched = [request for request in served.requests if request.startswith("GET") and "/resolve/" in request]
        assert fetched == [f"GET /{REPO}/resolve/{COMMIT}/{UNET}"]


def test_a_truncated_file_in_the_cache_is_fetched_again(
    repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub(repository.folder, REPO) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO)
        os.truncate(folder / UNET, 1000)
        assert is_the_repository(resolve_model(REPO), repository)
        os.truncate(folder / UNET, 1000)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        message = refusal(NetworkError, lambda: resolve_model(REPO))
        assert "HF_HUB_OFFLINE is set, and not all of it is in the cache" in message


def test_a_file_that_is_damaged_on_the_hub_is_not_fetched_again_and_again(
    repository: TinyModel, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(repository.folder, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / UNET, 1000)
    with fake_hub(tmp_path / "damaged", REPO) as served:
        serve(served, monkeypatch)
        assert "truncated" in refusal(WeightsError, lambda: load_model(REPO))
        served.requests.clear()
        assert "truncated" in refusal(WeightsError, lambda: load_model(REPO))
        assert not served.requests


def test_a_cache_without_links(repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda _=None: False)
    with fake_hub(repository.folder, REPO) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO)
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        assert is_the_repository(folder, repository)
        served.requests.clear()
        assert resolve_model(REPO) == folder
        assert not served.requests


def test_a_warm_cache_is_only_read(repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it works on a disk that cannot be written."""

    def state() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in cache.rglob("*")}

    with fake_hub(repository.folder, REPO) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO)
    before = state()
    monkeypatch.setattr(socket, "socket", None)
    assert resolve_model(REPO) == folder
    load_model(REPO)
    assert state() == before


def test_a_full_disk_ends_in_its_own_error(repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))

    monkeypatch.setattr(file_download, "http_get", full)
    with fake_hub(repository.folder, REPO) as served:
        serve(served, monkeypatch)
        with pytest.raises(OSError, match="No space left"):
            resolve_model(REPO)
    assert not half_files(cache)


def run(endpoint: str, home: Path, *, print_model: str = "resolve_model(sys.argv[1])") -> subprocess.Popen[str]:
    code = (
        "import sys; from minisd.errors import run_script; from minisd.hub import resolve_model;"
        f"sys.exit(run_script(lambda: print({print_model}), debug=False))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command: list[Any] = [sys.executable, "-c", code, REPO]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_fetch_each_file_once(repository: TinyModel, tmp_path: Path) -> None:
    with fake_hub(repository.folder, REPO) as served:
        processes = [run(served.endpoint, tmp_path / "home") for _ in range(2)]
        folders = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        assert folders[0] == folders[1]
        assert is_the_repository(Path(folders[0]), repository)
        for name in repository.folder.rglob("*.safetensors"):
            path = name.relative_to(repository.folder).as_posix()
            assert served.requests.count(f"GET /{REPO}/resolve/{COMMIT}/{path}") == 1


def test_a_cache_that_cannot_be_written_is_the_disks_fault(repository: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache should be")
    with fake_hub(repository.folder, REPO) as served:
        process = run(served.endpoint, tmp_path / "home")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert errors.splitlines()[-1].startswith("minisd: error E-DISK: ")


def test_commit_of_a_repository(repository: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run can record it, and be repeated with --revision after the main branch has moved."""
    moved = "ab" * 20
    with fake_hub(repository.folder, REPO) as served:
        serve(served, monkeypatch)
        model = load_model(REPO)
        assert model.commit == commit_of(model.source) == COMMIT
        served.commit = moved
        assert load_model(REPO).commit == COMMIT  # what is in the cache stays what it was
        shutil.rmtree(cache)
        assert load_model(REPO).commit == moved
        message = refusal(NetworkError, lambda: resolve_model(REPO, revision=COMMIT))
        assert f"it has no revision '{COMMIT}'" in message
        served.commit = COMMIT
        assert load_model(REPO, revision=COMMIT).commit == COMMIT
        served.requests.clear()
        assert [load_model(REPO, revision=revision).commit for revision in (None, COMMIT)] == [moved, COMMIT]
        assert not served.requests
    assert load_model(str(repository.folder)).commit is None


def test_xl_is_fetched_with_its_second_text_encoder(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_tiny_model(tmp_path / "xl", family="sdxl")
    shutil.copytree(tmp_path / "xl", tmp_path / "refiner")
    shutil.rmtree(tmp_path / "refiner" / "text_encoder")
    with fake_hub(tmp_path / "xl", REPO) as served:
        serve(served, monkeypatch)
        model = load_model(REPO)
        assert model.is_xl
        assert is_the_repository(model.source, written)
        state = load_file(model.source / "text_encoder_2" / "model.safetensors")
        assert model.networks()["text_encoder_2"].state_dict().keys() == state.keys()
        # Another program has cached no more of it than the UNet and what belongs to SD 1.x.
        shutil.rmtree(model.source / "text_encoder_2")
        shutil.rmtree(model.source / "tokenizer_2")
        assert is_the_repository(resolve_model(REPO), written)
        shutil.rmtree(cache)
        served.folder = tmp_path / "refiner"
        message = refusal(WeightsError, lambda: resolve_model(REPO))
        assert (
            message == f"{REPO} on the Hub: the SDXL refiner is not supported. minisd reads Stable Diffusion 1.x, "
            "2.x and SDXL base."
        )
