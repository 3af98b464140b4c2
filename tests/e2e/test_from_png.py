"""A picture repeated from what is written in it, to the bit; and what is said when that cannot be."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

import sample
from minisd.command_line import parse_args
from minisd.errors import UsageError
from minisd.images import save_png
from minisd.sample_config import SampleConfig
from minisd.sweep_grid import SWEEP
from tests.e2e.test_sample import write_lora
from tests.tiny import write_tiny_model


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def draw(words, output):
    """Run sample.py in this process with a command line; returns the paths of its pictures."""
    return sample.sample(parse_args(SampleConfig, [*shlex.split(words), "--output", str(output)]))


def record(path):
    with Image.open(path) as picture:
        return json.loads(picture.info["minisd"])


@pytest.fixture
def place(tiny_folder, tmp_path, monkeypatch):
    """A folder to work in: the model "tiny", two LoRAs and a photo, all called by relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "output").mkdir()
    write_lora(tmp_path / "output" / "lora.safetensors", tiny_folder, seed=1)
    write_lora(tmp_path / "other.safetensors", tiny_folder, seed=2)
    Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)).save("photo.png")
    return tmp_path


OPTIONS = {
    "alone": "--num-images 1",
    "one of a batch": "--num-images 3 --batch-size 3",
    "in the last, smaller batch": "--num-images 3 --batch-size 2",
    "everything": "--num-images 2 --batch-size 2 --seed 7 --lora output/lora.safetensors:0.3 --strength 0.7 "
    "--lora other.safetensors:-0.1 --negative-prompt 'the bit' --scheduler dpm++2m-sde --karras --guidance-scale 5.5 "
    "--guidance-rescale 0.3 --guidance-interval 0.1 0.9 --clip-skip 1 --height 80 --width 72 "
    "--init-image photo.png --vae-tiling",
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
def test_the_last_picture_is_repeated_to_the_bit(place, what):
    """Whatever it was drawn together with."""
    init = "--init-image photo.png" if "init" in OPTIONS[what] else ""
    prompt = "--prompt 'a (cat:1.2), \"the city\"\n, caf\xe9'"
    *_, last = draw(f"--model tiny --num-inference-steps 5 {prompt} {OPTIONS[what]}", "a")
    (again,) = draw(f"--from-png {last} {init}", "b")
    assert (pixels(last) == pixels(again)).all()
    assert record(last) == record(again)
    (other,) = draw(f"--from-png {last} {init} --seed 99", "c")
    assert (pixels(last) != pixels(other)).any()


def test_options_that_are_given_win(place):
    (first,) = draw("--model tiny --prompt cat --prompt city --num-images 1 --num-inference-steps 3 --lora none", "a")[
        :1
    ]
    words = f"--from-png {first} --prompt 'the bit' --num-images 2 --scheduler ddim"
    config = parse_args(SampleConfig, shlex.split(words))
    assert (config.prompt, config.num_images, config.scheduler) == (("the bit",), 2, "ddim")
    assert (config.num_inference_steps, config.model, config.height) == (3, "tiny", 64)
    (place / "prompts.txt").write_text("the cat\n")
    assert parse_args(SampleConfig, shlex.split(f"--from_png={first} --prompts_file prompts.txt")).prompt == ()
    other = parse_args(SampleConfig, shlex.split(f"--from-png {first} --model other/model"))
    assert (other.model, other.revision) == ("other/model", None)


def test_another_sampler_does_not_take_over_what_only_the_first_one_has(place):
    words = "--model tiny --prompt cat --num-images 1 --num-inference-steps 3 --lora none"
    (karras,) = draw(f"{words} --karras --timestep-spacing trailing", "a")
    (noisy,) = draw(f"{words} --scheduler ddim --eta 0.5", "b")
    for number, path in enumerate((karras, noisy)):
        for name in ("lcm", "euler"):
            (again,) = draw(f"--from-png {path} --scheduler {name}", f"{number} {name}")
            (fresh,) = draw(f"{words} --scheduler {name}", f"{number} {name} fresh")
            assert (pixels(again) == pixels(fresh)).all()


def test_a_strength_without_a_picture_to_begin_with_is_refused(place):
    (first,) = draw("--model tiny --prompt cat --num-images 1 --num-inference-steps 3 --lora none", "a")
    with pytest.raises(UsageError, match=r"--strength .*Give --init-image"):
        draw(f"--from-png {first} --strength 0.5", "b")


def test_another_vae_in_the_same_folder_is_said(tiny_folder, place, caplog):
    (place / "tiny").unlink()
    shutil.copytree(tiny_folder, place / "tiny")
    (first,) = draw("--model tiny --prompt cat --num-images 1 --num-inference-steps 3 --lora none", "a")
    write_tiny_model(place / "new", seed=5)
    draw(f"--from-png {first}", "b")
    assert "the model was" not in caplog.text
    shutil.copy(place / "new/vae/diffusion_pytorch_model.safetensors", place / "tiny/vae")
    draw(f"--from-png {first}", "c")
    assert "the model was 'sha256:" in caplog.text


def test_a_lora_is_found_by_its_hash_and_a_wrong_one_refused(place, tiny_folder):
    (first,) = draw(
        "--model tiny --prompt cat --num-images 1 --num-inference-steps 3 --lora other.safetensors:0.5", "a"
    )
    shutil.move("other.safetensors", "moved.safetensors")
    with pytest.raises(UsageError, match=r"LoRA 'other.safetensors' \(sha256 .*it is not here.*--lora PATH"):
        draw(f"--from-png {first}", "b")
    (again,) = draw(f"--from-png {first} --lora moved.safetensors", "c")
    assert (pixels(first) == pixels(again)).all()
    (stronger,) = draw(f"--from-png {first} --lora moved.safetensors:1", "d")
    assert (pixels(first) != pixels(stronger)).any()
    with pytest.raises(UsageError, match="was not drawn with this file"):
        draw(f"--from-png {first} --lora moved.safetensors --lora output/lora.safetensors", "e")
    write_lora(place / "other.safetensors", tiny_folder, seed=3)
    with pytest.raises(UsageError, match=r"other\.safetensors is another file now"):
        draw(f"--from-png {first}", "f")
    assert record(draw(f"--from-png {first} --lora none", "g")[0])["loras"] == []


def test_model_and_first_picture_are_asked_for_where_they_are_not_found(place, tmp_path_factory, caplog):
    words = "--model tiny --prompt cat --num-images 1 --num-inference-steps 3"
    (first,) = draw(f"{words} --lora none --init-image photo.png", "a")
    with pytest.raises(UsageError, match=r"drawn from a picture \(sha256 .*--init-image"):
        draw(f"--from-png {first}", "b")
    with pytest.raises(UsageError, match="--init-image"):
        draw(f"--from-png {first} --init-image {first}", "b")
    (place / "tiny").unlink()
    with pytest.raises(UsageError, match=r"its model 'tiny' is not here\. Give its path with --model"):
        draw(f"--from-png {first} --init-image photo.png", "b")
    write_tiny_model(place / "new", seed=5)
    (other,) = draw(f"--from-png {first} --init-image photo.png --model new", "b")
    assert "the model was 'sha256:" in caplog.text
    assert (pixels(first) != pixels(other)).any()


def test_pictures_of_others_are_refused_in_one_line(place, capsys):
    save_png(Image.new("RGB", (64, 64)), place / "foreign.png", parameters="cat\nSteps: 20, Seed: 1, Size: 64x64")
    bad = {"scheduler": "magic", "num_inference_steps": 0, "prompts": ["cat"]}
    (first,) = draw("--model tiny --prompt cat --num-images 1 --num-inference-steps 2 --lora none", "a")
    said = {"foreign.png": "has no record of minisd"}
    said["a/grid.png"] = "grid.png has no record: give one of the pictures beside it"
    for name, value in bad.items():
        raw = record(first)
        raw["options"][name] = value
        save_png(Image.new("RGB", (64, 64)), place / f"{name}.png", parameters="", record=json.dumps(raw))
        said[f"{name}.png"] = {"prompts": "unknown option 'prompts'", "scheduler": "'euler-a'"}.get(name, "at least 1")
    capsys.readouterr()
    for name, words in said.items():
        with pytest.raises(SystemExit) as stop:
            parse_args(SampleConfig, ["--from-png", name])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert words in line
        assert name in line
    (place / "a.toml").write_text('from_png = "foreign.png"\n')
    with pytest.raises(SystemExit):
        parse_args(SampleConfig, ["--config", "a.toml"])
    assert "on the command line" in capsys.readouterr().err


def test_a_strength_sweep_is_a_grid_of_pictures_each_of_which_can_be_repeated(place):
    words = "--model tiny --num-inference-steps 2 --num-images 1 --seed 3"
    paths = draw(f"{words} --strength-sweep --prompt cat --prompt 'the city' --lora other.safetensors:0.5", "a")
    assert len(paths) == 2 * len(SWEEP)
    assert [lora["strength"] for path in paths for lora in record(path)["loras"]] == [0.5 * x for x in SWEEP] * 2
    (base,) = draw(f"{words} --prompt 'the city' --lora none", "b")
    (strong,) = draw(f"{words} --prompt 'the city' --lora other.safetensors:0.65", "c")
    (again,) = draw(f"--from-png {paths[7]}", "d")
    assert (pixels(paths[5]) == pixels(base)).all()
    assert (pixels(paths[9]) == pixels(strong)).all()
    assert (pixels(paths[7]) == pixels(again)).all()
    assert len({pixels(path).tobytes() for path in paths}) == 10
    grid = pixels("a/grid.png")
    left, top = grid.shape[1] - 5 * 64, grid.shape[0] - 2 * 64
    for number, path in enumerate(paths):
        y, x = top + number // 5 * 64, left + number % 5 * 64
        assert (grid[y : y + 64, x : x + 64] == pixels(path)).all()
    headings = [grid[:top, left + 64 * column : left + 64 * (column + 1)] for column in range(5)]
    assert all((heading < 128).any() and (heading[0] == 255).all() for heading in headings)
    assert len({heading.tobytes() for heading in headings}) == 5
    assert all((grid[top + 64 * row : top + 64 * (row + 1), :left] < 128).any() for row in range(2))
    with pytest.raises(UsageError, match="--strength-sweep varies the strength of LoRAs"):
        draw(f"{words} --strength-sweep --prompt cat --lora none", "e")
