import csv
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import draws
from minisd.config import TrainConfig
from minisd.data import (
    CaptionedImages,
    Example,
    MicroBatchSampler,
    check_pictures,
    image_index,
    positions_of,
    read_dataset,
    training_batches,
)
from minisd.distributed import Distributed
from minisd.errors import DataError
from minisd.images import load_image, to_pixel_values

ALONE = Distributed(0, 1, torch.device("cpu"))


def _picture(path: Path, colour: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)
    return path


def _dataset(folder: Path, table: str | bytes, names: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    for name in names:
        _picture(folder / "train" / name)
    (folder / "train" / "metadata.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    return folder


def _captions(folder: Path) -> dict[str, str]:
    return {example.path.name: example.caption for example in read_dataset(folder)}


# --- tables ---


def test_order_is_that_of_the_table_and_both_places_are_found(tmp_path: Path) -> None:
    _dataset(tmp_path, "file_name,text\nb.png,two\na.png,one\n")
    train = (tmp_path / "train").resolve()
    wanted = [Example(train / "b.png", "two"), Example(train / "a.png", "one")]
    assert read_dataset(tmp_path) == wanted
    assert read_dataset(tmp_path / "train") == wanted


ODD = ["NA", "null", "None", "nan", "N/A", "", "007", "1e5", "True", " space ", "=1+1", "+a", "-a", "@a", "\ta", "#",
       "'", 'say "hi"', "a, b", ";", "a\nb", "a\r\nb", "a\rb", "\u732b\U0001f408", "\u2028", "\\", "\\n",
       "e\u0301"]  # fmt: skip


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
@pytest.mark.parametrize("terminator", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_captions_come_back_as_written(tmp_path: Path, quoting: Literal[0, 1], terminator: str, mark: str) -> None:
    rng = random.Random(0)
    alphabet = ['"', ",", "\n", "\r", " ", "a", "\u00e9", "\u732b", "\U0001f408", "'", ";", "\t"]
    captions = ODD + ["".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(300)]
    if (
        quoting == csv.QUOTE_MINIMAL
    ):  # Python's writer then leaves a CR or LF unquoted if it ends its own rows otherwise
        captions = [caption.replace("\r", "").replace("\n", "") for caption in captions]
    names = tuple(f"{i}.png" for i in range(len(captions)))
    (tmp_path / "train").mkdir()
    for name in names:
        (tmp_path / "train" / name).touch()
    with (tmp_path / "train" / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.writer(file, quoting=quoting, lineterminator=terminator)
        writer.writerows([["file_name", "extra", "text"], *([n, "x", c] for n, c in zip(names, captions, strict=True))])
    assert _captions(tmp_path) == dict(zip(names, captions, strict=True))


def test_jsonl_captions_come_back_as_written(tmp_path: Path) -> None:
    lines = []
    for i, caption in enumerate(ODD):
        _picture(tmp_path / f"{i}.png")
        lines.append(json.dumps({"text": caption, "file_name": f"{i}.png", "more": [1]}, ensure_ascii=i % 2 == 0))
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(lines) + "\r\n", encoding="utf-8")
    assert _captions(tmp_path) == {f"{i}.png": caption for i, caption in enumerate(ODD)}


def test_names_with_folders_and_odd_characters(tmp_path: Path) -> None:
    names = (
        "sub/a.png",
        "with space.png",
        "caf\xe9.png",
        "-dash.png",
        "a..png",
        "a,b.png",
        "\U0001f408.png",
        "CON.png",
    )
    rows = "".join(f'"{name}",x\n' for name in names)
    assert [e.path.name for e in read_dataset(_dataset(tmp_path, "file_name,text\n" + rows, names))] == [
        name.split("/")[-1] for name in names
    ]


def test_pictures_without_a_row_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _dataset(tmp_path, "file_name,text\na.png,x\n", ("a.png", "b.JPG", "sub/c.png", ".hidden/d.png", "._a.png"))
    with caplog.at_level(logging.WARNING):
        assert len(read_dataset(tmp_path)) == 1
    assert "2 pictures have no row" in caplog.text
    assert "'b.JPG', 'sub/c.png'" in caplog.text


HEAD = "file_name,text\n"
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"expected a first line file_name,text, got an empty file"),
    "header only": (HEAD, r"expected a row for each picture, got none"),
    "no text column": ("file_name,caption\na.png,x\n", r"line 1: expected the columns file_name,text.*Rename"),
    "no header": ("a.png,x\nb.png,y\n", r"line 1: expected the columns"),
    "column twice": ("file_name,text,text\na.png,x,y\n", r"line 1: .*each once"),
    "other column twice": ("file_name,text,z,z\na.png,x,y,y\n", r"line 1: .*each once"),
    "semicolons": ("file_name;text\na.png;x\n", r"line 1: .*Separate the columns with commas"),
    "tabs": ("file_name\ttext\na.png\tx\n", r"line 1: .*Separate the columns with commas"),
    "too many": (HEAD + "a.png,x\nb.png,one, two\n", r"line 3: expected 2 fields .*got 3.*double quotes"),
    "too few": (HEAD + "a.png\n", r"line 2: expected 2 fields .*got 1"),
    "after a long row": (HEAD + 'a.png,"x\ny\nz"\nb.png\n', r"line 5: expected 2 fields"),
    "unclosed quote": (HEAD + 'a.png,x\nb.png,"y\n', r"line 3: not CSV.*Close the quotes"),
    "text after quote": (HEAD + 'a.png,"x"y\n', r"line 2: not CSV"),
    "huge field": (HEAD + "a.png," + "x" * 200_000 + "\n", r"line 2: not CSV"),
    "latin-1": (
        (HEAD + "a.png,x\nb.png,caf\xe9\n").encode("latin-1"),
        r"line 3: expected text in UTF-8.*0xe9.*Latin-1",
    ),
    "utf-16": ((HEAD + "a.png,x\n").encode("utf-16"), r"line 1: expected text in UTF-8, got UTF-16"),
    "utf-16 without mark": ((HEAD + "a.png,x\n").encode("utf-16-le"), r"line 1: .*NUL"),
    "NUL": (HEAD + "a.png,x\nb.png,y\0\n", r"line 3: .*NUL"),
    "name twice": (HEAD + "a.png,x\nb.png,y\na.png,z\n", r"line 4: 'a.png' has a row already, in line 2"),
    "name twice, spelt otherwise": (HEAD + "a.png,x\n./a.png,z\n", r"line 3: './a.png' has a row already"),
    "missing file": (HEAD + "a.png,x\nc.png,y\n", r"line 3: 'c.png': no such file"),
    "folder": (HEAD + ".,x\n", r"line 2: '.' is a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_tables_are_refused_with_the_line(tmp_path: Path, name: str) -> None:
    table, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(_dataset(tmp_path, table))
    assert caught.value.exit_code == 3
    assert "metadata.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


OUTSIDE = ["", "/etc/passwd", "..", "../x.png", "../../x.png", "a/../../x.png", "sub/../a.png", "C:/x.png", "c:x.png",
           "..\\x.png", "a\\b.png", "a.png/", "x" * 1025, "a\0.png", "a\ud800.png"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    _picture(tmp_path / "x.png")
    _picture(tmp_path / "data" / "x.png")
    _picture(tmp_path / "data" / "train" / "a.png")
    row = json.dumps({"file_name": name, "text": "x"})
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text(row)
    with pytest.raises(DataError, match=r"metadata\.jsonl', line 1: .* is outside the dataset"):
        read_dataset(tmp_path / "data")


def test_links_may_stay_inside_but_not_leave(tmp_path: Path) -> None:
    _picture(tmp_path / "secret" / "s.png")
    root = _dataset(tmp_path / "data", "file_name,text\nlink.png,x\n")
    link = root / "train" / "link.png"
    link.symlink_to("a.png")
    assert [example.path.name for example in read_dataset(root)] == ["a.png"]
    (tmp_path / "alias").symlink_to(root)  # the folder itself may be a link
    assert len(read_dataset(tmp_path / "alias")) == 1
    link.unlink()
    link.symlink_to(tmp_path / "secret" / "s.png")
    with pytest.raises(DataError, match=r"line 2: 'link\.png' is outside the dataset: a link"):
        read_dataset(root)
    link.unlink()
    link.symlink_to(tmp_path / "secret", target_is_directory=True)
    (root / "train" / "metadata.csv").write_text("file_name,text\nlink.png/s.png,x\n")
    with pytest.raises(DataError, match="is outside the dataset: a link"):
        read_dataset(root)
    for target in ("nowhere.png", "link.png"):
        link.unlink()
        link.symlink_to(target)
        (root / "train" / "metadata.csv").write_text("file_name,text\nlink.png,x\n")
        with pytest.raises(DataError, match="no such file"):
            read_dataset(root)


def test_a_pipe_in_a_row_or_for_a_table_is_refused_without_waiting(tmp_path: Path) -> None:
    root = _dataset(tmp_path, "file_name,text\npipe.png,x\n")
    os.mkfifo(root / "train" / "pipe.png")
    with pytest.raises(DataError, match=r"'pipe\.png' is a folder, a pipe"):
        read_dataset(root)
    (root / "train" / "metadata.csv").unlink()
    os.mkfifo(root / "train" / "metadata.csv")
    with pytest.raises(DataError, match=r"metadata\.csv': is a folder, a pipe"):
        read_dataset(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected"),
        ('{"file_name": "a.png"}', "expected"),
        ('{"file_name": "a.png", "text": null}', "expected"),
        ('{"file_name": 7, "text": "x"}', "expected"),
        ('{"file_name": "a.png", "text": "x\\u0000"}', "NUL or half a surrogate"),
        ('{"file_name": "a.png", "text": "x\\ud800"}', "NUL or half a surrogate"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    for name in ("a.png", "b.png"):
        _picture(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"metadata\.jsonl', line 2: .*{message}"):
        read_dataset(tmp_path)


def test_two_tables_are_ambiguous(tmp_path: Path) -> None:
    root = _dataset(tmp_path, "file_name,text\na.png,x\n")
    for path in (root / "train" / "metadata.jsonl", root / "metadata.csv"):
        path.write_text("")
        with pytest.raises(DataError, match=r"expected one table .* and "):
            read_dataset(root)
        path.unlink()


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "expected a folder"),
        ("file", "expected a folder"),
        ("empty", "expected train/"),
    ):
        with pytest.raises(DataError, match=f"{name}': {message}.*Correct --data"):
            read_dataset(tmp_path / name)


# --- sidecars ---


def test_sidecar_captions_in_the_order_of_the_names(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "B.bmp"):
        _picture(tmp_path / name).with_suffix(".txt").write_text(f"\ufeff caption of {name}\r\n", encoding="utf-8")
    _picture(tmp_path / ".cache" / "hidden.png")
    examples = read_dataset(tmp_path)
    assert [example.path.name for example in examples] == ["B.bmp", "a.JPG", "b.png", "c.webp"]
    assert [example.caption for example in examples] == [
        f"caption of {name}" for name in ("B.bmp", "a.JPG", "b.png", "sub/c.webp")
    ]


def test_pictures_without_caption_are_refused_with_their_names(tmp_path: Path) -> None:
    for i in range(6):
        _picture(tmp_path / f"{i}.png")
    (tmp_path / "3.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"5 of 6 pictures have no caption: '0\.png', '1\.png', '2\.png' and more\. Write"
    ):
        read_dataset(tmp_path)


def test_bad_sidecars_are_refused(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "data" / "a.png")
    text = picture.with_suffix(".txt")
    text.write_bytes(b"ok\ncaf\xe9")
    with pytest.raises(DataError, match=r"a\.txt', line 2: expected text in UTF-8"):
        read_dataset(tmp_path / "data")
    (tmp_path / "password").write_text("secret")
    text.unlink()
    text.symlink_to(tmp_path / "password")
    with pytest.raises(DataError, match=r"'a\.txt' is outside the dataset"):
        read_dataset(tmp_path / "data")
    text.unlink()
    os.mkfifo(text)
    with pytest.raises(DataError, match=r"'a\.txt' is a folder, a pipe"):
        read_dataset(tmp_path / "data")
    text.unlink()
    text.write_text("x")
    picture.unlink()
    picture.mkdir()
    with pytest.raises(DataError, match=r"'a\.png' is a folder, a pipe"):
        read_dataset(tmp_path / "data")


def test_file_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    for suffix in (b".png", b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + suffix)).touch()
    with pytest.raises(DataError, match=r"caf\\udce9.*outside the dataset") as caught:
        read_dataset(tmp_path)
    str(caught.value).encode()


# --- pictures ---


def test_check_pictures_names_the_one_that_is_bad(tmp_path: Path) -> None:
    examples = [Example(_picture(tmp_path / f"{i}.png"), "x") for i in range(4)]
    check_pictures(examples)
    data = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"2\.png") as caught:
        check_pictures(examples)
    assert caught.value.exit_code == 3


# --- the plan of samples ---


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_every_epoch_is_a_permutation_of_its_own(count: int) -> None:
    epochs = [[image_index(e * count + i, count, seed=5) for i in range(count)] for e in range(6)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 4
        assert epochs[0] != [image_index(i, count, seed=6) for i in range(count)]
    # Pure: any order of asking, and epochs long out of the cache, give the same answer.
    positions = list(range(6 * count))
    random.Random(0).shuffle(positions)
    assert all(image_index(p, count, seed=5) == epochs[p // count][p % count] for p in positions)


SPLITS = [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)]  # processes, micro-steps, batch


@pytest.mark.parametrize(("world_size", "accumulation", "batch"), [*SPLITS, (3, 2, 5), (1, 1, 1)])
def test_any_split_of_a_step_covers_the_same_positions(world_size: int, accumulation: int, batch: int) -> None:
    size = world_size * accumulation * batch
    for step in (0, 1, 17):
        parts = [
            positions_of(step, rank, world_size, batch, accumulation, micro_step)
            for rank in range(world_size)
            for micro_step in range(accumulation)
        ]
        assert all(len(part) == batch for part in parts)
        assert sorted(p for part in parts for p in part) == list(range(step * size, (step + 1) * size))


def test_the_sampler_lists_the_micro_batches_of_a_rank() -> None:
    sampler = MicroBatchSampler(3, 5, rank=1, world_size=2, train_batch_size=2, accumulation_steps=2)
    assert list(sampler) == [[26, 27], [30, 31], [34, 35], [38, 39]]
    assert len(sampler) == 4
    whole = MicroBatchSampler(0, 5, rank=1, world_size=2, train_batch_size=2, accumulation_steps=2)
    assert list(whole)[6:] == list(sampler)
    assert len(MicroBatchSampler(5, 5, 0, 1, 1, 1)) == len(list(MicroBatchSampler(5, 5, 0, 1, 1, 1))) == 0


def _noisy_examples(folder: Path, count: int = 5) -> list[Example]:
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (24 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [Example(folder / f"{i}.png", f"caption {i}") for i in range(count)]


def test_a_sample_is_the_drawn_crop_and_flip_of_its_picture(tmp_path: Path) -> None:
    examples = _noisy_examples(tmp_path)
    random_crop = CaptionedImages(examples, 16, center_crop=False, random_flip=True, seed=3)
    centred = CaptionedImages(examples, 16, center_crop=True, random_flip=False, seed=3)
    flips = set()
    for position in range(20):
        sample = random_crop[position]
        index = image_index(position, 5, 3)
        image = load_image(examples[index].path)
        flip = draws.flip(3, position)
        flips.add(flip)
        wanted = to_pixel_values(image, 16, crop=draws.crop(3, position), flip=flip)
        assert (sample.position, sample.index, sample.caption) == (position, index, f"caption {index}")
        assert torch.equal(sample.pixel_values, wanted)
        assert random_crop.path_of(position) == examples[index].path
        assert torch.equal(centred[position].pixel_values, to_pixel_values(image, 16, crop=None, flip=False))
    assert flips == {True, False}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_however_a_step_is_split(tmp_path: Path, workers: int) -> None:
    dataset = CaptionedImages(_noisy_examples(tmp_path), 16, center_crop=False, random_flip=True, seed=3)
    state = torch.get_rng_state()
    runs = []
    for world_size, accumulation, batch in SPLITS if workers == 0 else SPLITS[:1]:
        config = TrainConfig(
            data=tmp_path,
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            dataloader_num_workers=workers,
            caption_dropout=0.5,
            seed=3,
        )
        samples = {}
        for rank in range(world_size):
            dist = Distributed(rank, world_size, torch.device("cpu"))
            for got in training_batches(dataset, config, dist, 1, 4):
                assert got.pixel_values.shape == (batch, 3, 16, 16)
                for i, position in enumerate(got.positions):
                    samples[position] = (got.indices[i], got.captions[i], got.pixel_values[i])
        assert sorted(samples) == list(range(4, 16))
        runs.append(samples)
    for samples in runs:
        for position, (index, caption, pixel_values) in samples.items():
            wanted = dataset[position]
            dropped = draws.caption_dropout(3, position) < 0.5
            assert (index, caption) == (wanted.index, "" if dropped else wanted.caption)
            assert torch.equal(pixel_values, wanted.pixel_values)
    assert {caption == "" for _, caption, _ in runs[0].values()} == {True, False}
    assert torch.equal(state, torch.get_rng_state())  # reading draws nothing from the global generator


def test_a_rank_has_as_many_batches_as_the_others_even_with_fewer_pictures_than_ranks(tmp_path: Path) -> None:
    dataset = CaptionedImages(_noisy_examples(tmp_path, 2), 16, center_crop=True, random_flip=False, seed=0)
    config = TrainConfig(data=tmp_path, train_batch_size=4, gradient_accumulation_steps=1)
    for rank in range(3):
        assert len(list(training_batches(dataset, config, Distributed(rank, 3, torch.device("cpu")), 0, 2))) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_in_mid_run_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    dataset = CaptionedImages(_noisy_examples(tmp_path), 16, center_crop=True, random_flip=False, seed=0)
    (tmp_path / "2.png").unlink()
    config = TrainConfig(data=tmp_path, dataloader_num_workers=workers)
    with pytest.raises(DataError, match=r"^'.*2\.png': cannot be opened: No such file") as caught:
        list(training_batches(dataset, config, ALONE, 0, 5))
    assert "\n" not in str(caught.value)


_SIGNALLED = """
import os, signal, sys
from pathlib import Path
import torch
from minisd.config import TrainConfig
from minisd.data import CaptionedImages, read_dataset, training_batches
from minisd.distributed import Distributed

signal.signal(signal.SIGTERM, lambda *_: None)
folder = Path(sys.argv[1])
dataset = CaptionedImages(read_dataset(folder), 16, center_crop=True, random_flip=False, seed=0)
config = TrainConfig(data=folder, dataloader_num_workers=1)
batches = training_batches(dataset, config, Distributed(0, 1, torch.device("cpu")), 0, 20)
next(batches)
os.killpg(os.getpid(), signal.SIGTERM)
print(1 + sum(1 for _ in batches))
again = training_batches(dataset, config, Distributed(0, 1, torch.device("cpu")), 0, 20)
next(again)
keep = [again, sys.exc_info]
keep.append(keep)  # a cycle, as a traceback makes one: the reader is alive when the interpreter ends
"""


def test_readers_outlive_a_signal_to_the_group_and_end_with_their_parent(tmp_path: Path) -> None:
    for i in range(4):
        _picture(tmp_path / f"{i}.png").with_suffix(".txt").write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", _SIGNALLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout.strip()) == (0, "80"), done.stderr
