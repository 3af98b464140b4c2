"""Laws of the tensor cache: what comes out is what went in, to the bit, or an error; never another tensor."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from minisd import model_files, tensor_cache
from minisd.errors import DiskError
from minisd.tensor_cache import TensorCache


def _tensors(count: int, shape: tuple[int, ...] = (2, 4, 8, 8), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"key-{seed}-{i}": torch.randn(shape, generator=generator) for i in range(count)}


def _filled(folder: Path, tensors: dict[str, Tensor]) -> TensorCache:
    cache = TensorCache(folder)
    for key, tensor in tensors.items():
        cache.add(key, tensor)
    cache.flush()
    return cache


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN and the sign of zero count."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_cache, "SHARD_BYTES", 3 * 2048)  # three tensors of [2, 4, 8, 8] float32


# --- round trip ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_pattern_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    if dtype is torch.float32:
        bits = torch.randint(-(2**31), 2**31, (64, 1024), dtype=torch.int32, generator=torch.Generator())
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(64, 1024)
    values = bits.view(dtype)
    tensors = {"all": values, "turned": values.T, "part": values[3:9, ::2], "one": values[:1, :1]}
    for cache in (_filled(tmp_path / "c", tensors), TensorCache(tmp_path / "c")):
        for key, tensor in tensors.items():
            assert key in cache
            assert _same(cache[key], tensor.contiguous())


def test_what_is_read_may_be_changed_without_changing_the_cache(tmp_path: Path) -> None:
    tensors = _tensors(1)
    cache = _filled(tmp_path, tensors)
    cache["key-0-0"].zero_()
    assert _same(cache["key-0-0"], tensors["key-0-0"])


def test_a_tensor_with_a_gradient_is_kept_without_it(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.add("a", torch.ones(3, requires_grad=True) * 2)
    cache.flush()
    assert not cache["a"].requires_grad


def test_a_missing_key_is_not_there(tmp_path: Path) -> None:
    cache = _filled(tmp_path / "deep" / "cache", _tensors(2))
    assert "key-0-2" not in cache
    with pytest.raises(KeyError):
        cache["key-0-2"]
    cache.add("key-0-2", torch.zeros(1))
    assert "key-0-2" not in cache  # a promise only when it is on the disk
    cache.flush()
    assert "key-0-2" in cache


def test_nothing_is_written_for_nothing(tmp_path: Path) -> None:
    cache = _filled(tmp_path, {})
    cache.flush()
    assert list(tmp_path.iterdir()) == []


# --- shards ---


@pytest.mark.usefixtures("small_shards")
def test_shards_are_cut_at_their_size(tmp_path: Path) -> None:
    tensors = _tensors(8)
    cache = TensorCache(tmp_path)
    for count, (key, tensor) in enumerate(tensors.items(), start=1):
        cache.add(key, tensor)
        assert len(_shards(tmp_path)) == count // 3
    cache.flush()
    assert len(_shards(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in _shards(tmp_path)]
    assert all(_same(TensorCache(tmp_path)[key], tensor) for key, tensor in tensors.items())


def test_small_tensors_are_cut_by_number_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the header would have more entries than read_header takes for a model's, and the shard would be no good."""
    assert tensor_cache._MOST_TENSORS <= model_files._MAX_TENSORS
    monkeypatch.setattr(tensor_cache, "_MOST_TENSORS", 4)
    tensors = {str(i): torch.tensor([float(i)]) for i in range(10)}
    _filled(tmp_path, tensors)
    assert [len(safetensors.torch.load_file(path)) for path in _shards(tmp_path)].count(4) == 2
    cache = TensorCache(tmp_path)
    assert [cache[key].item() for key in tensors] == list(range(10))


def test_what_is_changed_after_it_was_added_is_kept_as_it_was(tmp_path: Path) -> None:
    both = torch.zeros(2, 3)
    cache = TensorCache(tmp_path)
    cache.add("first", both[0])
    cache.add("second", both[1])  # of the same memory
    both += 1
    cache.flush()
    assert cache["first"].tolist() == cache["second"].tolist() == [0, 0, 0]


def test_a_shard_says_of_itself_what_any_reader_understands(tmp_path: Path) -> None:
    tensors = _tensors(3)
    _filled(tmp_path, tensors)
    (path,) = _shards(tmp_path)
    assert all(_same(tensor, tensors[key]) for key, tensor in safetensors.torch.load_file(path).items())
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert set(header["__metadata__"]) == set(tensors)
    assert all(len(digest) == 64 for digest in header["__metadata__"].values())


def test_a_refresh_sees_what_others_have_written(tmp_path: Path) -> None:
    mine, theirs = TensorCache(tmp_path), TensorCache(tmp_path)
    for seed in range(3):
        tensors = _tensors(2, seed=seed)
        for key, tensor in tensors.items():
            theirs.add(key, tensor)
        theirs.flush()
        assert not any(key in mine for key in tensors)
        mine.refresh()
        assert all(_same(mine[key], tensor) for key, tensor in tensors.items())


@pytest.mark.usefixtures("small_shards")
def test_a_refresh_reads_no_header_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A foreign file, and a shard whose every key is in a later one too: both have no key that is found in them.
    safetensors.torch.save_file({"foreign": torch.zeros(3)}, tmp_path / "0.safetensors")
    tensors = _tensors(3)
    _filled(tmp_path, tensors)
    _shards(tmp_path)[-1].rename(tmp_path / "1.safetensors")
    (tmp_path / "2.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes())
    read: list[Path] = []
    original = tensor_cache.read_header

    def counting(path: Path) -> object:
        read.append(path)
        return original(path)

    monkeypatch.setattr(tensor_cache, "read_header", counting)
    cache = TensorCache(tmp_path)
    for key, tensor in _tensors(6, seed=1).items():
        cache.add(key, tensor)
    for _ in range(3):
        cache.refresh()
    assert sorted(path.name for path in read) == ["0.safetensors", "1.safetensors", "2.safetensors"]


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "plain.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "lora.safetensors", metadata={"ss_tag": "a"})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmp-x.safetensors-1").write_bytes(b"half")
    cache = _filled(tmp_path, {"b": torch.ones(3)})
    assert "a" not in cache
    assert _same(TensorCache(tmp_path)["b"], torch.ones(3))
    assert (tmp_path / "notes.txt").exists()


# --- damage ---


@pytest.mark.usefixtures("small_shards")
def test_a_truncated_shard_is_passed_over_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = _tensors(6)
    _filled(tmp_path, tensors)
    victim = _shards(tmp_path)[0]
    whole = victim.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        victim.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cache = TensorCache(tmp_path)
        assert [victim.name in record.getMessage() for record in caplog.records] == [True]
        missing = [key for key in tensors if key not in cache]
        assert len(missing) == 3
        for key in missing:
            cache.add(key, tensors[key])
        cache.flush()
        assert len(victim.read_bytes()) == len(whole)  # the same shard again, in the same place
        assert len(_shards(tmp_path)) == 2
        caplog.clear()
        again = TensorCache(tmp_path)
        assert not caplog.records
        assert all(_same(again[key], tensor) for key, tensor in tensors.items())


def _read(cache: TensorCache, key: str) -> Tensor | None:
    """A tensor, or None if it is refused as it should be."""
    try:
        return cache[key]
    except DiskError as error:
        return None if "x.safetensors: " in str(error) and "made anew" in str(error) else torch.zeros(0)


def test_a_flipped_bit_is_an_error_and_never_another_tensor(tmp_path: Path) -> None:
    tensors = _tensors(3, shape=(4, 4))
    _filled(tmp_path / "whole", tensors)
    (shard,) = _shards(tmp_path / "whole")
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = [*range(8 * start, 8 * len(whole), 97), *torch.randint(8 * start, (60,), generator=generator).tolist()]
    refused = 0
    for number, place in enumerate(places):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.safetensors").write_bytes(data)
        cache = TensorCache(folder)
        for key, tensor in tensors.items():
            if key in cache and (got := _read(cache, key)) is not None:
                assert _same(got, tensor)
            else:
                refused += 1
    assert refused >= len(range(8 * start, 8 * len(whole), 97))


def test_a_shard_that_is_deleted_in_mid_run_is_a_disk_error(tmp_path: Path) -> None:
    cache = _filled(tmp_path, _tensors(1))
    _shards(tmp_path)[0].unlink()
    with pytest.raises(DiskError, match="Start again"):
        cache["key-0-0"]


def test_a_folder_that_cannot_be_used_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DiskError, match="--cache-dir") as caught:
            TensorCache(folder)
        assert caught.value.exit_code == 6
    # A folder that is taken away is one that nothing can be written to, for root as well.
    cache = TensorCache(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    cache.add("a", torch.zeros(1))
    with pytest.raises(DiskError, match="cannot be written"):
        cache.flush()
    assert "a" not in cache
    (tmp_path / "gone").mkdir()
    cache.flush()  # what was not written is not forgotten
    assert _same(cache["a"], torch.zeros(1))


# --- several writers ---


def _write(folder: Path, seeds: range, barrier: Callable[[], object]) -> None:
    barrier()
    for seed in seeds:
        _filled(folder, _tensors(3, seed=seed))


def test_two_writers_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    # Half of what they write, both write.
    writers = [
        context.Process(target=_write, args=(tmp_path, seeds, barrier.wait)) for seeds in (range(20), range(10, 30))
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cache = TensorCache(tmp_path)
    for seed in range(30):
        assert all(_same(cache[key], tensor) for key, tensor in _tensors(3, seed=seed).items())
    assert len(list(tmp_path.iterdir())) == 30


def test_two_writers_whose_devices_round_differently_read_each_their_own(tmp_path: Path) -> None:
    """Two GPUs need not agree in the last bit. A shard replaced by the other's would look damaged."""
    one, other = TensorCache(tmp_path), TensorCache(tmp_path)
    for cache, value in ((one, 1.0), (other, 1.0 + 2**-23)):
        cache.add("a", torch.tensor([value]))
        cache.flush()
    assert one["a"].item() == 1.0
    assert other["a"].item() == 1.0 + 2**-23
    one.refresh()
    assert one["a"].item() in (1.0, 1.0 + 2**-23)


# --- size ---


def test_a_shard_that_is_cut_short_while_it_is_open_is_an_error_and_no_signal(tmp_path: Path) -> None:
    tensors = _tensors(20)
    cache = _filled(tmp_path, tensors)
    assert all(_same(cache[key], tensor) for key, tensor in tensors.items())
    (shard,) = _shards(tmp_path)
    os.truncate(shard, shard.stat().st_size // 2)
    refused = 0
    for key, tensor in tensors.items():
        try:
            assert _same(cache[key], tensor)
        except DiskError:
            refused += 1
    assert 5 < refused < 15


@pytest.mark.usefixtures("small_shards")
def test_reading_holds_no_tensors_and_few_files(tmp_path: Path) -> None:
    tensors = _tensors(300)
    _filled(tmp_path, tensors)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64 + len(list(Path("/proc/self/fd").iterdir())), before[1]))
    try:
        cache = TensorCache(tmp_path)
        assert all(_same(cache[key], tensor) for key, tensor in tensors.items())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    held = [value for value in vars(cache).values() if isinstance(value, dict) for value in value.values()]
    assert len(held) == 300
    assert not any(isinstance(value, Tensor) for value in held)
