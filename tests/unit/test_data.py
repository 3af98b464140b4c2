import csv
import hashlib
import json
import logging
import os
import random
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from minisd.caption_table import Row, read_table
from minisd.data import Example, Survey, read_dataset, survey, with_trigger
from minisd.errors import DataError


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
    """Name -> the one caption of each picture."""
    examples = read_dataset(folder)
    assert all(len(example.captions) == 1 for example in examples)
    return {example.path.name: example.captions[0] for example in examples}


# --- tables ---


def test_order_is_that_of_the_table_and_both_places_are_found(tmp_path: Path) -> None:
    _dataset(tmp_path, "file_name,text\nb.png,two\na.png,one\n")
    train = (tmp_path / "train").resolve()
    wanted = [Example(train / "b.png", ("two",)), Example(train / "a.png", ("one",))]
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


def test_a_jsonl_text_may_be_a_list_of_captions(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": ODD}, {"file_name": "b.png", "text": ["one"]}]
    for row in rows:
        _picture(tmp_path / str(row["file_name"]))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_table(tmp_path / "metadata.jsonl") == [Row(1, "a.png", tuple(ODD)), Row(2, "b.png", ("one",))]
    assert [example.captions for example in read_dataset(tmp_path)] == [tuple(ODD), ("one",)]


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
        ('{"file_name": "a.png", "text": []}', "expected"),
        ('{"file_name": "a.png", "text": ["x", 7]}', "expected"),
        ('{"file_name": "a.png", "text": ["x", ["y"]]}', "expected"),
        ('{"file_name": "a.png", "text": {"x": 1}}', "expected"),
        ('{"file_name": 7, "text": "x"}', "expected"),
        ('{"file_name": "a.png", "text": "x\\u0000"}', "NUL or half a surrogate"),
        ('{"file_name": "a.png", "text": "x\\ud800"}', "NUL or half a surrogate"),
        ('{"file_name": "a.png", "text": ["x", "y\\u0000"]}', "NUL or half a surrogate"),
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
    assert [example.captions for example in examples] == [
        (f"caption of {name}",) for name in ("B.bmp", "a.JPG", "b.png", "sub/c.webp")
    ]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("one\ntwo", ("one", "two")),
        ("one\r\ntwo\r\n", ("one", "two")),
        ("one\rtwo", ("one", "two")),
        ("\n\n one \n\t\n  two\n\n", ("one", "two")),
        ("same\nsame", ("same", "same")),  # twice as likely
        ("one\u2028still one\x85and\x0con", ("one\u2028still one\x85and\x0con",)),
        ("\ufeffone", ("one",)),
        ("", ("",)),
        (" \n\n", ("",)),
    ],
)
def test_a_sidecar_has_one_caption_a_line(tmp_path: Path, text: str, captions: tuple[str, ...]) -> None:
    _picture(tmp_path / "a.png").with_suffix(".txt").write_bytes(text.encode())
    assert [example.captions for example in read_dataset(tmp_path)] == [captions]


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


# --- trigger words ---


@pytest.mark.parametrize(
    ("caption", "trigger", "wanted"),
    [
        ("a cat", None, "a cat"),
        ("a [trigger] cat", None, "a [trigger] cat"),
        ("a cat", "sks", "sks, a cat"),
        ("", "sks", "sks"),
        ("a [trigger] cat in [trigger] style", "sks", "a sks cat in sks style"),
        ("[trigger]", "sks", "sks"),
        ("a SKS cat", "sks", "a SKS cat"),
        ("a stra\xdfe", "STRASSE", "a stra\xdfe"),
        ("8bit city", "8bit", "8bit city"),
        ("a \\1 cat", "\\g<0>", "\\g<0>, a \\1 cat"),  # a trigger is text, no pattern
    ],
)
def test_the_trigger_word_is_in_every_caption_once_it_is_given(caption: str, trigger: str | None, wanted: str) -> None:
    assert with_trigger(caption, trigger) == wanted
    assert with_trigger(wanted, trigger) == wanted  # and is not put in again


# --- pictures ---


def test_a_survey_has_the_hash_and_the_upright_size(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (20, 16)).save(tmp_path / "turned.png", exif=turned)
    paths = [_picture(tmp_path / "a.png"), _picture(tmp_path / "b.png", 9, (7, 30)), tmp_path / "turned.png"]
    surveys = survey([Example(path, ("x",)) for path in paths], quiet=True)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert surveys == [Survey(h, size) for h, size in zip(hashes, [(16, 20), (30, 7), (20, 16)], strict=True)]


def test_a_survey_names_the_picture_that_is_bad(tmp_path: Path) -> None:
    examples = [Example(_picture(tmp_path / f"{i}.png"), ("x",)) for i in range(4)]
    assert len(survey(examples, quiet=False)) == 4
    data = (tmp_path / "2.png").read_bytes()
    for bad, message in ((data[:-30], "damaged"), (b"<html>", "not a picture"), (b"", "not a picture")):
        (tmp_path / "2.png").write_bytes(bad)
        with pytest.raises(DataError, match=rf"2\.png': {message}") as caught:
            survey(examples, quiet=True)
        assert caught.value.exit_code == 3
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png': cannot be opened"):
        survey(examples, quiet=True)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_picture_that_changed_since_the_table_was_made_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    paths = [_picture(tmp_path / f"{i}.png", i) for i in range(3)]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    said = [hashes[0], hashes[1].upper(), ""]  # an empty cell says nothing
    rows = [{"file_name": path.name, "text": "x", "sha256": cell} for path, cell in zip(paths, said, strict=True)]
    with (tmp_path / f"metadata.{suffix}").open("w", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    examples = read_dataset(tmp_path)
    assert [found.sha256 for found in survey(examples, quiet=True)] == hashes

    _picture(paths[2], 9)
    survey(examples, quiet=True)
    _picture(paths[1], 9)
    with pytest.raises(
        DataError, match=r"1\.png': changed since the table was made: expected SHA-256 .*empty its cell"
    ):
        survey(examples, quiet=True)


def test_an_empty_survey(tmp_path: Path) -> None:
    assert survey([], quiet=True) == []  # a rank's share, where there are more ranks than pictures
