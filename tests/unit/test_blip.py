"""BLIP: equal to transformers on the same files, found on the Hub or in a folder, and refused where it is something
else.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, BlipProcessor

from minisd.errors import MinisdError, NetworkError, UsageError, WeightsError
from minisd.pocket import scenes
from minisd.prepare import blip
from minisd.prepare.blip import Captioner, load_captioner
from minisd.vision_files import BLIP, resolve_vision_model
from tests.fake_hub import COMMIT, Failure, FakeHub, fake_hub
from tests.tiny_blip import write_tiny_blip

REPO = "someone/tiny-blip"
resolve_captioner = partial(resolve_vision_model, BLIP)

EMBEDDINGS = "text_decoder.bert.embeddings.word_embeddings.weight"
DECODER = "text_decoder.cls.predictions.decoder.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-blip")
    write_tiny_blip(folder)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "blip"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Pictures of several sizes."""
    drawn = [scenes.draw(scenes.scene_at(index, 0), "8bit") for index in range(8)]
    return [image.resize((64 + 9 * index, 80 - 7 * index)) for index, image in enumerate(drawn)]


def load(folder: Path, **options: Any) -> Captioner:
    asked: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.2}
    return load_captioner(folder, **(asked | options))


def reference(folder: Path, images: list[Image.Image], **options: Any) -> list[str]:
    """What transformers says by itself."""
    network = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    asked = {"num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    ids = network.generate(**processor(images=images, return_tensors="pt"), **(asked | options))
    said: list[str] = processor.batch_decode(ids, skip_special_tokens=True)
    return said


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def refusal(kind: type[MinisdError], call: Callable[[], object]) -> str:
    with pytest.raises(MinisdError) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 1, "repetition_penalty": 1.0},
        {"num_beams": 3, "max_new_tokens": 20, "repetition_penalty": 1.5},
    ],
)
def test_descriptions_equal_those_of_transformers(
    options: dict[str, Any], tiny: Path, images: list[Image.Image]
) -> None:
    said = load(tiny, **options).describe(images)
    assert said == reference(tiny, images, **options)
    assert len(set(said)) > 4, "they do not depend on the picture"


def test_how_it_is_asked_shows(tiny: Path, images: list[Image.Image]) -> None:
    """Or the test above would not see a setting that is forgotten."""
    asked = reference(tiny, images)
    for options in ({"num_beams": 1}, {"max_new_tokens": 6}, {"repetition_penalty": 1.0}, {"no_repeat_ngram_size": 0}):
        assert reference(tiny, images, **options) != asked, options


def test_files_as_on_the_hub_and_as_transformers_writes_them_now(folder: Path, images: list[Image.Image]) -> None:
    said = load(folder).describe(images)
    newest = folder.with_name("newest")
    shutil.copytree(folder, newest)
    BlipProcessor.from_pretrained(folder).save_pretrained(newest)
    (newest / "preprocessor_config.json").unlink()
    assert load(newest).describe(images) == said
    # The published captioners have settings that say nothing, and a vocabulary beside the tokenizer.
    edit(folder / "preprocessor_config.json", do_pad=True, size_divisor=32)
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(tokens, key=tokens.get)) + "\n")
    (folder / "tokenizer.json").unlink()
    assert load(folder).describe(images) == reference(folder, images) == said


@pytest.mark.parametrize("stored", ["both", "decoder", "different", "old"])
def test_weights_that_are_shared_may_be_stored_once_or_twice(
    stored: str, folder: Path, images: list[Image.Image]
) -> None:
    weights = load_file(folder / "model.safetensors")
    assert DECODER not in weights
    weights[DECODER] = weights[EMBEDDINGS].clone()
    if stored == "decoder":
        del weights[EMBEDDINGS]
    elif stored == "different":
        weights[DECODER] = weights[DECODER].flip(0)
    elif stored == "old":  # with the positions, and the bias, too
        weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
        weights["text_decoder.cls.predictions.decoder.bias"] = weights["text_decoder.cls.predictions.bias"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).describe(images) == reference(folder, images)


def test_precision_is_that_of_the_device(
    tiny: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert blip._dtype_on(torch.device("cuda", 0)) is dtype
    assert blip._dtype_on(torch.device("cpu")) is torch.float32
    monkeypatch.setattr(blip, "_dtype_on", lambda _: torch.bfloat16)
    captioner = load(tiny)
    assert {parameter.dtype for parameter in captioner.network.parameters()} == {torch.bfloat16}
    assert all(captioner.describe(images[:2]))


def text(**changes: Any) -> Callable[[Path], None]:
    """Change the text_config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", text_config=config["text_config"] | changes)

    return change


def vision(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", vision_config=config["vision_config"] | changes)

    return change


def pictures(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "preprocessor_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda folder: edit(folder / "config.json", model_type="blip-2"), "a model of type 'blip-2'"),
        (
            lambda folder: edit(folder / "config.json", architectures=["BlipForQuestionAnswering"]),
            "only a BLIP captioner",
        ),
        (lambda folder: edit(folder / "config.json", text_config=[1]), "This model cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": NaN}'), "not valid JSON"),
        (
            text(num_hidden_layers=10**9),
            "text_config: num_hidden_layers=1000000000 is not a whole number from 1 to 128",
        ),
        (text(vocab_size=True), "vocab_size=True is not a whole number"),
        (text(layer_norm_eps="small"), "layer_norm_eps='small' is not a small number"),
        (text(hidden_act="relu"), "hidden_act='relu' is not supported"),
        (text(bos_token_id=45), "bos_token_id=45 is none of 45 tokens"),
        (text(num_attention_heads=5), "hidden_size=32 is not a multiple of 5 heads"),
        (text(sep_token_id=4), "They are of different models"),
        (text(vocab_size=50), "the weights do not fit config.json"),
        (vision(image_size=10**6), "vision_config: image_size=1000000 is not"),
        (vision(image_size=64), "pictures are made {'height': 32, 'width': 32}, config.json has 64 x 64"),
        (pictures(size={"height": 10**6, "width": 10**6}), "pictures are made {'height': 1000000"),
        (pictures(do_normalize=False), "do_normalize=False is not supported (only True is)"),
        (pictures(rescale_factor=1.0), "rescale_factor=1.0 is not supported"),
        (pictures(image_std=[0.0, 0.5, 0.5]), "image_std=(0.0, 0.5, 0.5) is not three numbers"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("[]"),
            "the preparation of pictures cannot be",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "not a BLIP model that can be read: tokenizer.json missing.",
        ),
        (weights(lambda tensors: tensors.popitem()), "1 missing: "),
        (weights(lambda tensors: tensors[EMBEDDINGS].fill_(torch.nan)), "has values that are NaN"),
        (weights(lambda tensors: tensors.update(x=torch.ones(1))), "1 unexpected: x"),
        (lambda folder: torch.save({}, folder / "model.safetensors"), "convert the model"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "only pytorch_model.bin is",
        ),
    ],
)
def test_what_is_no_blip_is_refused_in_one_line(damage: Callable[[Path], object], fragment: str, folder: Path) -> None:
    load(resolve_captioner(str(folder)))
    damage(folder)
    message = refusal(WeightsError, lambda: load(resolve_captioner(str(folder))))
    assert fragment in message
    assert str(folder) in message


def test_options_that_cannot_be_carried_out(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(UsageError, lambda: load(tiny, max_new_tokens=64))
    assert message == "--max-new-tokens 64: expected at most 63, which this model can write."
    assert all(load(tiny, max_new_tokens=63, num_beams=1).describe([Image.new("RGB", (9, 9))]))
    message = refusal(UsageError, lambda: resolve_captioner(str(tiny), revision="v1"))
    assert message.startswith("--caption-revision v1: only a Hub repository has revisions")
    monkeypatch.setattr(socket, "socket", None)
    for name in ("", "/absent/blip", "a/b/c", "owner/na me", "absent"):
        message = refusal(WeightsError, lambda name=name: resolve_captioner(name))
        assert message.startswith(f"--caption-model {name!r}: no such folder, and not the id of a repository")


# --- on the Hub ---
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "cache"


@pytest.fixture
def hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A repository with, beside the model, what the published captioners have."""
    for name in ("README.md", "pytorch_model.bin", "tf_model.h5", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    with fake_hub(folder, REPO) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield served


def test_a_repository_is_fetched_once_without_what_is_not_needed(hub: FakeHub, images: list[Image.Image]) -> None:
    found = resolve_captioner(REPO)
    assert found.name == COMMIT
    missing = {path.name for path in hub.folder.iterdir()} - {path.name for path in found.iterdir()}
    assert missing == {"README.md", "pytorch_model.bin", "tf_model.h5", "generation_config.json"}
    assert load(found).describe(images) == load(hub.folder).describe(images)
    hub.requests.clear()
    assert resolve_captioner(REPO) == resolve_captioner(REPO, revision=COMMIT) == found
    assert hub.requests == []


def test_a_model_that_is_partly_cached_or_damaged_there_is_fetched_again(hub: FakeHub) -> None:
    found = resolve_captioner(REPO)
    (found / "config.json").resolve().unlink()
    assert (resolve_captioner(REPO) / "config.json").is_file()
    (found / "model.safetensors").resolve().write_bytes(b"damaged")
    load(resolve_captioner(REPO))


@pytest.mark.parametrize(
    ("failure", "fragment"),
    [
        ((401, "GatedRepo"), "gated (HTTP 401)"),
        ((404, "RepoNotFound"), "no such repository, or a private one"),
        (503, "the Hub failed (HTTP 503)"),
        ("corrupt", "model.safetensors is not what the Hub has (its sha256 differs)"),
    ],
)
def test_failures_of_the_hub_are_told_as_for_a_model(failure: Failure, fragment: str, hub: FakeHub) -> None:
    hub.failure = failure
    message = refusal(NetworkError, lambda: resolve_captioner(REPO))
    assert message.startswith(f"{REPO}")
    assert fragment in message
    if failure in ((401, "GatedRepo"), 503):
        assert f"hf download {REPO} config.json model.safetensors tokenizer.json vocab.txt" in message


def test_a_repository_that_is_no_blip_is_refused_before_it_is_fetched(hub: FakeHub) -> None:
    message = refusal(NetworkError, lambda: resolve_captioner(REPO, revision="v9"))
    assert "it has no revision 'v9'" in message
    for gone, fragment in (
        ("model.safetensors", "only pytorch_model.bin is there"),
        ("config.json", "not a BLIP model"),
    ):
        hub.requests.clear()
        (hub.folder / gone).unlink()
        message = refusal(WeightsError, lambda: resolve_captioner(REPO))
        assert message.startswith(f"{REPO} on the Hub: ")
        assert fragment in message
        assert len(hub.requests) == 1
