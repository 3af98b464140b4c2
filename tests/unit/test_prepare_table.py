import csv
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from minisd.errors import DataError
from minisd.prepare.dropping import drop, restore
from minisd.prepare.summary import counts, summary
from minisd.prepare.table import (
    COLUMNS,
    Picture,
    dropped_path,
    one_line_caption,
    picture_path,
    read_pictures,
    read_rejected,
    table_path,
    write_pictures,
    write_rejected,
)

ODD = ["NA", "null", "None", "nan", "N/A", "", "007", "1e5", "True", " space ", "=cmd()", "+a", "-a", "@a", "\ta",
       "\ra", "#", "'", "'=a", "''", 'say "hi"', "a, b", ";", "a\nb", "a\r\nb", "a\rb", "\u732b\U0001f408", "\u2028",
       "\\", "\\n", "e\u0301", "\x1b[31m", "\u202eabc", "\ufeff", "\x85"]  # fmt: skip


def _cells(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))


def _dataset(data: Path, captions: dict[str, str]) -> Path:
    """A dataset in our layout whose files have their own name in them."""
    write_pictures(data, [Picture(file_name=name, text=text, status="ok") for name, text in captions.items()])
    for name in captions:
        (data / "train" / name).write_text(name)
    return data


# --- what is written is what is read ---


def test_captions_in_metadata_csv_stay_what_they_are(tmp_path: Path) -> None:
    pictures = [Picture(file_name=f"{i}.png", text=text, width=3, height=2**20) for i, text in enumerate(ODD)]
    write_pictures(tmp_path, pictures)
    assert read_pictures(tmp_path) == pictures
    table = tmp_path / "train" / "metadata.csv"
    assert tuple(_cells(table)[0]) == COLUMNS
    assert [row[1] for row in _cells(table)[1:]] == ODD  # nothing put before formulas: these words are trained on
    with_pandas = pd.read_csv(table, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8")
    assert list(with_pandas["text"]) == ODD
    assert list(with_pandas["dhash"]) == [""] * len(ODD)


def test_what_utf_8_cannot_hold_is_left_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, [Picture(file_name="a.png", text="a\0b\ud83dc\udcffd")])
    assert read_pictures(tmp_path)[0].text == "abcd"


def test_rejected_csv_has_no_formula_and_no_control_character_from_elsewhere(tmp_path: Path) -> None:
    rows = [
        Picture(file_name=text, text=text, original_sha256=text, others=(("=cmd()", text),)) for text in ODD if text
    ]
    write_rejected(tmp_path, rows)
    assert read_rejected(tmp_path) == rows
    cells = [cell for row in _cells(tmp_path / "rejected.csv") for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]

    hostile = "\x1b]0;x\x07\u202ea\x00\udcff"
    row = Picture(source_url=hostile, query=hostile, reason=hostile, original=hostile)
    write_rejected(tmp_path, [row])
    escaped = r"\x1b]0;x\x07\u202ea\x00\udcff"
    assert read_rejected(tmp_path) == [Picture(source_url=escaped, query=escaped, reason=escaped, original=escaped)]
    write_pictures(tmp_path, [row])
    assert read_pictures(tmp_path)[0].source_url == read_pictures(tmp_path)[0].original == escaped


def test_a_strangers_table_is_read_and_keeps_its_columns_and_its_place(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("artist,file_name,text,width\nBo,a.png,one,\n=x,b.png,two,0040\n")
    pictures = read_pictures(tmp_path)
    assert pictures == [
        Picture(file_name="a.png", text="one", others=(("artist", "Bo"),)),
        Picture(file_name="b.png", text="two", width=40, others=(("artist", "=x"),)),
    ]
    write_pictures(tmp_path, [*pictures, Picture(file_name="c.png")])
    assert _cells(tmp_path / "metadata.csv")[0] == [*COLUMNS, "artist"]
    assert not (tmp_path / "train").exists()
    assert read_pictures(tmp_path) == [*pictures, Picture(file_name="c.png", others=(("artist", ""),))]


def test_no_pictures_is_a_table_too(tmp_path: Path) -> None:
    assert read_rejected(tmp_path) == []
    write_pictures(tmp_path, [])
    write_rejected(tmp_path, [])
    assert read_pictures(tmp_path) == read_rejected(tmp_path) == []


REFUSED = {
    "a width": ("file_name,text,width\na.png,x,12.5\n", "line 2: expected a width in pixels, got '12.5'"),
    "a height": ("file_name,text,height\na.png,x,5\nb.png,x,-1\n", "line 3: expected a height in pixels, got '-1'"),
    "other digits": ("file_name,text,width\na.png,x,\u0663\n", "line 2: expected a width"),
    "a long number": ("file_name,text,width\na.png,x," + "9" * 5000 + "\n", "line 2: expected a width"),
    "a name twice": (
        'file_name,text\na.png,"x\ny"\nb.png,x\na.png,z\n',
        "line 5: 'a.png' has a row already, in line 2",
    ),
    "too many fields": ("file_name,text\na.png,x,y\n", "line 2: expected 2 fields (file_name,text), got 3"),
    "a NUL": ("file_name,text\na.png,x\0\n", "line 2: expected text in UTF-8, got a NUL"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_damaged_table_is_refused_by_its_line(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_pictures(tmp_path)
    assert message in str(caught.value)


def test_a_cell_that_no_reader_takes_is_not_written(tmp_path: Path) -> None:
    longest = csv.field_size_limit()
    write_pictures(tmp_path, [Picture(file_name="a.png", text="x" * longest)])
    with pytest.raises(DataError, match=f"'b.png': expected a text of at most {longest} characters, got {longest + 1}"):
        write_pictures(tmp_path, [Picture(file_name="b.png", text="x" * (longest + 1))])
    assert len(read_pictures(tmp_path)[0].text) == longest


def test_no_table_and_two_tables_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got neither\. Make it with: python prepare_data\.py clean"):
        table_path(tmp_path)
    write_pictures(tmp_path, [])
    assert table_path(tmp_path) == tmp_path / "train" / "metadata.csv"
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(DataError, match="got both"):
        read_pictures(tmp_path)


# --- names lead nowhere else ---


@pytest.mark.parametrize("find", [picture_path, dropped_path, drop, restore])
def test_no_name_leads_out_of_the_dataset(tmp_path: Path, find: Callable[[Path, str], object]) -> None:
    data = tmp_path / "data"
    outside = tmp_path / "secret.png"
    outside.write_text("secret")
    names = [
        "../secret.png",
        "../../secret.png",
        str(outside),
        "a/../../../secret.png",
        "..\\secret.png",
        "",
        "link.png",
    ]
    _dataset(data, {"a.png": "x"})
    (data / "dropped").mkdir()
    for folder in ("train", "dropped"):
        (data / folder / "link.png").symlink_to(outside)
    write_pictures(data, [Picture(file_name=name) for name in names])
    if find is restore:
        write_pictures(data, [])
        write_rejected(data, [Picture(file_name=name, status="dropped") for name in names])
        (data / "train" / "link.png").unlink()
    for name in names:
        with pytest.raises(DataError):
            find(data, name)
    assert outside.read_text() == "secret"


# --- out and back ---


def test_a_dropped_picture_comes_back_as_it_was(tmp_path: Path) -> None:
    captions = {f"{i:06d}-aaaaaaaa.png": text for i, text in enumerate(ODD)}
    data = _dataset(tmp_path, captions)
    write_rejected(data, [Picture(original="other.png", status="too small")])
    flagged = Picture(
        file_name="000003-aaaaaaaa.png", text="x", status="check", reason="empty; too long", caption_source="blip"
    )
    before = [flagged if row.file_name == flagged.file_name else row for row in read_pictures(data)]
    write_pictures(data, before)
    names = [*captions][::3] + [*captions][::-3]
    names = list(dict.fromkeys(names))

    for count, name in enumerate(names, start=1):
        drop(data, name)
        assert not (data / "train" / name).exists()
        assert (data / "dropped" / name).read_text() == name
        assert dropped_path(data, name) == (data / "dropped" / name).resolve()
        assert len(read_pictures(data)) == len(before) - count
        last = read_rejected(data)[-1]
        assert (last.file_name, last.status) == (name, "dropped")
    reasons = {row.file_name: row.reason for row in read_rejected(data)}
    assert reasons[flagged.file_name] == "taken out by hand; empty; too long"
    assert reasons["000000-aaaaaaaa.png"] == "taken out by hand"

    for name in names:
        restore(data, name)
    assert read_pictures(data) == before  # in the order of names again
    assert read_rejected(data) == [Picture(original="other.png", status="too small")]
    assert {path.name: path.read_text() for path in (data / "train").glob("*.png")} == {name: name for name in captions}


@pytest.mark.parametrize("move", [drop, restore])
def test_a_move_that_was_interrupted_is_finished_by_the_next_one(
    tmp_path: Path, move: Callable[[Path, str], None]
) -> None:
    data = _dataset(tmp_path, {"a.png": "x", "b.png": "y"})
    if move is restore:
        drop(data, "b.png")
    drop(data, "a.png")
    (data / "dropped" / "a.png").rename(data / "train" / "a.png")  # as if the file had not been moved yet
    assert dropped_path(data, "a.png") == (data / "train" / "a.png").resolve()
    move(data, "b.png")
    assert dropped_path(data, "a.png") == (data / "dropped" / "a.png").resolve()


def test_dropping_in_a_flat_folder_with_folders_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_text("a")
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub/a.png,one\n")
    drop(tmp_path, "sub/a.png")
    assert (tmp_path / "dropped" / "sub" / "a.png").read_text() == "a"
    restore(tmp_path, "sub/a.png")
    assert picture_path(tmp_path, "sub/a.png").read_text() == "a"


def test_no_file_is_overwritten_by_a_move(tmp_path: Path) -> None:
    data = _dataset(tmp_path, {"a.png": "x", "b.png": "y"})
    (data / "dropped").mkdir()
    (data / "dropped" / "a.png").write_text("older")
    with pytest.raises(DataError, match="expected nothing of that name"):
        drop(data, "a.png")
    drop(data, "b.png")
    (data / "train" / "b.png").write_text("newer")
    with pytest.raises(DataError, match="expected nothing of that name"):
        restore(data, "b.png")
    texts = {str(path.relative_to(data)): path.read_text() for path in data.rglob("*.png")}
    assert texts == {"train/a.png": "a.png", "dropped/a.png": "older", "dropped/b.png": "b.png", "train/b.png": "newer"}
    assert [row.text for row in read_pictures(data)] == ["x"]


@pytest.mark.parametrize("move", [drop, restore])
def test_a_picture_that_is_not_there_is_refused(tmp_path: Path, move: Callable[[Path, str], None]) -> None:
    data = _dataset(tmp_path, {"a.png": "x"})
    write_rejected(data, [Picture(file_name="c.png", status="too small")])
    for name in ("b.png", "c.png", "\0"):
        with pytest.raises(DataError, match="expected a picture that is in"):
            move(data, name)
    (data / "train" / "a.png").unlink()
    if move is restore:
        write_rejected(data, [Picture(file_name="d.png", status="dropped")])
    with pytest.raises(DataError, match="no such file"):
        move(data, "a.png" if move is drop else "d.png")


# --- captions at a keyboard, and the last line ---


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  a \t b\r\nc\u2028d\x85e\x0bf\u3000g ", "a b c d e f g"),
        ("a\0b\x1b[31mc\x7fd\x9b", "ab[31mcd"),
        ("\u202eabc\u2066d\u200f\u061c", "abcd"),
        ("a\ud83d b\udcff", "a b"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),
        ("e\u0301 \u00e9 =1+1 'a', \"b\"", None),
        (" \0\n", ""),
    ],
)
def test_one_line_caption_keeps_what_can_be_seen(text: str, wanted: str | None) -> None:
    assert one_line_caption(text) == (text if wanted is None else wanted)
    assert one_line_caption(one_line_caption(text)) == one_line_caption(text)


def test_the_summary_says_how_many_and_why_not() -> None:
    statuses = ["duplicate"] * 12 + ["not a picture"] * 9 + ["too small"] * 5
    rejected = [Picture(status=status) for status in statuses]
    said = "100 wanted, 74 kept; left out: 12 duplicates, 9 not pictures, 5 too small"
    assert summary(74, rejected, 100) == said
    assert summary(74, rejected, None) == said.removeprefix("100 wanted, ")
    one = [Picture(status=status) for status in ("not a picture", "near-duplicate", "duplicate", "damaged")]
    assert counts(one) == "1 damaged, 1 duplicate, 1 near-duplicate, 1 not a picture"
    assert summary(3, [], None) == "3 kept; left out: none"
