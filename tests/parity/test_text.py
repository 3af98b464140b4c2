"""The text encoder against transformers' own loading and diffusers' use of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from minisd.clip import clip_keys, clip_on_meta
from minisd.errors import WeightsError
from minisd.weights import load_text_encoder, weights_id
from tests.tiny import TinyModel, vocabulary, write_json, write_tiny_model

PROMPTS = [
    "",
    "the cat",
    "The CITY  and\tit!! 8bit",  # "!" is the pad token of SD 2.x
    "caf\u00e9 \u4e2d\u6587 \U0001f408 don't",
    "cat " * 100,
    "the " * 75,
    "the " * 76,
]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp(request.param), family=request.param)


@pytest.fixture
def folder(model: TinyModel, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(model.folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equal_to_diffusers(model: TinyModel, dtype: torch.dtype, tolerance: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None, dtype=dtype)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    text_encoder = load_text_encoder(model.folder, dtype=dtype)
    embeddings = text_encoder(PROMPTS, chunks=1).hidden_states
    assert embeddings.shape == (len(PROMPTS), 77, 32)
    assert embeddings.dtype == text_encoder.dtype == dtype
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=tolerance)


def test_padding_token_comes_from_special_tokens_map(model: TinyModel) -> None:
    tokens = load_text_encoder(model.folder).clips[0].tokenizer("the!", padding="max_length").input_ids
    mark = len(vocabulary()) - 1
    gelu = json.loads((model.folder / "text_encoder" / "config.json").read_text())["hidden_act"] == "gelu"
    # In SD 2.x "!" is a special token: it is id 0 wherever the user types it, not the word "!" (256).
    assert tokens[2:] == ([0, mark] + [0] * 73 if gelu else [256, mark] + [mark] * 73)


def test_both_key_layouts(folder: Path) -> None:
    expected = load_text_encoder(folder)(PROMPTS).hidden_states
    path = folder / "text_encoder" / "model.safetensors"
    state = {key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    old = {f"text_model.{key}": value for key, value in state.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    old["logit_scale"] = torch.tensor(4.6)
    old["vision_model.embeddings.class_embedding"] = torch.zeros(8)
    for layout in (state, old):
        save_file(layout, path)
        assert torch.equal(load_text_encoder(folder)(PROMPTS).hidden_states, expected)


def test_keys() -> None:
    config = {"model_type": "clip_text_model", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 24}
    for projection in (False, True):
        network = clip_on_meta(config, projection=projection)
        rename = clip_keys(network)
        assert {rename(key) for key in network.state_dict()} == network.state_dict().keys()
        for key in network.state_dict():
            assert rename(key.removeprefix("text_model.")) == key
        assert rename("vision_model.post_layernorm.bias") is rename("visual_projection.weight") is None


@pytest.mark.parametrize(
    ("layers", "width", "tensors", "parameters"), [(12, 768, 196, 123_060_480), (23, 1024, 372, 340_387_840)]
)
def test_full_size(layers: int, width: int, tensors: int, parameters: int) -> None:
    config = {"vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config |= {"num_attention_heads": width // 64, "max_position_embeddings": 77}
    network = clip_on_meta({"model_type": "clip_text_model", **config})
    assert len(network.state_dict()) == tensors
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_tokens_and_chunks_are_counted(model: TinyModel) -> None:
    text_encoder = load_text_encoder(model.folder)
    assert text_encoder.max_tokens == 77
    assert [text_encoder.token_count(text) for text in ("", "the cat", "the " * 75, "the " * 76)] == [0, 2, 75, 76]
    assert [text_encoder.chunks([text]) for text in ("", "the " * 75, "the " * 76, "the " * 151)] == [1, 1, 2, 3]


def test_fewer_positions(folder: Path) -> None:
    path = folder / "text_encoder" / "config.json"
    write_json(path, json.loads(path.read_text()) | {"max_position_embeddings": 40})
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    key = next(key for key in state if "position_embedding" in key)
    save_file({**state, key: state[key][:40].contiguous()}, weights)
    text_encoder = load_text_encoder(folder)
    assert text_encoder(["the cat"]).hidden_states.shape == (1, 40, 32)
    assert text_encoder.chunks(["the " * 38, "the " * 39]) == 2


def test_move(model: TinyModel) -> None:
    text_encoder = load_text_encoder(model.folder)
    expected = load_text_encoder(model.folder, dtype=torch.float64)(PROMPTS).hidden_states
    assert text_encoder.to(dtype=torch.float64) is text_encoder
    assert torch.equal(text_encoder(PROMPTS).hidden_states, expected)
    assert text_encoder.to(device="cpu", dtype=torch.bfloat16)(["the"]).hidden_states.dtype == torch.bfloat16
    assert text_encoder.device == torch.device("cpu")


def test_no_graph_even_if_the_network_is_not_frozen(model: TinyModel) -> None:
    text_encoder = load_text_encoder(model.folder)
    text_encoder.clips[0].network.requires_grad_(True)
    assert not text_encoder(["the cat"]).hidden_states.requires_grad


def test_tokenizer_json_alone(folder: Path) -> None:
    """What transformers 5 writes: one tokenizer.json instead of vocab.json and merges.txt."""
    expected = load_text_encoder(folder)(PROMPTS).hidden_states
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert not (folder / "tokenizer" / "vocab.json").exists()
    assert torch.equal(load_text_encoder(folder)(PROMPTS).hidden_states, expected)


def test_silent(model: TinyModel, capfd: pytest.CaptureFixture[str]) -> None:
    text_encoder = load_text_encoder(model.folder)
    text_encoder(PROMPTS)
    text_encoder.token_count("cat " * 1000)
    assert capfd.readouterr() == ("", "")


def test_identity_covers_the_tokenizer(folder: Path) -> None:
    before = weights_id(folder, "text_encoder")
    path = folder / "tokenizer" / "special_tokens_map.json"
    write_json(path, json.loads(path.read_text()) | {"pad_token": "a"})
    assert weights_id(folder, "text_encoder") != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "xlm-roberta"}, "model_type='xlm-roberta' is not supported"),
        ({"hidden_size": "32"}, "hidden_size='32' is not a whole number from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small'"),
        ({"use_attention_mask": True}, "use_attention_mask"),
        ({"num_attention_heads": 5}, "text_encoder/config.json: hidden_size=32 is not a multiple of 5 heads"),
        ({"num_hidden_layers": 4}, "16 missing: encoder.layers.3"),
        ({"num_hidden_layers": 2}, "16 unexpected: encoder.layers.2"),
        (
            {"hidden_size": 64},
            "of another shape: embeddings.position_embedding.weight (expected [77, 64], got [77, 32])",
        ),
    ],
)
def test_config_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "text_encoder" / "config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(WeightsError) as error:
        load_text_encoder(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", None, "merges.txt: missing"),
        ("vocab.json", None, "vocab.json: cannot be read"),
        ("vocab.json", "{}", "vocab.json: empty"),
        ("vocab.json", '{"a": "b"}', "the tokenizer cannot be loaded"),
        ("vocab.json", "[" * 100_000, "not valid JSON"),
        ("merges.txt", "#version: 0.2\nno such merge here\n", "the tokenizer cannot be loaded"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length='77'"),
        ("tokenizer_config.json", "nonsense", "the tokenizer cannot be loaded"),
    ],
)
def test_tokenizer_refused(folder: Path, name: str, content: str | None, message: str) -> None:
    path = folder / "tokenizer" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(WeightsError) as error:
        load_text_encoder(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenizer_of_another_model_refused(folder: Path) -> None:
    path = folder / "tokenizer" / "vocab.json"
    write_json(path, json.loads(path.read_text()) | {"one": 525, "more": 526})
    with pytest.raises(WeightsError, match="the tokenizer has 527 tokens, the text_encoder 525"):
        load_text_encoder(folder)
