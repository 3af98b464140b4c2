"""Laws of what is held out: by content, the same for ever, on one side only, and refused where it cannot be."""

import csv
import hashlib
import shutil

import pytest

from minisd.config import TrainConfig
from minisd.errors import DataError
from minisd.held_out import read_pictures, split_number
from minisd.pocket import scenes
from tests.e2e.running import ALONE

PICTURES, SHARE = 40, 0.3


def write(folder, names):
    """Draw pictures, by number, under these names, with captions that say which; equal numbers are equal files."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for index, name in names.items():
            scenes.draw(scenes.scene_at(index, 0), "8bit").save(folder / f"{name}.png")
            rows.writerow([f"{name}.png", f"picture {index}"])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("held-out") / "data", {i: f"{i:02d}" for i in range(PICTURES)})


def config_of(data, **options):
    return TrainConfig(data=data, **({"validation_split": SHARE, "seed": 5} | options))


def sides(config):
    """Contents of the two sides."""
    training, held_out = read_pictures(config, ALONE)
    return tuple({found.sha256 for found in side.surveys} for side in (training, held_out))


def test_the_split_follows_the_docstring(data):
    training, held_out = read_pictures(config_of(data), ALONE)
    wanted = []
    for path in sorted(data.glob("*.png")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        number = int(hashlib.sha256(b"minisd/1/split/5/" + content.encode()).hexdigest()[:16], 16) / 2**64
        if number < SHARE:
            wanted.append(path.name)
    assert held_out.names == wanted
    assert training.names == [path.name for path in sorted(data.glob("*.png")) if path.name not in wanted]
    for side in (training, held_out):  # picture, caption and hash still belong together
        for example, found in zip(side.examples, side.surveys, strict=True):
            assert example.captions == (f"picture {int(example.path.stem)}",)
            assert found.sha256 == hashlib.sha256(example.path.read_bytes()).hexdigest()


def test_about_that_share_is_held_out_and_the_seed_chooses():
    contents = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    chosen = [{c for c in contents if split_number(c, seed) < 0.1} for seed in (0, 1)]
    assert all(340 < len(side) < 460 for side in chosen)
    assert len(chosen[0] & chosen[1]) < 80


def test_pictures_that_are_added_renamed_or_shuffled_move_no_other_across(data, tmp_path):
    _, before = sides(config_of(data))
    order = sorted(range(PICTURES + 20), key=lambda i: i * 37 % 61)
    more = write(tmp_path / "more", {i: f"new name {i * 7919 % 1000:03d}-{i}" for i in order})
    training, held_out = sides(config_of(more))
    assert before < held_out
    assert not before & training


def test_copies_of_a_picture_are_on_its_side(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    table = tmp_path / "data" / "metadata.csv"
    for i in range(PICTURES):
        shutil.copy(tmp_path / "data" / f"{i:02d}.png", tmp_path / "data" / f"copy-{i}.png")
    table.write_text(table.read_text() + "".join(f"copy-{i}.png,x\n" for i in range(PICTURES)))
    training, held_out = read_pictures(config_of(tmp_path / "data"), ALONE)
    assert not {s.sha256 for s in training.surveys} & {s.sha256 for s in held_out.surveys}
    assert len(training.names) + len(held_out.names) == 2 * PICTURES


def test_one_picture_at_least_is_held_out_and_one_at_least_is_not(tmp_path):
    few = write(tmp_path / "few", {i: str(i) for i in range(3)})
    contents = {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in few.glob("*.png")}
    seed = next(s for s in range(1000) if min(split_number(content, s) for content in contents) > 0.1)
    _, held_out = read_pictures(config_of(few, validation_split=0.1, seed=seed), ALONE)
    assert held_out.names == [contents[min(contents, key=lambda content: split_number(content, seed))]]
    seed = next(s for s in range(1000) if max(split_number(content, s) for content in contents) < 0.5)
    with pytest.raises(DataError, match=rf"--seed {seed} it holds all of 3 pictures out.*Add pictures") as caught:
        read_pictures(config_of(few, validation_split=0.5, seed=seed), ALONE)
    assert caught.value.exit_code == 3


def test_pictures_of_validation_data_that_are_trained_on_are_refused(data, tmp_path):
    options = {"validation_split": 0.0, "trigger": "zkx"}
    other = write(tmp_path / "other", {i: str(i) for i in range(100, 104)})
    training, held_out = read_pictures(config_of(data, validation_data=other, **options), ALONE)
    assert (len(training.names), held_out.names) == (PICTURES, ["100.png", "101.png", "102.png", "103.png"])
    assert held_out.captions == [f"zkx, picture {i}" for i in range(100, 104)]
    mixed = write(tmp_path / "mixed", {i: f"renamed {i}" for i in (7, 8, 100)})
    with pytest.raises(DataError, match=r"2 of its 3 pictures are in --data as well \('renamed 7.png' is one\)"):
        read_pictures(config_of(data, validation_data=mixed, **options), ALONE)
    assert read_pictures(config_of(data, **options), ALONE)[1] is None
    with pytest.raises(DataError, match=r"is --data itself.*another folder"):  # and not: delete them in one of the two
        read_pictures(config_of(data, validation_data=data / ".", **options), ALONE)
