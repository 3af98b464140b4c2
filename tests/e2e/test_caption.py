"""`prepare_data.py caption`: what is described and what is kept, on one process and two, stopped anywhere, and with
pictures, words and machines that fail.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minisd.data import read_dataset
from minisd.errors import DataError
from minisd.pocket import scenes
from minisd.prepare import caption as module
from minisd.prepare.blip import load_captioner
from minisd.prepare.caption import caption
from minisd.prepare.caption_journal import Said, read_said, write_said
from minisd.prepare.caption_lint import count_tokens, tidy
from minisd.prepare.options import Caption, Captioner
from minisd.prepare.table import Picture, one_line_caption, read_pictures, write_pictures
from tests.e2e.running import torchrun
from tests.faults.harness import KILLED, count_operations, fork, wait, with_fault
from tests.tiny_blip import write_tiny_blip

PICTURES = 11
HAD = {  # captions that are there, with their source and what is odd about them
    2: ("NA, =cmd()\n\u00e9", "sidecar", "trigger missing"),
    5: ("8bit by hand", "edited", ""),
    7: ("8bit " + "castle " * 80, "table", "repeated phrase; too long"),
}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    write_tiny_blip(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What `clean` leaves behind: pictures, of which some have captions."""
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    pictures = []
    for index in range(PICTURES):
        name = f"{index + 1:06d}-{index:08x}.png"
        scenes.draw(scenes.scene_at(index, 0), "8bit").save(data / "train" / name)
        text, source, _ = HAD.get(index, ("", "", ""))
        pictures.append(
            Picture(file_name=name, text=text, caption_source=source, width=64, height=64, sha256=f"{index:064x}")
        )
    write_pictures(data, pictures)
    return data


def options(data: Path, **captioner: Any) -> Caption:
    defaults = {"batch_size": 4, "max_new_tokens": 12, "trigger": "8bit"}
    return Caption(data=data, captioner=Captioner(**(defaults | captioner)))


def colours(images: Sequence[Image.Image]) -> list[str]:
    """Stands for BLIP: what it says is a function of the picture."""
    return ["red {} green {} blue {}".format(*image.resize((1, 1)).getpixel((0, 0))) for image in images]


def expected(data: Path, describe: Callable[[Sequence[Image.Image]], list[str]] = colours) -> list[str]:
    """The captions that a run without incidents gives."""
    found = []
    for index, picture in enumerate(read_pictures(data)):
        image = Image.open(data / "train" / picture.file_name).convert("RGB")
        found.append(HAD[index][0] if index in HAD else f"8bit, {describe([image])[0]}")
    return found


def texts(data: Path) -> list[str]:
    return [picture.text for picture in read_pictures(data)]


def left_over(data: Path) -> list[str]:
    names = {str(path.relative_to(data)) for path in data.rglob("*") if path.suffix not in (".png", ".csv")}
    return sorted(names - {"train"})


def test_pictures_without_a_caption_get_one_from_blip_and_others_keep_theirs(
    data: Path, blip: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caption(options(data, caption_model=str(blip), prefix="view of"))
    images = [Image.open(data / "train" / picture.file_name).convert("RGB") for picture in read_pictures(data)]
    said = load_captioner(blip, num_beams=4, max_new_tokens=12, repetition_penalty=1.2).describe(images)
    for index, (picture, words) in enumerate(zip(read_pictures(data), said, strict=True)):
        if index in HAD:
            assert (picture.text, picture.caption_source, picture.reason) == HAD[index]
        else:
            assert picture.text == f"8bit, view of {one_line_caption(tidy(words))}"
            assert picture.caption_source == "blip"
        assert picture.status == ("check" if picture.reason else "ok")
    assert len({*texts(data)}) == PICTURES
    assert left_over(data) == []
    assert len(read_dataset(data)) == PICTURES
    assert f"{PICTURES} pictures: 8 described, 3 had captions" in caplog.messages
    assert "to look at: " in caplog.text
    assert "1 too long" in caplog.text
    assert "1 trigger missing" in caplog.text
    assert capsys.readouterr().out == ""

    # Once more there is nothing to do, and no model is needed; with --recaption everything is.
    before = (data / "train" / "metadata.csv").read_bytes()
    caption(options(data, caption_model="/absent"))
    assert (data / "train" / "metadata.csv").read_bytes() == before
    caption(options(data, recaption=True), describe=lambda images: ["a tree"] * len(images))
    assert texts(data) == ["8bit, a tree"] * PICTURES


def test_two_processes_write_what_one_does(data: Path, blip: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(data, tmp_path / "alone"))
    caption(options(alone, caption_model=str(blip)))
    words = ["--caption-model", str(blip), "--batch-size", "4", "--max-new-tokens", "12", "--trigger", "8bit"]
    result = torchrun("prepare_data.py", "caption", "--data", str(data), *words, processes=2)
    assert result.returncode == 0, result.stderr
    assert f"{PICTURES} pictures: 8 described, 3 had captions" in result.stderr
    assert (data / "train" / "metadata.csv").read_bytes() == (alone / "train" / "metadata.csv").read_bytes()
    assert left_over(data) == ["run.lock"]


def test_a_batch_is_always_of_the_same_size(data: Path) -> None:
    """The last bits of what is computed depend on it, and with them, now and then, a word."""
    sizes = []

    def describe(images: Sequence[Image.Image]) -> list[str]:
        sizes.append(len(images))
        return colours(images)

    caption(options(data, batch_size=5), describe=describe)
    assert sizes == [5, 5]
    assert texts(data) == expected(data)


# --- stopped ---
def test_killed_at_any_file_operation_it_goes_on_as_if_nothing_had_been(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)
    count_tokens(["a"])  # the tokenizer, which is then there in each child
    run, calls = tmp_path / "run", 0

    def describe(images: Sequence[Image.Image]) -> list[str]:
        nonlocal calls
        calls += 1
        return colours(images)

    def work() -> None:
        caption(options(run, batch_size=2), describe=describe)

    shutil.copytree(data, run)
    count = count_operations(work)
    assert calls == 4
    done = (run / "train" / "metadata.csv").read_bytes()
    assert texts(run) == expected(data)
    assert count > 25
    spared = safe = 0
    for at in range(1, count + 1):
        shutil.rmtree(run)
        shutil.copytree(data, run)
        assert with_fault(work, at, "kill") == KILLED
        had = len(read_said(run))
        assert all(text in ("", wanted) for text, wanted in zip(texts(run), expected(data), strict=True))
        before, safe = safe, max(had, sum(text != "" for text in texts(run)) - len(HAD))
        assert safe >= before, "written captions are lost for a moment"
        calls = 0
        work()
        assert (run / "train" / "metadata.csv").read_bytes() == done, f"killed at {at} of {count}"
        assert left_over(run) == []
        assert calls == 4 - had // 2 or had == 0
        spared += 4 - calls
    assert spared > count, "what was written before the end was written again"


@pytest.mark.parametrize("recaption", [False, True])
def test_killed_in_the_middle_at_most_seconds_are_lost(
    recaption: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)
    asked = options(data, recaption=recaption, batch_size=2)
    described = 0

    def describe(images: Sequence[Image.Image]) -> list[str]:
        nonlocal described
        described += 1
        if described == 4:
            os._exit(KILLED)
        return colours(images)

    assert wait(fork(lambda: caption(asked, describe=describe))) == KILLED
    assert len(read_said(data)) == 6
    described = 10
    caption(asked, describe=describe)
    assert described == 10 + (3 if recaption else 1)
    plain = expected(data)
    if recaption:
        again = [f"8bit, {words}" for words in colours([Image.open(p) for p in sorted((data / "train").glob("*.png"))])]
        plain = [again[index] for index in range(PICTURES)]
    assert texts(data) == plain


def test_journals_of_any_number_of_processes_are_taken_over(data: Path) -> None:
    asked = options(data)
    pictures = read_pictures(data)
    settings = module._settings(asked.captioner)

    def said(index: int, text: str, settings: str = settings, **changes: str) -> Said:
        key = {"file_name": pictures[index].file_name, "sha256": pictures[index].sha256}
        return Said(text=text, settings=settings, **(key | changes))

    write_said(data, 0, [said(0, "of rank 0"), said(5, "not over one by hand")])
    write_said(data, 3, [said(1, "of rank 3"), said(3, "of another file", sha256="0" * 64), said(4, "")])
    write_said(data, 12, [said(6, "of another model", settings="another")])
    (data / "captions" / ".tmp-rank-1.jsonl-999999999").write_text("half")
    seen = []

    def describe(images: Sequence[Image.Image]) -> list[str]:
        seen.extend(images)
        return colours(images)

    caption(replace(asked, captioner=replace(asked.captioner, batch_size=1)), describe=describe)
    result = expected(data)
    result[0], result[1], result[4], result[6] = "of rank 0", "of rank 3", "", "of another model"
    assert texts(data) == result
    assert len(seen) == 4
    assert left_over(data) == []


def test_an_interrupted_recaption_is_not_taken_for_one_with_other_options(data: Path) -> None:
    """With --recaption what was said with other options counts only where there is nothing else."""
    name, sha256 = read_pictures(data)[5].file_name, read_pictures(data)[5].sha256
    write_said(data, 0, [Said(file_name=name, sha256=sha256, text="of a smaller model", settings="another")])
    caption(options(data, recaption=True), describe=lambda images: [""] * len(images))
    assert texts(data)[5] == "8bit by hand"  # nothing new was said, so the old one stays
    caption(options(data, recaption=True), describe=lambda images: ["a tree"] * len(images))
    assert texts(data)[5] == "8bit, a tree"


@pytest.mark.parametrize(
    "line", ["half a li", "[]", '{"file_name": "a"}', '{"file_name": 1, "sha256": "", "text": "", "settings": ""}']
)
def test_a_damaged_journal_is_named(line: str, data: Path) -> None:
    write_said(data, 1, [Said(file_name="a", sha256="", text="", settings="")])
    with (data / "captions" / "rank-1.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"rank-1\.jsonl', line 2: not a line that caption writes. Delete the file"):
        caption(options(data), describe=colours)


# --- what fails ---
def test_one_failed_picture_does_not_end_the_run(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = read_pictures(data)
    (data / "train" / pictures[1].file_name).write_bytes(b"no picture")
    (data / "train" / pictures[3].file_name).unlink()
    bad = Image.open(data / "train" / pictures[8].file_name).convert("RGB").tobytes()

    def describe(images: Sequence[Image.Image]) -> list[str]:
        if any(image.tobytes() == bad for image in images):
            raise RuntimeError("CUDA error: on\nseveral lines")
        return colours(images)

    caplog.set_level(logging.INFO)
    caption(options(data), describe=describe)
    found = {index: picture for index, picture in enumerate(read_pictures(data)) if not picture.text}
    assert {index: (picture.status, picture.reason) for index, picture in found.items()} == dict.fromkeys(
        (1, 3, 8), ("check", "empty; trigger missing")
    )
    assert "a batch of 4 failed, now one by one: RuntimeError: CUDA error: on several lines" in caplog.messages
    for index in found:
        assert sum(f"{pictures[index].file_name} is not described: " in message for message in caplog.messages) == 1
    assert f"{PICTURES} pictures: 5 described, 3 had captions" in caplog.messages
    assert "3 pictures could not be described. Run caption again, or leave them out." in caplog.messages
    caplog.clear()
    caption(options(data), describe=colours)
    # These are tried again, and no others.
    assert f"{PICTURES} pictures: 1 described, 8 had captions" in caplog.messages


def test_what_blip_says_is_cleaned_and_counted(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = iter(
        ["", "...", "an arafed cat", "a hat on a hat on a hat", "x" * 1000, "a\0\u202e cat", "\ud800cat", "a cat"]
    )
    caplog.set_level(logging.INFO)
    caption(options(data, batch_size=1, trigger=None), describe=lambda images: [next(words)])
    new = [text for index, text in enumerate(texts(data)) if index not in HAD]
    assert new == ["", "", "a cat", "a hat on a hat", "x" * 300, "a cat", "cat", "a cat"]
    assert "words that mean nothing, and repetitions, were taken out of 3 captions" in caplog.messages
    assert "2 empty" in caplog.text


def test_where_nothing_can_be_described_the_run_fails(data: Path, tmp_path: Path) -> None:
    def broken(images: Sequence[Image.Image]) -> list[str]:
        raise RuntimeError("no kernel image is available")

    caption(options(data), describe=broken)  # there are captions
    with pytest.raises(RuntimeError, match="no kernel image"):
        caption(options(data, recaption=True), describe=broken)
    assert texts(data) == [HAD[index][0] if index in HAD else "" for index in range(PICTURES)]
    many = tmp_path / "many"
    (many / "train").mkdir(parents=True)
    write_pictures(many, [Picture(file_name=f"{index}.png", text="x" * (index > 40)) for index in range(99)])
    with pytest.raises(DataError, match=r"'19.png': no such file"):  # after twenty in a row
        caption(options(many), describe=colours)
    Image.new("RGB", (8, 8)).save(many / "train" / "10.png")
    with pytest.raises(DataError, match=r"'30.png': no such file"):
        caption(options(many, batch_size=1), describe=colours)


def test_processes_that_do_not_share_the_folder_are_found_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_said", lambda *_: None)
    with pytest.raises(DataError, match=r"expected 8 new captions, got 0\. All processes need the same folder"):
        caption(options(data), describe=colours)


def test_a_table_of_somebody_else_is_captioned_in_its_place(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("artist,file_name,text\nme,a.png,\nyou,b.png,kept\n")
    caption(options(tmp_path, prefix=" pixel art of "), describe=colours)
    first, second = read_pictures(tmp_path)
    assert first.text == "8bit, pixel art of red 255 green 0 blue 0"
    assert second.text == "kept"
    assert (first.others, second.others) == ((("artist", "me"),), (("artist", "you"),))
    assert [str(example.path.name) for example in read_dataset(tmp_path)] == ["a.png", "b.png"]


def test_few_pictures_are_in_memory_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, described, most, load = 0, 0, 0, module._load

    def counting(folder: Path, picture: Picture) -> Image.Image:
        nonlocal read, most
        read += 1
        most = max(most, read - described)
        return load(folder, picture)

    def describe(images: Sequence[Image.Image]) -> list[str]:
        nonlocal described
        described += len(images)
        return colours(images)

    monkeypatch.setattr(module, "_load", counting)
    caption(options(data, batch_size=2, recaption=True), describe=describe)
    assert read == PICTURES
    assert most <= 4  # the batch that is worked on, and the next


def test_a_word_of_somebody_else_in_status_stays(tmp_path):
    data = tmp_path / "theirs"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "a.png")
    (data / "metadata.csv").write_text("file_name,text,status,reason\na.png,a castle,published,by me\n")
    caption(Caption(data=data), describe=lambda images: ["x"] * len(images))
    (row,) = read_pictures(data)
    assert (row.text, row.status, row.reason) == ("a castle", "published", "by me")
