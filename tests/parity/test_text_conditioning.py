"""What the UNet is told of a prompt: long prompts, weights, left-out layers, XL's two encoders, learnt words."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from minisd.errors import UsageError
from minisd.prompts import parse_weights
from minisd.text import MAX_CHUNKS, TextEncoder
from minisd.weights import load_model, load_text_encoder
from tests.tiny import TinyModel, write_tiny_model

LONG = "the cat and it " * 30  # 120 tokens


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("sdxl"), family="sdxl")


def _load(model: TinyModel) -> TextEncoder:
    return load_model(str(model.folder), dtype=torch.float64).text_encoder


def _same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


# --- XL ---


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_xl_reads_what_diffusers_gives_it(sdxl: TinyModel, clip_skip: int) -> None:
    prompts = ["the cat!", "", "8bit city, and it"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl.folder, dtype=torch.float64)
    hidden, _, pooled, _ = pipeline.encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip or None
    )
    ours = _load(sdxl)(prompts, clip_skip=clip_skip)
    _same(ours.hidden_states, hidden)
    assert ours.pooled is not None
    _same(ours.pooled, pooled)


def test_xl_has_zeros_for_a_prompt_that_is_not_given_and_an_encoding_for_an_empty_one(sdxl: TinyModel) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl.folder, dtype=torch.float64)
    ours = _load(sdxl)([None, "", "the cat"])
    for row, negative in enumerate((None, "")):
        _, hidden, _, pooled = pipeline.encode_prompt("the cat", device="cpu", negative_prompt=negative)
        _same(ours.hidden_states[row : row + 1], hidden)
        assert ours.pooled is not None
        _same(ours.pooled[row : row + 1], pooled)
    assert not ours.hidden_states[0].any()
    assert ours.hidden_states[1].any()


def test_sd_has_the_empty_prompt_for_one_that_is_not_given(sd1: TinyModel) -> None:
    ours = _load(sd1)([None, ""])
    assert torch.equal(ours.hidden_states[0], ours.hidden_states[1])
    assert ours.pooled is None


# --- layers left out ---


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_left_out_layers_are_normalised_like_the_last(sd1: TinyModel, clip_skip: int) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd1.folder, safety_checker=None, dtype=torch.float64)
    tokens = pipeline.tokenizer("the cat", padding="max_length", return_tensors="pt").input_ids
    # diffusers' own words for it; its pipeline fails here on transformers >= 5.6.
    output = pipeline.text_encoder(tokens, output_hidden_states=True)
    expected = pipeline.text_encoder.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    _same(_load(sd1)(["the cat"], clip_skip=clip_skip).hidden_states, expected)


@pytest.mark.parametrize(("family", "most"), [("sd1", 2), ("sdxl", 1)])
def test_layers_that_are_not_there_are_refused(family: str, most: int, request: pytest.FixtureRequest) -> None:
    text_encoder = _load(request.getfixturevalue(family))
    text_encoder(["the"], clip_skip=most)
    for clip_skip in (most + 1, -1):
        with pytest.raises(UsageError, match=f"--clip-skip {clip_skip}"):
            text_encoder(["the"], clip_skip=clip_skip)


# --- long prompts ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_long_prompt_is_its_chunks_side_by_side(family: str, request: pytest.FixtureRequest) -> None:
    text_encoder = _load(request.getfixturevalue(family))
    words = LONG.split()
    parts = [" ".join(words[:75]), " ".join(words[75:])]
    whole, each = text_encoder([LONG]), text_encoder(parts)
    assert whole.hidden_states.shape[1] == 2 * 77
    _same(whole.hidden_states[0], torch.cat(list(each.hidden_states)))
    if each.pooled is not None:  # of the first chunk, as other programs have it
        assert whole.pooled is not None
        _same(whole.pooled[0], each.pooled[0])


def test_a_shorter_prompt_is_padded_with_empty_chunks_and_a_longer_one_is_cut(sd1: TinyModel) -> None:
    text_encoder = _load(sd1)
    both, alone = text_encoder(["the cat", LONG]), text_encoder(["the cat", ""])
    _same(both.hidden_states[0], torch.cat(list(alone.hidden_states)))
    _same(text_encoder(["the cat"], chunks=2).hidden_states[0], both.hidden_states[0])
    _same(text_encoder([LONG], chunks=1).hidden_states[0], both.hidden_states[1, :77])


def test_a_prompt_without_end_is_refused_at_once(sd1: TinyModel) -> None:
    text_encoder = _load(sd1)
    text_encoder(["the " * 75 * MAX_CHUNKS])
    for text in ("the " * (75 * MAX_CHUNKS + 1), "a" * 10_000_000):
        with pytest.raises(UsageError, match="longer than"):
            text_encoder([text])


def test_a_caption_does_not_depend_on_those_beside_it(sd1: TinyModel) -> None:
    text_encoder = load_text_encoder(sd1.folder)
    together = text_encoder(["the cat", "it", "8bit"]).hidden_states
    assert all(torch.equal(together[i], text_encoder([text]).hidden_states[0]) for i, text in enumerate(("the cat",)))


# --- weights ---


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("((red:2) big:1.5) cat", [("red", 3.0), (" big", 1.5), (" cat", 1)]),
        ("a (red) [cat]: x", [("a (red) [cat]: x", 1)]),
        (r"a \(red:1.3\) cat", [("a (red:1.3) cat", 1)]),
        ("(a (b) c:.5)", [("a (b) c", 0.5)]),
        ("red:1.3) (blue: -0.5 ) (open", [("red:1.3) ", 1), ("blue", -0.5), (" (open", 1)]),
        ("(10:30:1.2)", [("10:30", 1.2)]),
        (r"c:\x \\(a:2)", [("c:\\x \\(a:2)", 1)]),
        ("(a:1.0) b", [("a b", 1)]),
    ],
)
def test_weights_are_read(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == pieces


def test_a_weight_beyond_sense_is_refused() -> None:
    for prompt in ("(a:11)", "(a:-11)", f"(a:{'9' * 400})", "((a:4) b:3)", "(" * 400 + "a" + ":10)" * 400):
        with pytest.raises(UsageError, match="expected -10 to 10"):
            parse_weights(prompt)


def test_a_weight_multiplies_the_states_of_its_tokens_and_keeps_the_mean(sd1: TinyModel) -> None:
    text_encoder = _load(sd1)
    plain = text_encoder(["the cat and it"]).hidden_states
    weighted = text_encoder(["the (cat and:1.3) it"], weighted=True).hidden_states
    weights = torch.ones(77, dtype=torch.float64)
    weights[2:4] = 1.3  # after the start mark and "the"
    expected = plain * weights[:, None]
    _same(weighted, expected * plain.mean() / expected.mean())


def test_weights_touch_no_other_chunk_of_a_long_prompt(sd1: TinyModel) -> None:
    """As in A1111, which keeps the mean chunk by chunk."""
    text_encoder, rest = _load(sd1), "cat " * 75 + "the city"
    plain = text_encoder([f"it {rest}"]).hidden_states
    weighted = text_encoder([f"(it:1.5) {rest}"], weighted=True).hidden_states
    _same(weighted[:, 77:], plain[:, 77:])
    _same(weighted[:, :77].mean(), plain[:, :77].mean())
    assert not torch.allclose(weighted[:, :77], plain[:, :77])


def test_without_marks_weighted_and_plain_are_the_same_bits(sd1: TinyModel) -> None:
    text_encoder = _load(sd1)
    texts = ["the (cat)", LONG, ""]
    assert torch.equal(text_encoder(texts, weighted=True).hidden_states, text_encoder(texts).hidden_states)
    # In training a caption is text and nothing else.
    marked = text_encoder(["the (cat:1.3)"]).hidden_states
    assert torch.equal(marked, text_encoder([r"the \(cat:1.3\)"], weighted=True).hidden_states)


# --- learnt words ---


def test_a_learnt_word_stands_for_its_vectors(sd1: TinyModel) -> None:
    text_encoder = _load(sd1)
    table = text_encoder.clips[0].network.embeddings.token_embedding.weight  # type: ignore[union-attr]
    ids = text_encoder.clips[0].tokens("cat and")
    expected = text_encoder(["the cat and it"]).hidden_states
    plain = text_encoder(["the city"]).hidden_states
    text_encoder.add_tokens({"<s1>": table[ids].clone()})
    _same(text_encoder(["the <s1> it"]).hidden_states, expected)
    assert text_encoder.token_count("the <s1> it") == 4
    _same(text_encoder(["the city"]).hidden_states, plain)


def test_learnt_words_that_do_not_fit_are_refused(sd1: TinyModel, sdxl: TinyModel) -> None:
    text_encoder = _load(sd1)
    vectors = torch.zeros(1, 32)
    text_encoder.add_tokens({"<s1>": vectors})
    with pytest.raises(UsageError, match="has a meaning already"):
        text_encoder.add_tokens({"<s1>": vectors})
    with pytest.raises(UsageError, match=r"expected \[n, 32\]"):
        text_encoder.add_tokens({"<s2>": torch.zeros(1, 48)})
    with pytest.raises(UsageError, match="not for an XL model"):
        _load(sdxl).add_tokens({"<s1>": vectors})
