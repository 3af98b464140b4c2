"""Laws of the latent cache: computed once, in shares, one by one, under a key that names all it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import latent_cache
from minisd.buckets import Geometry
from minisd.distributed import Distributed
from minisd.errors import DataError, NonFiniteError, Stopped
from minisd.latent_cache import View, cache_captions, cache_latents, caption_key, encode_moments, identity
from minisd.tensor_cache import TensorCache
from minisd.text import TextEmbeddings, TextEncoder
from minisd.vae import AutoencoderKL
from minisd.weights import load_vae

ALONE = Distributed(0, 1, torch.device("cpu"))
GEOMETRY = Geometry((40, 48), (32, 48))


@pytest.fixture
def encoded(vae: AutoencoderKL) -> Iterator[list[int]]:
    """Grows by the batch size each time the VAE encodes."""
    calls: list[int] = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    yield calls
    hook.remove()


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[Distributed]:
    """Ranks that do not wait for each other: they are run one after the other."""
    monkeypatch.setattr(latent_cache, "wait_for_all", lambda dist: None)
    return [Distributed(rank, 2, torch.device("cpu")) for rank in range(2)]


def _views(folder: Path, count: int = 5, *, flips: bool = False) -> list[View]:
    views = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        views += [View(path, sha256, GEOMETRY, flip) for flip in ((False, True) if flips else (False,))]
    return views


def _nothing() -> None:
    pass


# --- latents ---


def test_pictures_are_encoded_each_alone(tmp_path: Path, vae: AutoencoderKL, encoded: list[int]) -> None:
    pixel_values = torch.stack([view.pixel_values() for view in _views(tmp_path, 3)])
    together = encode_moments(vae, pixel_values)
    assert encoded == [1, 1, 1]
    assert together.shape == (3, 2, 4, 8, 12)
    assert torch.equal(together, torch.cat([encode_moments(vae, single) for single in pixel_values.split(1)]))
    posterior = vae.encode(pixel_values[1:2])
    assert torch.equal(together[1, 0], posterior.mean[0])
    assert torch.equal(together[1, 1], posterior.logvar[0])
    assert not together.requires_grad


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_cached_is_what_would_be_computed(
    tmp_path: Path, tiny_folder: Path, num_workers: int, dtype: torch.dtype
) -> None:
    vae, views = load_vae(tiny_folder, dtype=dtype), _views(tmp_path, flips=True)
    cache = TensorCache(tmp_path / "cache")
    cache_latents(cache, views, vae, "vae", ALONE, num_workers=num_workers, check_stop=_nothing)
    for view in views:
        moments = encode_moments(vae, view.pixel_values().unsqueeze(0))[0]
        assert cache[view.key("vae")].dtype == dtype
        assert torch.equal(cache[view.key("vae")], moments)
    different = {tuple(cache[view.key("vae")].float().flatten().tolist()) for view in views}
    assert len(different) == len(views)


def test_nothing_is_computed_twice(tmp_path: Path, vae: AutoencoderKL, encoded: list[int]) -> None:
    views = _views(tmp_path)
    for expected in (3, 5, 5):
        cache = TensorCache(tmp_path / "cache")  # another run
        wanted = views[:3] if expected == 3 else [*views, *views]
        cache_latents(cache, wanted, vae, "vae", ALONE, num_workers=0, check_stop=_nothing)
        assert len(encoded) == expected
    cache_latents(TensorCache(tmp_path / "cache"), views, vae, "other", ALONE, num_workers=0, check_stop=_nothing)
    assert len(encoded) == 10


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_rank_computes_its_share_and_sees_all(
    tmp_path: Path, vae: AutoencoderKL, encoded: list[int], two_ranks: list[Distributed], count: int
) -> None:
    views = _views(tmp_path, count)
    caches = [TensorCache(tmp_path / "cache") for _ in two_ranks]
    for dist, cache in zip(two_ranks, caches, strict=True):
        encoded.clear()
        cache_latents(cache, views, vae, "vae", dist, num_workers=0, check_stop=_nothing)
        assert len(encoded) == len(views[dist.rank :: 2])
    assert all(view.key("vae") in caches[1] for view in views)  # the last to come has looked again
    alone = TensorCache(tmp_path / "alone")
    cache_latents(alone, views, vae, "vae", ALONE, num_workers=0, check_stop=_nothing)
    assert all(torch.equal(alone[view.key("vae")], caches[1][view.key("vae")]) for view in views)


def test_ranks_look_before_one_writes(
    tmp_path: Path, vae: AutoencoderKL, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that looked after another has written would have another list of what is missing, and other shares."""
    views, waits = _views(tmp_path), []

    def wait(dist: Distributed) -> None:
        waits.append((len(encoded), len(list((tmp_path / "cache").iterdir()))))

    monkeypatch.setattr(latent_cache, "wait_for_all", wait)
    cache = TensorCache(tmp_path / "cache")
    cache_latents(cache, views, vae, "vae", Distributed(1, 2, ALONE.device), num_workers=0, check_stop=_nothing)
    assert waits == [(0, 0), (2, 1)]


def test_a_stop_keeps_what_is_done(tmp_path: Path, vae: AutoencoderKL, encoded: list[int]) -> None:
    views = _views(tmp_path)

    def stop() -> None:
        if len(encoded) == 3:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        cache_latents(TensorCache(tmp_path / "c"), views, vae, "vae", ALONE, num_workers=0, check_stop=stop)
    cache = TensorCache(tmp_path / "c")
    assert [view.key("vae") in cache for view in views] == [True, True, True, False, False]
    cache_latents(cache, views, vae, "vae", ALONE, num_workers=0, check_stop=_nothing)
    assert len(encoded) == 5


def test_latents_that_are_no_numbers_are_refused_with_their_file(tmp_path: Path, vae: AutoencoderKL) -> None:
    views = _views(tmp_path)
    for value in (torch.nan, torch.inf):

        def spoil(module: torch.nn.Module, arguments: object, output: torch.Tensor, value: float = value) -> None:
            spoil.calls += 1  # type: ignore[attr-defined]
            if spoil.calls == 3:  # type: ignore[attr-defined]
                output[0, 1, 2, 3] = value

        spoil.calls = 0  # type: ignore[attr-defined]
        hook = vae.quant_conv.register_forward_hook(spoil)
        folder = tmp_path / str(value)
        try:
            with pytest.raises(NonFiniteError, match=r"2\.png': its latents are not finite") as caught:
                cache_latents(TensorCache(folder), views, vae, "vae", ALONE, num_workers=0, check_stop=_nothing)
        finally:
            hook.remove()
        assert caught.value.exit_code == 7
        cache = TensorCache(folder)
        assert [view.key("vae") in cache for view in views] == [True, True, False, False, False]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_has_changed_or_gone_is_named_and_not_cached(
    tmp_path: Path, vae: AutoencoderKL, num_workers: int
) -> None:
    """The key is the content that was surveyed: another content under it would be there for ever."""
    views = _views(tmp_path)
    Image.new("RGB", (48, 40)).save(views[2].path)
    for message in (r"^'.*2\.png': has changed since it was checked", r"^'.*2\.png': cannot be opened"):
        cache = TensorCache(tmp_path / "c")
        with pytest.raises(DataError, match=message) as caught:
            cache_latents(cache, views, vae, "vae", ALONE, num_workers=num_workers, check_stop=_nothing)
        assert "\n" not in str(caught.value)
        assert views[2].key("vae") not in TensorCache(tmp_path / "c")
        views[2].path.unlink(missing_ok=True)


# --- keys ---


def test_a_key_names_all_that_the_latents_depend_on(tmp_path: Path) -> None:
    view = _views(tmp_path, 1)[0]
    others = [
        view,
        replace(view, sha256=hashlib.sha256(b"another content").hexdigest()),
        replace(view, geometry=Geometry((40, 48), (40, 48))),
        replace(view, geometry=Geometry((48, 48), (32, 48))),
        replace(view, geometry=Geometry((40, 48), (48, 32))),
        replace(view, flip=True),
    ]
    ids = [
        identity(weights, dtype, torch.device(device))
        for weights in ("sha256:a", "sha256:b")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for device in ("cpu", "cuda:0")
    ]
    keys = [each.key(weights) for each in others for weights in ids]
    assert len(set(keys)) == len(keys) == 72
    assert all(a != b for a, b in combinations([caption_key("a", weights) for weights in ids], 2))


def test_a_key_is_of_the_content_and_not_of_its_place(tmp_path: Path) -> None:
    view = _views(tmp_path, 1)[0]
    assert replace(view, path=Path("elsewhere.png")).key("vae") == view.key("vae")
    assert identity("x", torch.float32, torch.device("cuda", 0)) == identity(
        "x", torch.float32, torch.device("cuda", 3)
    )


# --- captions ---


def test_captions_are_encoded_each_alone_and_the_one_left_out_always(
    tmp_path: Path, text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["a cat", "a city", "a cat", "caf\xe9 \U0001f408", "a/b"]
    cache = TensorCache(tmp_path)
    cache_captions(cache, captions, text_encoder, "text", ALONE, chunks=2)
    for caption in [None, *captions]:
        expected = text_encoder([caption], chunks=2).hidden_states[0]
        assert torch.equal(cache[caption_key(caption, "text")], expected)
    assert caption_key(None, "text") != caption_key("None", "text")
    asked: list[str] = []

    class Counting:
        def __call__(self, captions: list[str], *, chunks: int) -> TextEmbeddings:
            asked.extend(captions)
            return text_encoder(captions, chunks=chunks)

    again = TensorCache(tmp_path)
    cache_captions(again, [*captions, "new"], Counting(), "text", ALONE, chunks=2)  # type: ignore[arg-type]
    assert asked == ["new"]


def test_captions_in_shares(tmp_path: Path, text_encoder: TextEncoder, two_ranks: list[Distributed]) -> None:
    captions = [f"a cat {i}" for i in range(4)]
    caches = [TensorCache(tmp_path) for _ in two_ranks]
    for dist, cache in zip(two_ranks, caches, strict=True):
        cache_captions(cache, captions, text_encoder, "text", dist, chunks=1)
        shards = list(tmp_path.glob("*.safetensors"))
        assert len(shards) == 1 + dist.rank
    assert [caption_key(caption, "text") in caches[0] for caption in [None, *captions]] == [True, False] * 2 + [True]
    assert all(caption_key(caption, "text") in caches[1] for caption in [None, *captions])


def test_an_embedding_that_is_no_number_is_refused_and_the_others_kept(
    tmp_path: Path, text_encoder: TextEncoder
) -> None:
    def spoiled(captions: list[str], *, chunks: int) -> TextEmbeddings:
        factor = torch.nan if captions == ["bad"] else 1
        return TextEmbeddings(text_encoder(captions, chunks=chunks).hidden_states * factor, None)

    with pytest.raises(NonFiniteError, match="the embedding of 'bad' is not finite"):
        cache_captions(
            TensorCache(tmp_path),
            ["good", "bad", "late"],
            spoiled,  # type: ignore[arg-type]
            "text",
            ALONE,
            chunks=1,
        )
    cache = TensorCache(tmp_path)
    kept = [caption_key(caption, "text") in cache for caption in (None, "good", "bad", "late")]
    assert kept == [True, True, False, False]


def test_a_pooled_embedding_that_is_no_number_is_refused(tmp_path: Path, text_encoder: TextEncoder) -> None:
    def spoiled(captions: list[str], *, chunks: int) -> TextEmbeddings:
        return TextEmbeddings(text_encoder(captions, chunks=chunks).hidden_states, torch.full((1, 8), torch.inf))

    with pytest.raises(NonFiniteError, match="is not finite"):
        cache_captions(TensorCache(tmp_path), [], spoiled, "text", ALONE, chunks=1)  # type: ignore[arg-type]
