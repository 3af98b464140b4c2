"""The ablations count what they say they count, and a variant can be made; what comes out is not a test's affair."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from minisd.images import image_grid
from minisd.pocket import scenes
from minisd.pocket.measure import held_out_scenes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))  # its scripts import each other by their plain names

import ablation_figures as figures  # noqa: E402
import ablation_tables as tables  # noqa: E402
import ablations  # noqa: E402
from ablation_variants import BASE, VARIANTS, Pictures, Variant  # noqa: E402


def test_real_drawings_show_what_was_asked_and_drawings_of_something_else_do_not():
    asked = held_out_scenes(2)
    found = figures.picture_figures([scenes.draw(scene, "8bit") for scene in asked], asked)
    assert [found[name] for name in ("colour", "time", "subject", "all_three", "blockiness")] == [1] * 5
    other = figures.picture_figures([scenes.draw(replace(scene, subject="cup")) for scene in asked], asked)
    assert other["subject"] == other["all_three"] == 0
    assert other["blockiness"] < 0.4


def test_a_copy_is_a_training_picture_again_and_not_another_of_its_caption():
    shown = [scene for scene, _ in Pictures(6).rows()]
    again = [scenes.draw(scene, "8bit") for scene in shown]
    others = [scenes.draw(replace(scene, seed=scene.seed + 2), "8bit") for scene in shown]
    assert figures.copies(again, shown, Pictures()) == 6
    assert figures.copies([*others[:3], *again[3:]], shown, Pictures()) == 3


def test_the_base_dataset_is_the_demos_and_no_dataset_has_a_caption_that_is_asked_for():
    asked = {scenes.caption(scene) for scene in held_out_scenes(16)}
    for pictures in {variant.pictures for variant in VARIANTS.values()}:
        rows = pictures.rows()
        assert len(rows) == pictures.count
        assert not asked & {scenes.caption(scene) for scene, _ in rows}
    assert [scene for scene, _ in Pictures().rows()] == [scenes.scene_at(index, 8) for index in range(100)]
    assert sum(f"8bit {scenes.caption(scene)}" == text for scene, text in Pictures(captions="of others").rows()) < 5


def test_haze_takes_a_picture_part_of_the_way_to_light_grey_and_none_leaves_it():
    scene = held_out_scenes(1)[0]
    drawn = np.asarray(scenes.draw(scene, "8bit"), float)
    assert np.array_equal(np.asarray(Pictures().draw(scene)), drawn)
    assert np.abs(np.asarray(Pictures(haze=0.25).draw(scene)) - (0.75 * drawn + 50)).max() <= 1


def test_tables_pages_and_variants_name_each_other():
    assert {name for axis in tables.AXES.values() for name in axis.values()} == set(VARIANTS)
    assert {variant.drawn_with for variant in VARIANTS.values()} - {None} <= set(VARIANTS)
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("ablations.md", "troubleshooting.md"))
    for line in re.findall(r"ablations\.py --only (.*)", pages):
        assert set(re.findall(r'"([^"]+)"', line)) <= set(VARIANTS), line
    assert set(re.findall(r"troubleshooting/([a-z-]+)\.png", pages)) - {"black"} == set(tables.STRIPS)


def test_a_variant_and_the_one_it_draws_with_are_made_once_and_tabled(tmp_path, monkeypatch, capsys):
    base = Variant({"max_train_steps": 1, "train_batch_size": 1}, Pictures(2), num_inference_steps=2)
    small = {BASE: base} | {n: replace(base, drawn_with=BASE, strength=s) for n, s in {"half": 0.5, "none": 0}.items()}
    for module, name, value in ((ablations, "VARIANTS", small), (ablations, "ASKED", 2), (ablations, "PLAIN", 1),
                                (ablations, "RECALLED", 1), (figures, "PROBES", 2)):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--output", str(tmp_path), "--only", "half", "none"])
    for _ in range(2):
        ablations.main()
    made = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    assert made == [f"--- {BASE}", "--- half", "--- none"]
    whole, half, none = (json.loads((tmp_path / name / "figures.json").read_text())["figures"] for name in small)
    # One step on these two pictures: a little better than the base.
    assert all(0.9 < ratio < 1 for ratio in whole["train_bands"])
    assert "train_bands" not in half
    assert len({whole["saturation"], half["saturation"], none["saturation"]}) == 3
    monkeypatch.setattr(tables, "AXES", {"what": {"one half": "half", "absent": "3"}})
    head, _, *lines = tables.tables(tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| one half"]
    assert head.count("|") == lines[0].count("|")


def test_a_strip_shows_the_same_pictures_of_each_variant_enlarged(tmp_path, monkeypatch):
    for name, style in (("a", "plain"), ("b / c", "8bit")):
        drawn = [scenes.draw(scene, style) for scene in held_out_scenes(16)]
        (tmp_path / tables.folder_of(name)).mkdir()
        image_grid(drawn, columns=8).save(tmp_path / tables.folder_of(name) / "styled.png")
    monkeypatch.setattr(tables, "STRIPS", {"x": ((("a", "styled"), ("b / c", "styled")), (2, 9, 13))})
    strip = tables.strip_of(tmp_path, "x")
    assert strip.size == (3 * 192, 2 * 192)
    second = strip.crop((192, 192, 2 * 192, 384)).reduce(3)
    assert second.tobytes() == scenes.draw(held_out_scenes(16)[9], "8bit").tobytes()
