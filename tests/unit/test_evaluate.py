"""The parts of an evaluation that need no run: the rule of the pick, what a copy is, the pocket model's judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from minisd.data import Example
from minisd.errors import UsageError
from minisd.evaluate.__main__ import main
from minisd.evaluate.judging import Prompt, TrainingPictures, figure_kinds, measure
from minisd.evaluate.options import EvaluateConfig, parse_options
from minisd.evaluate.picking import Choice, choose
from minisd.evaluate.prompts import GENERAL, prompts_to_draw
from minisd.evaluate.table import legend, table_csv, table_text
from minisd.pocket import scenes
from minisd.pocket.judge import PocketJudge, prompts_of_demo

BASE = {"agreement": 0.9, "outside_agreement": 1.0, "style": 0.3, "outside_style": 0.3, "likeness": 0.5, "copies": 0.0}


def figures(**changes: float | None) -> dict[str, float | None]:
    return {**BASE, "style": 0.9, **changes}


def pick(*candidates: Mapping[str, float | None]) -> Choice:
    labels = [f"step {index}" for index in range(len(candidates))]
    return choose(BASE, candidates, labels, tolerance=0.1, number=".0%")


def test_the_nearest_to_the_style_is_picked_if_it_keeps_what_prompts_say() -> None:
    assert pick(figures(style=0.5), figures(style=0.9)).index == 1
    assert pick(figures(style=0.5), figures(style=0.9, agreement=0.79)).index == 0
    assert pick(figures(style=0.5), figures(style=0.9, outside_agreement=0.89)).index == 0
    assert pick(figures(style=0.5), figures(style=0.9, agreement=0.81, outside_agreement=0.91)).index == 1
    assert pick(figures(style=0.5), figures(style=0.9, copies=0.1)).index == 0


def test_a_loss_of_just_the_tolerance_is_none() -> None:
    """As floats 0.31 - 0.29 is more than 0.02."""
    candidates = [figures(style=0.5, agreement=0.31), figures(agreement=0.29)]
    assert choose({**BASE, "agreement": 0.31}, candidates, ["a", "b"], tolerance=0.02, number=".3f").index == 1


def test_of_several_near_enough_the_lowest_held_out_loss_or_else_the_first() -> None:
    """The best is 0.6 from the base, so 0.84 is near enough and 0.83 is not."""
    near = [figures(style=0.83), figures(style=0.845), figures(style=0.9), figures(style=0.85)]
    assert pick(*near).index == 1
    ratios = [0.1, 0.9, 0.8, 0.95]
    assert pick(*({**row, "held_out_ratio": ratio} for row, ratio in zip(near, ratios, strict=True))).index == 2
    assert (
        pick(*({**row, "held_out_ratio": ratio} for row, ratio in zip(near, [0.1, 0.9, None, 0.95], strict=True))).index
        == 1
    )


def test_if_all_are_bad_the_one_with_fewest_copies_and_then_most_agreement() -> None:
    bad = [figures(agreement=0.2), figures(agreement=0.5), figures(copies=0.5)]
    choice = pick(*bad)
    assert choice.index == 1
    assert "least of these evils" in choice.why
    assert "50%, the base 90%" in choice.why


def test_the_reason_has_the_figures() -> None:
    choice = pick(figures(style=0.88, held_out_ratio=0.8), figures(held_out_ratio=0.7, agreement=0.85))
    for part in ("step 1", "0.900", "0.300", "85%, the base 90%", "no copies", "of 2 like it", "0.700"):
        assert part in choice.why, part
    assert "\n" not in choice.why
    assert "none is nearer to the style than the base" in pick(figures(style=0.2)).why


def test_what_is_not_measured_stands_in_no_way() -> None:
    assert pick(figures(agreement=None, outside_agreement=None)).index == 0


def rows(*angles: float) -> torch.Tensor:
    """Features of length 1 in the plane."""
    at = torch.tensor(angles)
    return torch.stack([at.cos(), at.sin()], dim=1)


def test_a_copy_is_more_alike_than_two_different_training_pictures() -> None:
    training = TrainingPictures(["a", "b", "c", "b again"], rows(0.0, 1.0, 1.5, 1.001), copy_floor=0.5)
    assert training.copy_above == pytest.approx(np.cos(0.499), abs=1e-5)  # of b again and c, not of b and b again
    near, far = training.nearest(rows(0.45, 2.1))
    assert (near.training, near.copy) == ("a", True)
    assert near.likeness == pytest.approx(np.cos(0.45), abs=1e-4)
    assert (far.training, far.copy) == ("c", False)
    assert TrainingPictures(["a"], rows(0.0), copy_floor=0.9).copy_above == 0.9


@pytest.fixture(scope="module")
def judge() -> PocketJudge:
    return PocketJudge(scenes.draw(scenes.scene_at(index, 8), "8bit") for index in range(20))


def test_the_pocket_judge_reads_pixels(judge: PocketJudge) -> None:
    scene = scenes.Scene("house", "red", "night", 5)
    image = scenes.draw(scene, "8bit")
    prompts = [
        scenes.caption(scene),
        "a red house by day",
        "a blue house by day",
        "a cat",
        "a red and blue house at night",
    ]
    assert judge.agreement([image] * 5, prompts) == [1.0, 0.5, 0.0, None, 1.0]
    eight_bit, plain = judge.nearness([image, scenes.draw(scene, "plain")])
    assert eight_bit == pytest.approx(1.0)
    assert plain < 0.5


def test_its_likeness_is_the_correlation_of_pixels(judge: PocketJudge) -> None:
    first = scenes.draw(scenes.scene_at(3, 8), "8bit")
    blurred, other = first.filter(ImageFilter.GaussianBlur(0.7)), scenes.draw(scenes.scene_at(500, 8), "8bit")
    features = judge.features([first, blurred, other])
    expected = np.corrcoef([np.asarray(image, float).ravel() for image in (first, blurred, other)])
    np.testing.assert_allclose(features @ features.T, expected, atol=1e-5)
    training = TrainingPictures([str(index) for index in range(20)], judge.training_features, judge.copy_floor)
    assert [(found.training == "3", found.copy) for found in training.nearest(features)] == [(True, True)] * 2 + [
        (False, False)
    ]
    assert judge.features([first.resize((128, 64))]).shape == (1, 64 * 64 * 3)


def test_figures_are_means_of_the_prompts_of_their_kind(judge: PocketJudge) -> None:
    shown = [scenes.scene_at(index, 30) for index in range(4)]
    images: list[Image.Image] = [
        scenes.draw(scene, style) for scene, style in zip(shown, ["8bit", "plain"] * 2, strict=True)
    ]
    texts = [scenes.caption(shown[0]), scenes.caption(shown[1]), "a cat", "by day at night"]
    prompts = [Prompt(text, index % 2 == 0, index) for index, text in enumerate(texts)]
    training = TrainingPictures([str(index) for index in range(20)], judge.training_features, judge.copy_floor)
    found, nearest = measure(judge, training, images, prompts)
    assert (found["agreement"], found["outside_agreement"], found["copies"]) == (1.0, 1.0, 0.0)
    assert found["style"] == pytest.approx(1.0)
    assert found["outside_style"] == pytest.approx(np.mean([scenes.blockiness(images[i]) for i in (1, 3)]), abs=1e-4)
    assert found["likeness"] == max(one.likeness for one in nearest)
    assert measure(judge, training, images[2:3], prompts[2:3])[0]["outside_style"] is None
    assert found.keys() <= {kind.name for kind in figure_kinds(judge)}


def test_prompts_come_from_options_captions_or_the_demo() -> None:
    def texts(config: EvaluateConfig, defaults: tuple[list[str], list[str]] | None = None) -> list[tuple[str, bool]]:
        examples = [Example(path, (f"caption {index % 6}", "other")) for index, path in enumerate([config.run] * 9)]
        prompts = prompts_to_draw(config, examples, "zkx", defaults)
        assert [prompt.seed for prompt in prompts] == list(range(config.seed, config.seed + len(prompts)))
        return [(prompt.text, prompt.inside) for prompt in prompts]

    run = Path("run")
    drawn = texts(EvaluateConfig(run=run, seed=3))
    assert len({text for text, inside in drawn if inside}) == 4
    assert all(text.startswith("zkx, caption") for text, inside in drawn if inside)
    assert [text for text, inside in drawn if not inside] == [f"zkx, {text}" for text in GENERAL]
    assert drawn != texts(EvaluateConfig(run=run, seed=4))
    named = EvaluateConfig(run=run, prompts=("a [trigger] cat",), outside_prompts=("a dog",))
    assert texts(named) == [("a zkx cat", True), ("a dog", False)]
    inside, outside = prompts_of_demo()
    assert texts(EvaluateConfig(run=run), (inside, outside)) == [(f"zkx, {i}", True) for i in inside] + [
        (o, False) for o in outside
    ]
    assert all(text.startswith("8bit ") for text in inside)
    assert not any("8bit" in text for text in outside)
    with pytest.raises(UsageError, match="no captions"):
        prompts_to_draw(EvaluateConfig(run=run), [Example(run, ("",))], None, None)


def test_the_table_says_what_its_columns_mean(judge: PocketJudge) -> None:
    kinds = figure_kinds(judge)
    rows = [figures(held_out_ratio=None), figures(held_out_ratio=0.7)]
    table = table_text("step", ["0", "5 *"], rows, kinds)
    assert table.splitlines()[0].split() == ["step", "held_out_ratio", "agreement", "outside_agreement", "style",
                                             "outside_style", "likeness", "copies"]  # fmt: skip
    assert table.splitlines()[2].split() == ["5", "*", "0.700", "90%", "100%", "0.900", "0.300", "0.500", "0%"]
    lines = legend(rows, kinds).splitlines()
    assert [line.partition(":")[0] for line in lines] == table.split()[1:8]
    assert lines[0] == "held_out_ratio: loss on held-out pictures, of the base's; lower is better"
    csv = table_csv([0, 5], rows, kinds, 5).decode().splitlines()
    assert csv[0].startswith("step,held_out_ratio,train_ratio,agreement")
    assert [line.split(",")[:3] + line.split(",")[-1:] for line in csv[1:]] == [
        ["0", "", "", "0"],
        ["5", "0.7", "", "1"],
    ]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ([], "--run"),
        (["--run", "r", "--seed", "-1"], "--seed -1: expected from 0"),
        (["--run", "r", "--num-inference-steps", "0"], "expected at least 1"),
        (["--run", "r", "--sweep-scales", "0"], "above 0"),
        (["--run", "r", "--sweep-scales", "-1", "0"], "above 0"),
        (["--run", "r", "--sweep-scales", "nan"], "expected numbers"),
        (["--run", "r", "--sweep-scales", "1", "1.0"], "given twice"),
        (["--run", "r", "--prompts", " "], "a prompt is empty"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(words)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1
    assert fragment in said


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        main(EvaluateConfig(run=Path("run")))
