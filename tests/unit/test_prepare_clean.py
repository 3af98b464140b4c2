import csv
import hashlib
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minisd.data import read_dataset, survey
from minisd.errors import DataError, MinisdError, UsageError
from minisd.picture_files import PictureError
from minisd.pocket import scenes
from minisd.prepare import clean as stage
from minisd.prepare.clean import clean
from minisd.prepare.dropping import drop, restore
from minisd.prepare.examine import Examined, Written
from minisd.prepare.journal import Found, Journal
from minisd.prepare.options import Clean, Rules
from minisd.prepare.table import Picture, read_pictures, read_rejected, write_pictures
from tests.inline_pool import InlinePool

RULES = Rules(min_side=48)


def _picture(path: Path, index: int, size: tuple[int, int] = (64, 56), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes.draw(scenes.scene_at(index, 0), "8bit").resize(size).save(path, **options)
    return path


def _clean(output: Path, source: Path | None, **options: Any) -> None:
    clean(Clean(output=output, source=source, rules=options.pop("rules", RULES), **options))


def _kept(output: Path) -> dict[str, Picture]:
    """By the name of the original."""
    return {row.original: row for row in read_pictures(output)}


def _left_out(output: Path) -> dict[str, str]:
    """Original -> status."""
    return {row.original: row.status for row in read_rejected(output)}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for index, name in enumerate(["a.png", "b.jpg", "sub/c.webp"]):
        _picture(folder / name, index)
    (folder / "a.txt").write_text('a castle, "old"\nanother\n', encoding="utf-8")
    return folder


# --- what it makes ---


def test_a_folder_becomes_a_dataset_that_train_and_datasets_open(source: Path, tmp_path: Path) -> None:
    import datasets

    output = tmp_path / "data"
    shutil.copy(source / "a.png", source / "z-copy.png")
    _picture(source / "b-large.png", 1, (128, 112))
    _picture(source / "small.png", 5, (40, 56))
    _picture(source / "narrow.png", 6, (400, 60))
    (source / "page.jpg").write_text("<html>")
    (source / "notes.md").write_text("not a picture, and does not say so")
    before = _tree(source)
    _clean(output, source)
    assert _tree(source) == before

    rows = read_pictures(output)
    assert [row.original for row in rows] == ["a.png", "b-large.png", "sub/c.webp"]
    for number, row in enumerate(rows):
        original = source / row.original
        assert row.file_name == f"{number:06d}-{_sha256(original)[:8]}.png"
        assert row.original_sha256 == _sha256(original)
        path = output / "train" / row.file_name
        assert row.sha256 == _sha256(path)
        with Image.open(path) as image, Image.open(original) as before_image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (row.width, row.height))
            assert image.tobytes() == before_image.convert("RGB").tobytes()
        assert (row.status, row.reason) == ("ok", "")
    assert rows[0].text == 'a castle, "old"'
    assert [row.caption_source for row in rows] == ["sidecar", "", ""]

    assert _left_out(output) == {
        "b.jpg": "near-duplicate",
        "narrow.png": "too narrow",
        "page.jpg": "not a picture",
        "small.png": "too small",
        "z-copy.png": "duplicate",
    }
    rejected = {row.original: row for row in read_rejected(output)}
    assert rejected["b.jpg"].duplicate_of == rows[1].file_name
    assert (rejected["b.jpg"].width, rejected["b.jpg"].height) == (64, 56)
    assert rejected["z-copy.png"].duplicate_of == rows[0].file_name
    assert rejected["small.png"].reason == "40 x 56 pixels, expected sides of at least 48"
    previews = {f"{_sha256(source / name)[:16]}.jpg" for name in ("b.jpg", "small.png", "narrow.png")}
    assert {path.name for path in (output / "left_out").iterdir()} == previews

    examples = read_dataset(output)
    assert [example.captions for example in examples] == [(rows[0].text,), ("",), ("",)]
    assert [found.sha256 for found in survey(examples, quiet=True)] == [row.sha256 for row in rows]
    opened = datasets.load_dataset("imagefolder", data_dir=str(output), cache_dir=str(tmp_path / "cache"))["train"]
    # A caption that is empty is none to datasets, which reads with pandas' defaults.
    assert [text or "" for text in opened["text"]] == [row.text for row in rows]
    assert [image.size for image in opened["image"]] == [(row.width, row.height) for row in rows]


def test_resized_pictures_are_what_training_takes(tmp_path: Path) -> None:
    _picture(tmp_path / "mine" / "a.png", 0, (300, 200))
    _clean(tmp_path / "data", tmp_path / "mine", rules=replace(RULES, resize=64))
    [row] = read_pictures(tmp_path / "data")
    assert row.width * row.height < 1.5 * 64 * 64


# --- run again ---


def test_a_second_run_changes_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    _clean(output, source)
    before = {path: path.stat().st_mtime_ns for path in (output / "train").glob("*.png")}
    tree = _tree(output)
    _clean(output, source, rules=replace(RULES, min_side=60))  # what is in the table is not judged anew
    assert _tree(output) == tree
    assert {path: path.stat().st_mtime_ns for path in (output / "train").glob("*.png")} == before


def test_a_second_run_adds_what_is_new_and_keeps_what_was_decided(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    _clean(output, source)
    rows = _kept(output)
    edited = replace(rows["a.png"], text="edited\ntwice", caption_source="edited", status="check", reason="too long")
    emptied = replace(rows["sub/c.webp"], text="", caption_source="edited")
    write_pictures(output, [edited, rows["b.jpg"], emptied])
    drop(output, rows["b.jpg"].file_name)

    _picture(source / "0-new.png", 7)
    _picture(source / "a-better.png", 0, (128, 112))  # than one that is settled
    _picture(source / "b-better.png", 1, (128, 112))  # than one that a person did not want
    (source / "b.txt").write_text("late")
    (source / "sub" / "c.txt").write_text("late")
    _clean(output, source)
    kept = read_pictures(output)
    assert kept[:2] == [edited, emptied]
    assert [row.original for row in kept[2:]] == ["0-new.png"]
    assert kept[2].file_name.startswith("000003-")
    assert _left_out(output) == {
        "b.jpg": "dropped",
        "a-better.png": "near-duplicate",
        "b-better.png": "near-duplicate",
    }
    restore(output, rows["b.jpg"].file_name)
    _clean(output, source)
    assert _kept(output)["b.jpg"] == replace(rows["b.jpg"], text="late", caption_source="sidecar")


def test_the_number_of_a_dropped_picture_is_not_given_again(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    _clean(output, source)
    drop(output, read_pictures(output)[-1].file_name)
    _picture(source / "new.png", 7)
    _clean(output, source)
    assert _kept(output)["new.png"].file_name.startswith("000003-")


def test_a_file_that_is_gone_is_made_anew_under_its_name(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "data"
    _clean(output, source)
    tree = _tree(output)
    rows = _kept(output)
    (output / "train" / rows["a.png"].file_name).unlink()
    _clean(output, source)
    assert _tree(output) == tree
    (output / "train" / rows["a.png"].file_name).unlink()
    (source / "a.png").unlink()
    _clean(output, source)
    assert "1 rows of the table have no file" in caplog.text
    assert _kept(output) == rows


def test_what_was_collected_and_what_is_ones_own_are_left_out_side_by_side(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    raw = output / "raw"
    names = []
    for index in (10, 11):
        path = _picture(raw / "x.png", index, (64, 56) if index == 10 else (20, 20))
        names.append(f"{_sha256(path)[:16]}.png")
        path.rename(raw / names[-1])
    shared: dict[str, Any] = {"query": "castle", "fetched_at": "2026-01-01T00:00:00+00:00", "sha256": "0" * 64}
    shared["dhash"] = "0" * 16 + "-" + "0" * 54
    journal = [
        Found(url="https://a/1", status="kept", file_name=names[0], **shared),
        Found(url="https://a/2", status="kept", file_name=names[1], **shared),
        Found(url="https://a/3", status="unreachable", reason="404", **shared),
    ]
    with Journal(raw) as file:
        for found in journal:
            file.append(found)
    _clean(output, None)
    [row] = read_pictures(output)
    assert (row.source_url, row.query, row.fetched_at) == ("https://a/1", "castle", shared["fetched_at"])
    assert {row.source_url: row.status for row in read_rejected(output)} == {
        "https://a/2": "too small",
        "https://a/3": "unreachable",
    }
    _picture(source / "small.png", 5, (20, 20))
    for _ in range(2):
        _clean(output, source)
        assert len(read_pictures(output)) == 4
        assert sorted(row.source_url or row.original for row in read_rejected(output)) == [
            "https://a/2",
            "https://a/3",
            "small.png",
        ]
    _clean(output, None)
    assert len(read_rejected(output)) == 3


def test_one_that_cannot_be_written_makes_place_for_what_looks_like_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = _picture(source / "a-large.png", 0, (128, 112))
    changed = _picture(source / "changed.png", 9)
    real_write, real_examine = stage.write_png, stage.examine

    def write_png(path: Path, target: Path, rules: Rules) -> Written:
        if path == large:
            raise PictureError("damaged", "took more than 20 s to decode", path)
        return real_write(path, target, rules)

    def examine(path: Path, rules: Rules) -> Examined:
        found = real_examine(path, rules)
        return replace(found, sha256="0" * 64) if path == changed else found

    monkeypatch.setattr(stage, "GuardedPool", InlinePool)
    monkeypatch.setattr(stage, "write_png", write_png)
    monkeypatch.setattr(stage, "examine", examine)
    _clean(tmp_path / "data", source)
    assert set(_kept(tmp_path / "data")) == {"a.png", "b.jpg", "sub/c.webp"}
    assert _left_out(tmp_path / "data") == {"a-large.png": "damaged", "changed.png": "unreadable"}
    assert (len([*(tmp_path / "data" / "train").glob("*.png")])) == 3


# --- captions of the source ---


def test_captions_come_from_a_table_before_a_sidecar(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "b.txt").write_text("not used")
    shutil.copy(source / "sub" / "c.webp", source / "twin.webp")
    lines: list[dict[str, object]] = [
        {"file_name": "./b.jpg", "text": [" from the\ntable ", "second"]},
        {"file_name": "a.png", "text": " "},
        {"file_name": "twin.webp", "text": "said of a copy"},
        {"file_name": "gone.png", "text": "x"},
    ]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _clean(tmp_path / "data", source)
    kept = _kept(tmp_path / "data")
    assert {name: (row.text, row.caption_source) for name, row in kept.items()} == {
        "a.png": ('a castle, "old"', "sidecar"),
        "b.jpg": (" from the\ntable ", "table"),
        "sub/c.webp": ("said of a copy", "table"),
    }
    assert "2 pictures have several captions" in caplog.text
    assert "1 rows of" in caplog.text
    assert "'gone.png'" in caplog.text


BAD_CAPTIONS: dict[str, tuple[str, bytes, str]] = {
    "a sidecar in Latin-1": ("b.txt", b"x\ncaf\xe9", r"b.txt', line 2: expected text in UTF-8"),
    "a row twice": ("metadata.csv", b"file_name,text\na.png,x\n./a.png,y\n", "line 3: './a.png' has a row already"),
    "a name outside": ("metadata.csv", b"file_name,text\n../a.png,x\n", "line 2: '../a.png' is outside the dataset"),
    "a damaged table": ("metadata.csv", b'file_name,text\na.png,"x\n', "line 2: not CSV"),
    "a long one": ("b.txt", b"x" * 140_000, "'b.jpg': expected a caption of at most 131072 characters, got 140000"),
    "two tables": ("train/metadata.csv", b"file_name,text\n", "expected one table"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_CAPTIONS))
def test_captions_that_cannot_be_read_are_refused_before_anything_is_done(
    source: Path, tmp_path: Path, case: str
) -> None:
    name, content, message = BAD_CAPTIONS[case]
    (source / "train").mkdir()
    (source / name).write_bytes(content)
    if name.startswith("train"):
        (source / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(DataError) as caught:
        _clean(tmp_path / "data", source)
    assert message in str(caught.value)
    assert not (tmp_path / "data" / "rejected.csv").exists()


# --- odd files and names ---


def test_what_is_no_file_is_left_out_without_waiting(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe.png")
    _picture(source / "folder.png" / "d.png", 3)
    (source / "dangling.png").symlink_to("nowhere.png")
    (source / "round.png").symlink_to("round.png")
    (source / "device.png").symlink_to("/dev/null")
    (source / "empty.png").touch()
    (source / ".hidden.png").write_text("x")
    _picture(source / ".hidden" / "e.png", 4)
    _clean(tmp_path / "data", source)
    assert set(_kept(tmp_path / "data")) == {"a.png", "b.jpg", "sub/c.webp", "folder.png/d.png"}
    unreadable = {"pipe.png", "folder.png", "dangling.png", "round.png", "device.png"}
    assert _left_out(tmp_path / "data") == dict.fromkeys(unreadable, "unreadable") | {"empty.png": "not a picture"}


def test_every_name_is_taken_and_pictures_are_known_by_content(tmp_path: Path) -> None:
    source, output = tmp_path / "mine", tmp_path / "data"
    names = [" space .png", "quote\".png", "new\nline.png", "\U0001f408.png", "\u202ertl.png", "cafe\u0301.png",
             "caf\u00e9.png", "A.png", "a.png", "-dash.png", "back\\slash.png", "=cmd().png", "x" * 251 + ".png",
             os.fsdecode(b"latin\xe9.png"), "no suffix", "upper.PNG"]  # fmt: skip
    for index, name in enumerate(names):
        with (source / "x.png" if source.exists() else _picture(source / "x.png", 0)).open("wb") as file:
            scenes.draw(scenes.scene_at(index, 0), "8bit").resize((64, 56)).save(file, "PNG")
        (source / "x.png").rename(source / name)
    for name in ("read.txt", "table.csv"):  # no picture, whatever is in it
        shutil.copy(source / "a.png", source / name)
    _clean(output, source)
    rows = read_pictures(output)
    assert len(rows) == len(names)
    assert all(row.original.isprintable() for row in rows)
    assert {row.original_sha256 for row in rows} == {_sha256(source / name) for name in names}
    tree = _tree(output)
    _clean(output, source)
    assert _tree(output) == tree


def test_links_that_lead_out_are_refused_unless_they_may(source: Path, tmp_path: Path) -> None:
    _picture(tmp_path / "elsewhere" / "d.png", 3)
    _picture(tmp_path / "e.png", 4)
    (tmp_path / "said.txt").write_text("from elsewhere")
    (source / "folder").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    (source / "e.png").symlink_to(tmp_path / "e.png")
    (source / "sub" / "again.png").symlink_to(source / "a.png")
    root = tmp_path / "link"
    root.symlink_to(source)  # the folder itself may be one
    _clean(tmp_path / "one", root)
    assert set(_kept(tmp_path / "one")) == {"a.png", "b.jpg", "sub/c.webp"}
    assert _left_out(tmp_path / "one") == {
        "e.png": "unreadable",
        "folder": "unreadable",
        "sub/again.png": "duplicate",
    }
    _clean(tmp_path / "two", root, follow_symlinks=True)
    assert set(_kept(tmp_path / "two")) == {"a.png", "b.jpg", "sub/c.webp", "e.png", "folder/d.png"}

    (source / "b.txt").symlink_to(tmp_path / "said.txt")
    with pytest.raises(DataError, match="leads out of the folder"):
        _clean(tmp_path / "three", root)
    _clean(tmp_path / "two", root, follow_symlinks=True)
    assert _kept(tmp_path / "two")["b.jpg"].text == "from elsewhere"


# --- folders ---


def test_folders_that_could_come_to_harm_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    (tmp_path / "home" / "me").mkdir(parents=True)
    output = tmp_path / "data"
    (output / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    refused = [(source, source), (source / ".." / "mine", source), (tmp_path / "link", source), (Path("/"), source),
               (tmp_path / "home" / "me", source), (tmp_path / "home", source), (output, output / "train"),
               (output, output / "left_out")]  # fmt: skip
    (output / "left_out").mkdir()
    before = _tree(tmp_path)
    for out, of in refused:
        with pytest.raises(UsageError, match="--output"):
            _clean(out, of)
    for of in (tmp_path / "nowhere", source / "a.png"):
        with pytest.raises(DataError, match="expected a folder of pictures"):
            _clean(output, of)
    with pytest.raises(DataError, match="Collect pictures first"):
        _clean(output, None)
    (output / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UsageError, match="has a table of its own"):
        _clean(output, source)
    (output / "metadata.csv").unlink()
    assert _tree(tmp_path) == before


def test_a_dataset_inside_the_folder_is_not_scanned_and_nothing_of_others_is_deleted(source: Path) -> None:
    output = source / "data"
    theirs = {"notes.md": "x", "train/theirs.png": "x", "left_out/theirs.jpg": "x", "train/000009-aaaaaaaa.png": "x"}
    for name, text in theirs.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    for _ in range(2):
        _clean(output, source)
        assert set(_kept(output)) == {"a.png", "b.jpg", "sub/c.webp"}
        assert _left_out(output) == {}
    assert {name: (output / name).read_text() for name in theirs} == theirs


def test_no_picture_at_all_is_refused_with_the_counts(tmp_path: Path) -> None:
    source, output = tmp_path / "mine", tmp_path / "data"
    source.mkdir()
    with pytest.raises(DataError, match="expected pictures to keep, got none; the folder has none"):
        _clean(output, source)
    _picture(source / "a.png", 0, (20, 20))
    _picture(source / "b.png", 1, (20, 20))
    (source / "c.png").write_text("x")
    with pytest.raises(DataError, match="got none; left out: 2 too small, 1 not a picture"):
        _clean(output, source)
    assert set(_left_out(output)) == {"a.png", "b.png", "c.png"}
    assert not (output / "train" / "metadata.csv").exists()


def test_a_hash_that_is_none_and_a_name_that_is_not_ours_do_no_harm(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    (tmp_path / "evil").mkdir()
    for name in ("../x.png", "../../evil/000000-aaaaaaaa.png"):
        row = Picture(file_name=name, dhash="zz", original_sha256=_sha256(source / "a.png"))
        write_pictures(output, [row])
        _clean(output, source)
        assert set(_kept(output)) == {"", "b.jpg", "sub/c.webp"}
        assert not (output / "train" / name).exists()


def test_the_end_is_told_in_one_line(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source / "c.png").write_text("x")
    with caplog.at_level(logging.INFO):
        _clean(tmp_path / "data", source)
    assert caplog.messages[-1] == "3 kept; left out: 1 not a picture"


def test_an_output_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(MinisdError, match="cannot be made"):
        _clean(tmp_path / "data", source)


def test_a_table_that_lost_its_columns_or_got_empty_rows_is_still_known(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    _clean(output, source)
    before = read_pictures(output)
    with (output / "train" / "metadata.csv").open("w", newline="") as file:
        rows = [(row.file_name, row.text) for row in before]
        csv.writer(file).writerows([("file_name", "text"), *rows, ("", ""), ("", "")])
    _clean(output, source)
    after = read_pictures(output)
    assert [row.file_name for row in after] == [row.file_name for row in before]
    assert [row.original_sha256 for row in after] == [row.original_sha256 for row in before]


def test_what_a_killed_run_wrote_is_not_left_beside_what_the_next_one_writes(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    _clean(output, source)
    rows = read_pictures(output)
    write_pictures(output, rows[:1])  # as if killed before the others were noted
    _picture(source / "0-first.png", 77, (64, 64))  # takes a number that one of them had
    _clean(output, source)
    names = {row.file_name for row in read_pictures(output)}
    assert len(names) == len(rows) + 1
    assert {path.name for path in (output / "train").glob("*.png")} == names


def test_what_is_in_raw_by_hand_is_rejected_once_however_often_it_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    _picture(tmp_path / "raw" / "good.png", 1, (64, 64))
    _picture(tmp_path / "raw" / "small.png", 2, (20, 20))
    for _ in range(3):
        clean(Clean(output=tmp_path, rules=Rules(min_side=48)))
        assert [row.original for row in read_rejected(tmp_path)] == ["small.png"]


def test_animations_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "mine" / "a.gif", save_all=True, append_images=frames[1:])
    _picture(tmp_path / "mine" / "b.png", 2, (64, 64))
    with caplog.at_level("INFO"):
        _clean(tmp_path / "data", tmp_path / "mine")
    assert "1 animations: the first frame of each is taken" in caplog.text
