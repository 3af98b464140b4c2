"""What users get wrong: one line on stderr, the exit code of its kind, and nothing half-written."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import sample
import train
from minisd import sample_setup
from minisd.config import TrainConfig
from minisd.errors import run_script
from minisd.lora import TARGETS, inject_lora, lora_weights
from minisd.lora_info import LoRAInfo
from minisd.lora_writer import save_lora
from minisd.sample_config import SampleConfig
from minisd.weights import load_unet
from tests.tiny import write_tiny_model


def refusal(script, config, capsys):
    """Exit code and the line on stderr of a script that refuses."""
    capsys.readouterr()
    code = run_script(partial(script.main, config), debug=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("minisd: error E-")
    return code, lines[0]


def assert_nothing_but_the_status(output, code):
    """No half-written run: train.py says in run_status.json what went wrong, sample.py leaves nothing at all."""
    if output.exists():
        assert sorted(path.name for path in output.iterdir()) == ["run.lock", "run_status.json"]
        status = json.loads((output / "run_status.json").read_text())
        assert (status["state"], status["code"], status["step"]) == ("failed", code, 0)


def train_config(folder, data, output, **options):
    return TrainConfig(**{"model": str(folder), "data": data, "output": output, "max_train_steps": 1} | options)


def write_table(folder, text):
    (folder / "train").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "train" / "a.png")
    (folder / "train" / "metadata.csv").write_text(text)


def no_folder(folder):
    pass


def empty_folder(folder):
    folder.mkdir()


def a_file(folder):
    folder.write_text("not a folder")


def no_columns(folder):
    write_table(folder, "name,caption\na.png,a house\n")


def missing_file(folder):
    write_table(folder, "file_name,text\na.png,a house\nb.png,a tree\n")


def escaping_file(folder):
    write_table(folder, "file_name,text\n../../x.png,a house\n")


def unreadable_picture(folder):
    write_table(folder, "file_name,text\na.png,a house\nb.png,a tree\n")
    (folder / "train" / "b.png").write_bytes((folder / "train" / "a.png").read_bytes()[:60])


def no_captions(folder):
    write_table(folder, "file_name,text\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_folder, ["expected a folder", "--data"]),
        (empty_folder, ["metadata.csv", "--data"]),
        (a_file, ["expected a folder", "--data"]),
        (no_columns, ["metadata.csv", "file_name", "text"]),
        (missing_file, ["line 3", "b.png", "no such file"]),
        (escaping_file, ["line 2", "../../x.png", "outside the dataset"]),
        (unreadable_picture, ["b.png"]),
        (no_captions, ["metadata.csv"]),
    ],
)
def test_a_bad_dataset_is_exit_code_3(tiny_folder, tmp_path, capsys, spoil, words):
    spoil(tmp_path / "data")
    code, line = refusal(train, train_config(tiny_folder, tmp_path / "data", tmp_path / "out"), capsys)
    assert code == 3
    assert all(word in line for word in words), line
    assert_nothing_but_the_status(tmp_path / "out", code)


def no_unet(folder):
    shutil.rmtree(folder / "unet")


def truncated_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def weights_of_another_model(folder):
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "unet")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_unet, ["not a model", "unet/config.json"]),
        (truncated_weights, ["diffusion_pytorch_model.safetensors", "truncated"]),
        (weights_of_another_model, ["do not fit", "missing", "unexpected"]),
    ],
)
@pytest.mark.parametrize("script", [train, sample], ids=["train", "sample"])
def test_a_bad_model_is_exit_code_4(tiny_folder, dataset, tmp_path, capsys, spoil, words, script):
    shutil.copytree(tiny_folder, tmp_path / "model")
    spoil(tmp_path / "model")
    if script is train:
        config = train_config(tmp_path / "model", dataset, tmp_path / "out")
    else:
        config = SampleConfig(prompt=("a",), model=str(tmp_path / "model"), lora=("none",), output=tmp_path / "out")
    code, line = refusal(script, config, capsys)
    assert code == 4
    assert all(word in line for word in words), line
    assert_nothing_but_the_status(tmp_path / "out", code)


def test_a_repo_that_cannot_be_reached_is_exit_code_5(dataset, tmp_path, capsys):
    code, line = refusal(train, train_config("someone/some-model", dataset, tmp_path / "out"), capsys)
    assert code == 5
    assert "someone/some-model" in line
    assert_nothing_but_the_status(tmp_path / "out", code)


def test_a_name_that_is_nothing_is_exit_code_4(dataset, tmp_path, capsys):
    code, line = refusal(train, train_config("./no/such/folder", dataset, tmp_path / "out"), capsys)
    assert code == 4
    assert "./no/such/folder" in line


def test_a_lora_for_another_base_is_exit_code_4(tiny_folder, tmp_path, capsys):
    """Made for prompts 48 wide, as SD 1.x LoRAs are for 768 and SD 2.x ones for 1024."""
    unet = load_unet(tiny_folder)
    inject_lora(unet, TARGETS["attn"], rank=2, alpha=2.0)
    weights = lora_weights(unet)
    for name, lora in weights.items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            weights[name] = type(lora)(lora.down.new_ones(2, 768), lora.up, lora.alpha)
        lora.up.fill_(0.1)
    path = tmp_path / "other.safetensors"
    save_lora(path, {"unet": weights}, LoRAInfo(rank=2, alpha=2.0, base_model="someone/else"))
    config = SampleConfig(prompt=("a",), model=str(tiny_folder), lora=(str(path),), output=tmp_path / "out")
    code, line = refusal(sample, config, capsys)
    assert code == 4
    assert "SD 1.x" in line
    assert_nothing_but_the_status(tmp_path / "out", code)


def test_a_truncated_lora_is_exit_code_4(tiny_folder, tmp_path, capsys):
    (tmp_path / "style.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    config = SampleConfig(
        prompt=("a",), model=str(tiny_folder), lora=(str(tmp_path / "style.safetensors"),), output=tmp_path / "out"
    )
    code, line = refusal(sample, config, capsys)
    assert code == 4
    assert "style.safetensors" in line


def test_a_rank_no_layer_can_hold_is_exit_code_2(tiny_folder, dataset, tmp_path, capsys):
    code, line = refusal(train, train_config(tiny_folder, dataset, tmp_path / "out", rank=500), capsys)
    assert code == 2
    assert "500" in line
    assert_nothing_but_the_status(tmp_path / "out", code)


def test_a_file_in_the_place_of_the_folder_is_exit_code_2(tiny_folder, dataset, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    code, line = refusal(train, train_config(tiny_folder, dataset, tmp_path / "out"), capsys)
    assert code == 2
    assert "out': expected a folder, got a file" in line


def test_a_folder_that_cannot_be_made_is_exit_code_6(tiny_folder, dataset, capsys):
    code, line = refusal(train, train_config(tiny_folder, dataset, Path("/proc/minisd")), capsys)
    assert code == 6
    assert "/proc/minisd" in line


def test_a_sampler_that_leaves_numbers_is_exit_code_7(tiny_folder, tmp_path, capsys, monkeypatch):
    original = sample_setup.load_model

    def load(*args, **options):
        model = original(*args, **options)
        model.unet.conv_out.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(sample_setup, "load_model", load)
    config = SampleConfig(prompt=("a",), model=str(tiny_folder), lora=("none",), output=tmp_path / "out")
    monkeypatch.setattr(sample.tqdm, "__init__", _quiet(sample.tqdm.__init__))
    code, line = refusal(sample, config, capsys)
    assert code == 7
    assert "not finite" in line
    assert not list((tmp_path / "out").glob("*.png"))


def _quiet(init):
    return lambda self, *args, **options: init(self, *args, **{**options, "disable": True})


def test_the_same_v_prediction_model_trains(tmp_path, dataset):
    """Not bad input: SD2-like models take their target from their own scheduler config."""
    write_tiny_model(tmp_path / "sd2", family="sd2", prediction_type="v_prediction")
    config = train_config(tmp_path / "sd2", dataset, tmp_path / "out", gradient_accumulation_steps=1, rank=2)
    assert run_script(partial(train.main, config), debug=False) == 0
