"""An evaluation of a run: the run's own figures and sample.py's pixels, drawn once, beside a run that goes on."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sample
import train
from minisd.errors import DataError, UsageError, WeightsError
from minisd.evaluate import drawing, session
from minisd.evaluate.evaluation import evaluate
from minisd.evaluate.options import EvaluateConfig
from minisd.pocket import judge, scenes
from minisd.sample_config import SampleConfig
from tests.e2e.running import ALONE, config_for
from tests.tiny_clip import write_tiny_clip

STEPS = {"num_inference_steps": 1, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_tiny_clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tiny_folder, dataset, tmp_path_factory):
    """A run of 4 steps with two checkpoints, which holds a few of its seven pictures out."""
    config = config_for(
        tiny_folder, dataset, tmp_path_factory.mktemp("runs") / "run", checkpointing_steps=2, validation_steps=2,
        validation_split=0.4, max_train_steps=4, learning_rate=0.02, trigger="zkx", report=False,
    )  # fmt: skip
    train.train(config, ALONE)
    return config


@pytest.fixture(scope="module")
def asked(run, clip):
    prompts = {"prompts": ("the [trigger] cat", "a city"), "outside_prompts": ("a dog of zkx",)}
    return EvaluateConfig(run=run.output, clip=clip, seed=5, sweep_scales=(0.0, 1.0, 0.5), **prompts, **STEPS)


@pytest.fixture(scope="module")
def found(asked, run):
    before = files_of(run.output)
    path = evaluate(asked)
    assert {name: data for name, data in files_of(run.output).items() if name in before} == before, (
        "the run was changed"
    )
    return json.loads(path.read_text())


@pytest.fixture
def copy(run, found, tmp_path):
    """A copy of the run and its evaluation, to be changed."""
    return shutil.copytree(run.output, tmp_path / "copy")


def files_of(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "cache"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def drawn(monkeypatch):
    """The prompts that are drawn, not taken from an earlier evaluation. The loss is not measured: it takes longer."""
    prompts = []

    def denoise(model, prompt, *args):
        prompts.append(prompt)
        return original(model, prompt, *args)

    original = drawing.denoise
    monkeypatch.setattr(drawing, "denoise", denoise)
    monkeypatch.setattr(session.Session, "ratios", lambda self: {})
    return prompts


def test_every_checkpoint_has_a_row_and_every_prompt_a_picture(found, run):
    assert [(row["step"], row["lora"]) for row in found["rows"]] == [
        (0, None), *((step, f"checkpoints/step-{step:06d}/lora.safetensors") for step in (2, 4)),
    ]  # fmt: skip
    assert [prompt["seed"] for prompt in found["prompts"]] == list(range(5, 5 + len(found["prompts"])))
    assert all("zkx" in prompt["text"] for prompt in found["prompts"])
    names = {path.name for path in (run.data / "train").iterdir()}
    for row in found["rows"]:
        assert len(row["pictures"]) == len(row["nearest"]) == len(found["prompts"])
        assert all((run.output / "evaluation" / name).is_file() for name in row["pictures"])
        assert row["figures"].keys() == {figure["name"] for figure in found["figures"]}
        assert {nearest["training"] for nearest in row["nearest"]} <= names
    assert found["settings"]["num_inference_steps"] == 1
    assert found["judge"].startswith("CLIP ")
    assert found["pick"]["step"] in (2, 4)
    assert str(found["pick"]["step"]) in found["pick"]["why"]
    with (run.output / "evaluation" / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table if row["pick"] == "1"] == [found["pick"]["step"]]
    assert [float(row["style"]) for row in table] == [row["figures"]["style"] for row in found["rows"]]
    assert (run.output / "report.html").is_file()


def test_the_ratios_are_those_that_the_run_logged(found, run):
    logged = [json.loads(line) for line in (run.output / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [0, 2, 4]
    for line, row in zip(logged, found["rows"], strict=True):
        for name in ("held_out", "train"):
            assert row["figures"][f"{name}_ratio"] == round(line[name]["ratio"], 6)
    assert found["rows"][0]["figures"]["held_out_ratio"] == 1
    assert found["rows"][2]["figures"]["held_out_ratio"] != 1


@pytest.mark.parametrize("index", [0, 2])
def test_the_pictures_are_those_that_sample_py_draws(index, found, run, tmp_path):
    row = found["rows"][index]
    lora = "none" if row["lora"] is None else str(run.output / row["lora"])
    for number, prompt in enumerate(found["prompts"][:2]):
        config = SampleConfig(
            prompt=(prompt["text"],), seed=prompt["seed"], model=run.model, lora=(lora,), num_images=1,
            output=tmp_path / str(number), **STEPS,
        )  # fmt: skip
        assert (pixels(sample.sample(config)[0]) == pixels(run.output / "evaluation" / row["pictures"][number])).all()


def test_the_sweep_goes_from_the_base_to_the_pick(found, run):
    sweep = found["sweep"]
    assert sweep["step"] == found["pick"]["step"]
    assert sweep["scales"] == [row["scale"] for row in sweep["rows"]] == [0.0, 0.5, 1.0]
    assert sweep["suggested"] in (0.5, 1.0)
    folder = run.output / "evaluation"
    rows = {row["step"]: row for row in found["rows"]}
    for place, number in enumerate(sweep["prompts"]):
        off, half, full = (pixels(folder / row["pictures"][place]) for row in sweep["rows"])
        assert (off == pixels(folder / rows[0]["pictures"][number])).all()
        assert (full == pixels(folder / rows[sweep["step"]]["pictures"][number])).all()
        assert (half != full).any()
        assert (half != off).any()
    assert (folder / "sweep.png").is_file()
    assert {found["prompts"][number]["inside"] for number in sweep["prompts"]} == {True, False}


def test_what_is_drawn_is_not_drawn_again(found, asked, copy, drawn):
    again = replace(asked, run=copy)
    first = json.loads(evaluate(again).read_text())
    assert drawn == []
    assert [row["nearest"] for row in first["rows"]] == [row["nearest"] for row in found["rows"]]
    assert first["sweep"]["rows"] == found["sweep"]["rows"]
    (copy / "evaluation" / "step-000002" / "01.png").write_bytes(b"cut")
    result = json.loads(evaluate(replace(again, sweep=False, outside_prompts=("the dog",))).read_text())
    assert drawn == ["the dog", "zkx, a city", "the dog", "the dog"]
    assert result["sweep"] is None


def test_pictures_of_another_lora_are_drawn_again(found, asked, copy, drawn):
    shutil.rmtree(copy / "checkpoints" / "step-000004")
    shutil.copy(copy / found["rows"][1]["lora"], copy / "lora.safetensors")  # its header is of the same run of 4 steps
    result = json.loads(evaluate(replace(asked, run=copy, sweep=False)).read_text())
    assert [row["lora"] for row in result["rows"]][-1] == "lora.safetensors"
    assert len(drawn) == len(found["prompts"])
    assert result["rows"][-1]["nearest"] == found["rows"][1]["nearest"]


def test_a_checkpoint_that_is_damaged_or_deleted_meanwhile_is_passed_over(asked, copy, caplog, monkeypatch):
    path = copy / "checkpoints" / "step-000004" / "lora.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    early = copy / "checkpoints" / "step-000002"
    monkeypatch.setattr(session.Session, "ratios", lambda self: shutil.rmtree(early, ignore_errors=True) or {})
    result = json.loads(evaluate(replace(asked, run=copy, sweep=False)).read_text())
    assert [(row["step"], row["lora"]) for row in result["rows"]] == [(0, None), (4, "lora.safetensors")]
    assert "passing over a checkpoint" in caplog.text
    assert "step 2: the run has deleted its checkpoint" in caplog.text


def test_a_folder_without_a_run_or_its_pictures_is_refused(asked, copy, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        evaluate(replace(asked, run=tmp_path))
    config = json.loads((copy / "config.json").read_text())
    for content, kind, message in (
        (config | {"data": "gone"}, DataError, "Start this in the folder that train.py was started in"),
        (config | {"rank": 3}, WeightsError, "of another rank"),
        (config | {"colour": 3}, UsageError, "its config.json cannot be used: .*unknown option 'colour'"),
        ({"rank": 3}, UsageError, "its config.json cannot be used: .*'data'"),
    ):
        (copy / "config.json").write_text(json.dumps(content))
        with pytest.raises(kind, match=message):
            evaluate(replace(asked, run=copy))
    (copy / "config.json").write_text(json.dumps(config))
    shutil.rmtree(copy / "checkpoints")
    (copy / "lora.safetensors").unlink()
    with pytest.raises(UsageError, match="there is no checkpoint yet"):
        evaluate(replace(asked, run=copy))


def test_the_pocket_model_is_judged_by_pixels_without_held_out_pictures(dataset, tmp_path, capsys, monkeypatch):
    """The whole of it offline, in small: the base against one step, which changes next to nothing."""
    monkeypatch.setattr(judge, "INSIDE", 2)
    monkeypatch.setattr(judge, "OUTSIDE", 1)
    config = config_for("pocket", dataset, tmp_path, max_train_steps=1, gradient_accumulation_steps=1, report=False)
    train.train(config, ALONE)
    path = evaluate(EvaluateConfig(run=tmp_path, num_inference_steps=1, sweep=False))
    found = json.loads(path.read_text())
    assert found["judge"] == "pocket"
    assert [prompt["text"].startswith("8bit ") for prompt in found["prompts"]] == [
        prompt["inside"] for prompt in found["prompts"]
    ]
    assert [row["figures"]["held_out_ratio"] for row in found["rows"]] == [None, None]
    image = Image.open(path.parent / found["rows"][1]["pictures"][0])
    assert 0 < scenes.blockiness(image) < 1
    said = capsys.readouterr().out
    assert "colour and time of day as the prompt says" in said
    assert found["pick"]["why"] in said
