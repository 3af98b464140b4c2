"""Files that are not what their name says: each is refused by name, none is opened by pickle or hangs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save, save_file

from minisd.errors import WeightsError
from minisd.model_files import TensorInfo, read_header, read_json, read_tensors, sha256_of

GOOD = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}, {"k": "v"})


class Bomb:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (BOMB_FILE, "w")


BOMB_FILE = "exploded"


def zipped_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: object, end: object, dtype: object = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(path, read_header(path).tensors))


def test_good_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    assert header.tensors == {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("F16", (2,))}
    tensors = dict(read_tensors(path, ["b", "a"]))
    assert list(tensors) == ["b", "a"]
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3))


def test_header_of_512_bytes_is_no_pickle(tmp_path: Path) -> None:
    """A header of 0x0280 bytes begins with the two bytes of a pickle of protocol 2."""
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(0x0280)
    path.write_bytes(with_header(header, bytes(4)))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_all(path)["a"], torch.zeros(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x10\0\0\0\0\0\0", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
        (b"\n <!DOCTYPE html><html><body>Log in</body></html>", "an HTML page"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (zipped_pickle(), "a zip archive"),
        (pickle.dumps(Bomb(), protocol=2), "a Python pickle"),
        (pickle.dumps(Bomb(), protocol=5), "a Python pickle"),
        (bytes(range(1, 9)) + b"\0" * 100, "not a safetensors file"),
        (GOOD[:60], "truncated inside its header"),
        (GOOD[:-1], f"truncated: expected {len(GOOD)} bytes, got {len(GOOD) - 1}"),
        (GOOD + b"\0", f"damaged: expected {len(GOOD)} bytes, got {len(GOOD) + 1}"),
        (struct.pack("<Q", 10**15) + b"{}", "truncated inside its header"),
        (with_header(b"{" + b" " * 100_000_001), "the header has 100000002 bytes"),
        (with_header(b'{"a": '), "the header is damaged"),
        (with_header(b'{"a":' * 100_000), "the header is damaged"),
        (with_header({"a": 1}), "the header is damaged"),
        (with_header({"a": {"dtype": "F32"}}), "the header is damaged"),
        (with_header({"a": entry(0, "x")}), "the header is damaged"),
        (with_header(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'), "the header is damaged"),
        (with_header({"__metadata__": {"k": 1}}), "metadata that is not text"),
        (with_header({"__metadata__": ["k"]}), "the header is damaged"),
        (with_header({str(i): entry(0, 0, shape=(0,)) for i in range(20_001)}), "20001 tensors"),
        (with_header(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'), "key 'a' twice"),
        (with_header({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "damaged"),  # overlap
        (with_header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "damaged"),  # hole
        (with_header({"a": entry(-4, 0)}), "damaged"),
        (with_header({"a": entry(0, 4, dtype="F33")}, bytes(4)), "damaged"),
        (with_header({"a": entry(0, 4, shape=(2**40, 2**40))}, bytes(4)), "damaged"),
        (with_header({"a": entry(0, 4, shape=(7,))}, bytes(4)), "damaged"),
    ],
)
def test_refused(content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_all(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value)) < 600
    assert error.value.exit_code == 4
    assert not (tmp_path / BOMB_FILE).exists()


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("pipe", "a special file"),
        ("folder", "a folder"),
        ("absent", "No such file"),
        ("\0", "not"),
    ]:
        for read in (read_header, read_json):
            with pytest.raises(WeightsError, match=message):
                read(tmp_path / name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody and root again")
def test_a_file_of_somebody_else() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(GOOD)
        path.chmod(0)
        Path(folder).chmod(0o755)
        os.seteuid(65534)
        try:
            for read in (read_header, read_json, sha256_of):
                with pytest.raises(WeightsError, match="cannot be read: Permission denied"):
                    read(path)
        finally:
            os.seteuid(0)


def test_file_that_shrinks_while_read(tmp_path: Path) -> None:
    """A mapped file would kill the process with SIGBUS."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(1_000_000)}, path)
    tensors = read_tensors(path, ["a", "b"])
    assert torch.equal(next(tensors)[1], torch.ones(4))
    os.truncate(path, 1000)
    with pytest.raises(WeightsError, match="damaged"):
        next(tensors)


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    tensor = read_all(path)["a"]
    with path.open("r+b") as file:
        file.truncate(0)
    assert torch.equal(tensor, torch.ones(100_000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b" " * 16_000_001, "more than 16000000 bytes"),
    ],
)
def test_json_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_json(path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": [1, 2.5, null, true]}')
    assert read_json(path) == {"a": [1, 2.5, None, True]}
