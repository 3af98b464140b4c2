"""Names of models: pocket, folders, files, repositories; and a Hub that answers, fails, or is not there."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from minisd import hub
from minisd.errors import MinisdError, NetworkError, UsageError, WeightsError
from minisd.hub import resolve_model
from minisd.weights import load_model
from tests.fake_hub import COMMIT, FakeHub, fake_hub
from tests.tiny import TinyModel, write_tiny_model

REPO = "someone/tiny-model"
ROOT = Path(__file__).parent.parent.parent
NOT_NEEDED = (
    "README.md",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "v1-5-pruned.safetensors",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def repository(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a repository as on the Hub: the model, and much that it does not need."""
    folder = tmp_path_factory.mktemp("repository") / "files"
    shutil.copytree(tiny.folder, folder)
    for name in NOT_NEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be downloaded")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    return tmp_path / "cache"


def serve(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def refusal(kind: type[MinisdError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert "hf_secret_token" not in str(error.value)
    return str(error.value)


def test_pocket_is_the_folder_in_the_package(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    assert "not a model that can be read" in refusal(WeightsError, lambda: resolve_model("pocket"))
    shutil.copytree(tiny.folder, tmp_path / "pocket" / "weights")
    assert resolve_model("pocket") == tmp_path / "pocket" / "weights"


def test_folder(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny.folder)) == tiny.folder
    monkeypatch.setenv("HOME", str(tiny.folder.parent))
    assert resolve_model(f"~/{tiny.folder.name}") == tiny.folder
    # A folder that happens to have the form of a repository id is a folder.
    monkeypatch.chdir(tiny.folder.parent.parent)
    relative = f"{tiny.folder.parent.name}/{tiny.folder.name}"
    assert resolve_model(relative) == Path(relative)


@pytest.mark.parametrize(
    "name",
    [
        *("./absent", "../absent", "/absent/model", "~/absent", "~nobody-here/x"),
        *("", "absent", "a/b/c", "a\\b", "a\0b", "x" * 5000, "absent/model.safetensors", "absent/model.ckpt"),
        *("owner/na me", "owner/-name", "owner/name.git", "a--b/c"),
    ],
)
def test_no_such_model(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    message = refusal(WeightsError, lambda: resolve_model(name))
    assert message.startswith("model ")
    assert message.endswith(
        ": no such folder or file, and not the id of a repository on the Hub (owner/name) or 'pocket'. Check the path."
    )


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("model.ckpt", ["pickled weights", "convert the model"]),
        ("pytorch_model.bin", ["pickled weights", "convert the model"]),
        ("notes.txt", ["a file, not a model"]),
    ],
)
def test_single_file(name: str, fragments: list[str], tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    message = refusal(WeightsError, lambda: resolve_model(str(tmp_path / name)))
    for fragment in (name, *fragments):
        assert fragment in message


@pytest.mark.parametrize(
    ("removed", "fragment"),
    [
        ("unet/config.json", "not a model that can be read: unet/config.json missing. A model folder"),
        ("unet", "not a model that can be read: unet/config.json, unet/diffusion_pytorch_model.safetensors missing"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors missing."),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json missing"),
        ("tokenizer/vocab.json", "tokenizer/vocab.json missing"),
    ],
)
def test_incomplete_folder(tiny: TinyModel, tmp_path: Path, removed: str, fragment: str) -> None:
    shutil.copytree(tiny.folder, tmp_path / "model")
    path = tmp_path / "model" / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert fragment in refusal(WeightsError, lambda: resolve_model(str(tmp_path / "model")))
    if path.suffix == ".safetensors":
        torch.save({"a": torch.ones(1)}, path.with_suffix(".bin"))
        message = refusal(WeightsError, lambda: resolve_model(str(tmp_path / "model")))
        assert "only vae/diffusion_pytorch_model.bin is there. Pickled weights can run code" in message


def test_revision_of_a_folder(tiny: TinyModel) -> None:
    message = refusal(UsageError, lambda: resolve_model(str(tiny.folder), revision="main"))
    assert "only a Hub repository has revisions" in message


def test_download_of_what_is_needed(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(repository, REPO) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO)
        assert folder == cache / "models--someone--tiny-model" / "snapshots" / COMMIT
        assert not any((folder / name).exists() for name in NOT_NEEDED)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        everything = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
        assert names == everything - set(NOT_NEEDED)
        load_model(str(folder))

        served.requests.clear()
        assert resolve_model(REPO) == resolve_model(REPO, revision=COMMIT) == folder
        assert served.requests == []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_model(REPO) == folder
        message = refusal(NetworkError, lambda: resolve_model(REPO, variant="fp16"))
        assert "HF_HUB_OFFLINE is set, and not all of it is in the cache" in message
        assert served.requests == []


def test_download_of_a_variant_and_of_shards(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "files"
    write_tiny_model(files)
    write_tiny_model(tmp_path / "fp16", variant="fp16", max_shard_size="500KB")
    shutil.copytree(tmp_path / "fp16", files, dirs_exist_ok=True)  # save_pretrained would delete the other form
    with fake_hub(files, REPO) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO, variant="fp16")
        load_model(str(folder), variant="fp16")
        assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
        resolve_model(REPO)  # the plain files of a model that is partly there
        load_model(str(folder))


def test_partly_cached(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(repository, REPO) as served:
        serve(served, monkeypatch)
        folder = resolve_model(REPO)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.resolve().unlink()  # the link remains, to nothing
        resolve_model(REPO)
        assert weights.is_file()


@pytest.mark.parametrize(
    ("failure", "fragment"),
    [
        ((401, "GatedRepo"), "gated (HTTP 401); accept its terms at"),
        ((403, "GatedRepo"), "gated (HTTP 403)"),
        ((401, "RepoNotFound"), "no such repository, or a private one (HTTP 401)"),
        ((404, "RepoNotFound"), "no such repository, or a private one (HTTP 404); check the name"),
        ((404, "RevisionNotFound"), "it has no revision None (HTTP 404)"),
        (403, "access refused (HTTP 403); log in with `hf auth login`"),
        (429, "too many requests (HTTP 429)"),
        (500, "the Hub failed (HTTP 500)"),
        (503, "the Hub failed (HTTP 503)"),
        ("html", "something other than the Hub answered"),
        ("slow", "no answer in"),
    ],
)
def test_failures(
    failure: int | tuple[int, str] | str, fragment: str, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.3)
    with fake_hub(repository, REPO, failure) as served:
        serve(served, monkeypatch)
        started = time.monotonic()
        message = refusal(NetworkError, lambda: resolve_model(REPO))
        assert time.monotonic() - started < 8
        assert message.startswith(f"{REPO} cannot be fetched from {served.endpoint}: ")
        assert fragment in message
        assert len(served.requests) == 1
        if "no such repository" in message or "no revision" in message:
            assert "hf download" not in message
        else:
            assert f"hf download {REPO} model_index.json" in message


def test_no_such_revision(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(repository, REPO) as served:
        serve(served, monkeypatch)
        message = refusal(NetworkError, lambda: resolve_model(REPO, revision="fp16"))
        assert "it has no revision 'fp16' (HTTP 404); check the revision" in message


def test_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(NetworkError, lambda: resolve_model(REPO))
    assert "HF_HUB_OFFLINE is set, and not all of it is in the cache; to fetch it beforehand" in message
    assert f"hf download {REPO} model_index.json" in message


def test_no_connection(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    message = refusal(NetworkError, lambda: resolve_model(REPO, revision="v1"))
    assert "no connection ([Errno 111] Connection refused); to fetch it beforehand" in message
    assert f"hf download {REPO} --revision v1 " in message
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert "no connection ([Errno" in refusal(NetworkError, lambda: resolve_model(REPO))


def test_tls_failure(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(repository, REPO) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint.replace("http:", "https:"))
        assert "(TLS)" in refusal(NetworkError, lambda: resolve_model(REPO))


def test_cut_download(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None, raising=False)
    with fake_hub(repository, REPO, "cut") as served:
        serve(served, monkeypatch)
        message = refusal(NetworkError, lambda: resolve_model(REPO))
        assert "hf download" in message
        served.failure = None
        load_model(str(resolve_model(REPO)))


def test_full_disk_is_not_the_networks_fault(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))

    with fake_hub(repository, REPO) as served:
        serve(served, monkeypatch)
        monkeypatch.setattr(hub, "snapshot_download", full)
        with pytest.raises(OSError, match="No space left"):
            resolve_model(REPO)


@pytest.mark.parametrize(
    ("present", "fragment"),
    [
        ("lora.safetensors", "not a model that can be read: unet/config.json, vae/config.json"),
        ("unet/diffusion_pytorch_model.bin", "only unet/diffusion_pytorch_model.bin is there. Pickled weights"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "fp16.safetensors is there: choose it with --variant"),
    ],
)
def test_repository_that_is_no_model(
    present: str, fragment: str, tiny: TinyModel, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "files"
    if present.startswith("unet"):
        shutil.copytree(tiny.folder, files)
        (files / "unet" / "diffusion_pytorch_model.safetensors").rename(files / present)
    else:
        files.mkdir()
        (files / present).write_bytes(b"x")
    with fake_hub(files, REPO) as served:
        serve(served, monkeypatch)
        message = refusal(WeightsError, lambda: resolve_model(REPO))
        assert message.startswith(f"{REPO} on the Hub: ")
        assert fragment in message
        assert len(served.requests) == 1  # refused before anything is downloaded


def script(name: str) -> list[str]:
    code = (
        "import sys; from minisd.errors import run_script; from minisd.hub import resolve_model;"
        "sys.exit(run_script(lambda: print(resolve_model(sys.argv[1])), debug=False))"
    )
    return [sys.executable, "-c", code, name]


def test_through_the_environment(repository: Path, tmp_path: Path) -> None:
    """As a user meets it: an unreachable Hub, then the command that the message names elsewhere, then offline."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_XET": "1"}
    base = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    base |= {"HF_HOME": str(tmp_path / "home"), **quiet}
    dead = base | {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    result = subprocess.run(script(REPO), cwd=ROOT, env=dead, capture_output=True, text=True)
    assert result.returncode == 5
    assert result.stderr.startswith("minisd: error E-NETWORK: ")
    assert result.stderr.count("\n") == 1
    command = shlex.split(result.stderr.partition("the Hub can be reached: ")[2].rstrip(".\n"))
    assert command[0] == "hf"
    with fake_hub(repository, REPO) as served:
        hf = [sys.executable, "-m", "huggingface_hub.cli.hf", *command[1:]]
        environment = base | {"HF_ENDPOINT": served.endpoint}
        subprocess.run(hf, cwd=ROOT, env=environment, capture_output=True, check=True)
        assert not any("safety_checker" in request for request in served.requests)
    result = subprocess.run(script(REPO), cwd=ROOT, env=dead | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.strip().endswith(COMMIT)
