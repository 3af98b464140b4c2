"""CLIP as a judge: equal to transformers on the same files, and refused where it is something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from minisd.errors import MinisdError, NetworkError, WeightsError
from minisd.evaluate.clip_judge import ClipJudge
from minisd.evaluate.clip_model import load_clip
from minisd.pocket import scenes
from minisd.vision_files import CLIP, resolve_vision_model
from tests.fake_hub import fake_hub
from tests.tiny_clip import write_tiny_clip

resolve_clip = partial(resolve_vision_model, CLIP)

TEXTS = ["the cat", "a city and the cat " * 40, "", "it"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-clip")
    write_tiny_clip(folder)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "clip"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Pictures of several shapes, more than are embedded at a time."""
    drawn = [scenes.draw(scenes.scene_at(index, 0), "8bit") for index in range(18)]
    return [image.resize((40 + 9 * index, 120 - 3 * index)) for index, image in enumerate(drawn)]


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_section(path: Path, section: str, **changes: Any) -> None:
    edit(path, **{section: json.loads(path.read_text())[section] | changes})


def reference(folder: Path, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers makes of pictures and texts by itself."""
    network = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=images, text=TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        output = network(**inputs)
    return output.image_embeds, output.text_embeds


def refusal(call: Callable[[], object], kind: type[MinisdError] = WeightsError) -> str:
    with pytest.raises(MinisdError) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings_equal_those_of_transformers(activation: str, images: list[Image.Image], tmp_path: Path) -> None:
    write_tiny_clip(tmp_path, activation=activation)
    ours = load_clip(resolve_clip(str(tmp_path)))
    pictures, texts = reference(tmp_path, images)
    torch.testing.assert_close(ours.embed_pictures(images), pictures, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.embed_texts(TEXTS), texts, atol=1e-6, rtol=0)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01, "they do not depend on the picture"
    assert (texts[0] - texts[3]).abs().max() > 0.01


def test_files_as_on_the_hub_in_their_older_forms(folder: Path, images: list[Image.Image]) -> None:
    """With the positions among the weights, sections twice, and the token that ends a text as it is."""
    pictures, texts = reference(folder, images)
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    weights["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    edit_section(
        folder / "config.json", "text_config", eos_token_id=len(json.loads((folder / "vocab.json").read_text())) - 1
    )
    edit(folder / "config.json", vision_config={"hidden_act": "gelu"}, vision_config_dict=config["vision_config"])
    ours = load_clip(folder)
    torch.testing.assert_close(ours.embed_pictures(images), pictures, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.embed_texts(TEXTS), texts, atol=1e-6, rtol=0)


def test_the_judge_measures_by_cosines(tiny: Path, images: list[Image.Image]) -> None:
    judge = ClipJudge(load_clip(tiny), "someone/clip", images[:5])
    pictures, texts = reference(tiny, images)
    torch.testing.assert_close(judge.training_features, pictures[:5], atol=1e-6, rtol=0)
    assert judge.agreement(images[:4], TEXTS) == pytest.approx((pictures[:4] * texts).sum(1).tolist(), abs=1e-5)
    mean = pictures[:5].mean(0)
    assert judge.nearness(images[5:7]) == pytest.approx((pictures[5:7] @ mean / mean.norm()).tolist(), abs=1e-5)
    assert judge.name == "CLIP someone/clip"
    assert f"{(pictures[:5] @ mean / mean.norm()).mean():.3f}" in judge.style_title


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model_type": "clip_text_model"}, "model_type='clip_text_model' is not supported"),
        ({"projection_dim": 0}, "projection_dim=0 is not a whole number"),
        ({"projection_dim": 30}, "of another shape"),
    ],
)
def test_another_config_is_refused(change: dict[str, Any], fragment: str, folder: Path) -> None:
    edit(folder / "config.json", **change)
    assert fragment in refusal(lambda: load_clip(folder))


@pytest.mark.parametrize(
    ("section", "change", "fragment"),
    [
        (
            "text_config",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers=1000000000 is not a whole number from 1 to 128",
        ),
        ("text_config", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("text_config", {"vocab_size": 40}, "They are of different models"),
        ("vision_config", {"num_attention_heads": 5}, "hidden_size=24 is not a multiple of 5 heads"),
        ("vision_config", {"layer_norm_eps": "small"}, "layer_norm_eps='small' is not a small number"),
        ("vision_config", {"image_size": 64}, "config.json has 64 x 64"),
        ("vision_config", {"num_hidden_layers": 3}, "16 missing"),
    ],
)
def test_another_shape_is_refused(section: str, change: dict[str, Any], fragment: str, folder: Path) -> None:
    edit_section(folder / "config.json", section, **change)
    assert fragment in refusal(lambda: load_clip(folder))


def test_another_preparation_of_pictures_is_refused(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", do_center_crop=False)
    assert "do_center_crop=False is not supported" in refusal(lambda: load_clip(folder))
    (folder / "preprocessor_config.json").write_text("{")
    assert "the preparation of pictures cannot be loaded" in refusal(lambda: load_clip(folder))


def test_a_damaged_weight_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "NaN" in refusal(lambda: load_clip(folder))


def test_a_folder_that_is_no_clip_is_refused(folder: Path) -> None:
    assert "no such folder" in refusal(lambda: resolve_clip("nowhere at all"))
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    assert "only pytorch_model.bin is there" in refusal(lambda: resolve_clip(str(folder)))
    (folder / "config.json").unlink()
    assert "not a CLIP model that can be read: config.json, model.safetensors" in refusal(
        lambda: resolve_clip(str(folder))
    )


def test_a_repository_is_fetched_once_without_what_is_not_needed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("README.md", "pytorch_model.bin", "flax_model.msgpack"):
        (folder / name).write_text("{}")
    with fake_hub(folder, "someone/clip") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        found = resolve_clip("someone/clip")
        missing = {path.name for path in folder.iterdir()} - {path.name for path in found.iterdir()}
        assert missing == {"README.md", "pytorch_model.bin", "flax_model.msgpack"}
        assert (load_clip(found).embed_texts(TEXTS) == load_clip(folder).embed_texts(TEXTS)).all()
        hub.requests.clear()
        assert resolve_clip("someone/clip") == found
        assert hub.requests == []
        hub.failure = 503
        message = refusal(lambda: resolve_clip("someone/other"), NetworkError)
        assert "hf download someone/other config.json model.safetensors tokenizer.json vocab.json" in message
