"""sample.py with odd prompts, sizes and disks: an exit code and nothing half-written, or a picture."""

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import sample
from minisd import sample_setup
from minisd.command_line import parse_args
from minisd.errors import run_script
from minisd.sample_config import SampleConfig

ROOT = Path(__file__).parents[2]


def run(words, capsys):
    """Exit code and stderr of sample.py, in this process; its progress bar left out."""
    capsys.readouterr()
    try:
        code = run_script(partial(sample.main, parse_args(SampleConfig, words)), debug=False)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return code, [line for line in said if line.startswith(("minisd: ", "Traceback"))]


def words_for(folder, output, prompt="cat"):
    return ["--model", str(folder), "--lora", "none", "--num-images", "1", "--num-inference-steps", "1", "--prompt",
            prompt, "--output", str(output)]  # fmt: skip


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \n\t",
        "\0\0\0",
        "\U0001f408 \u732b caf\xe9",
        "../../etc/passwd",
        "a" * 900,
        "((((:1.2)",
        "</w><|endoftext|>",
    ],
    ids=["empty", "blank", "NULs", "emoji", "a path", "one long word", "brackets", "marks"],
)
def test_odd_prompts_are_drawn_and_written_whole(tiny_folder, tmp_path, capsys, prompt):
    code, said = run(words_for(tiny_folder, tmp_path / "out", prompt), capsys)
    assert (code, said) == (0, [])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["000.png", "grid.png", "out"]
    again, said = run(["--from-png", str(tmp_path / "out" / "000.png"), "--model", str(tiny_folder), "--output",
                       str(tmp_path / "again")], capsys)  # fmt: skip
    assert (again, said) == (0, [])
    assert (tmp_path / "again" / "000.png").read_bytes() == (tmp_path / "out" / "000.png").read_bytes()
    assert parse_args(SampleConfig, ["--from-png", str(tmp_path / "out" / "000.png")]).prompt == (prompt,)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat " * 1_700_000, "10200000 characters: expected at most 100000"),
        ("cat \udcff", "not text in UTF-8"),
        ("the city " * 2000, "a prompt is longer than"),
        ("a cat <lora:style:0.8>", "Give the file with --lora PATH:SCALE"),
    ],
    ids=["10 MB", "a surrogate", "more tokens than are taken", "a LoRA"],
)
def test_prompts_that_cannot_be_drawn_are_exit_code_2(tiny_folder, tmp_path, capsys, prompt, words):
    code, (line,) = run(words_for(tiny_folder, tmp_path / "out", prompt), capsys)
    assert code == 2
    assert words in line
    assert len(line) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    ["--height 0", "--width 0", "--height 66", "--width 8200", "--height -64", "--num-inference-steps 0",
     "--num-inference-steps 1001", "--guidance-scale nan", "--guidance-scale -1", "--guidance-scale inf", "--seed -1",
     "--seed 18446744073709551616", "--num-images 0", "--batch-size 0", "--guidance-rescale 1.1",
     "--guidance-rescale nan", "--guidance-rescale -0.1", "--guidance-interval -0.1 0.5",
     "--guidance-interval 0.5 0.5", "--guidance-interval 0.9 0.1",
     "--guidance-interval 0 nan", "--guidance-interval 0.5", "--strength 0.5", "--clip-skip -1", "--clip-skip 4",
     "--eta nan", "--scheduler magic", "--strength 0 --init-image {photo}", "--strength 0.1 --init-image {photo}",
     "--strength nan --init-image {photo}", "--timestep-spacing leading --scheduler lcm"],
)  # fmt: skip
def test_numbers_that_cannot_be_are_exit_code_2(tiny_folder, tmp_path, capsys, words):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.jpg")
    given = shlex.split(words.format(photo=tmp_path / "photo.jpg"))
    code, (line,) = run([*words_for(tiny_folder, tmp_path / "out"), *given], capsys)
    assert code == 2
    assert line.startswith("minisd: error E-USAGE: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["--height 8 --width 8", "--height 76 --width 52", "--seed 9223372036854775800"])
def test_odd_numbers_are_drawn(tiny_folder, tmp_path, capsys, words):
    assert run([*words_for(tiny_folder, tmp_path), *shlex.split(words)], capsys) == (0, [])
    size = {"--height 8 --width 8": (8, 8), "--height 76 --width 52": (52, 76)}.get(words, (64, 64))
    assert Image.open(tmp_path / "000.png").size == size


def test_the_largest_size_is_taken_by_the_command_line():
    assert parse_args(SampleConfig, ["--prompt", "a", "--height", "8192", "--width", "8192"]).height == 8192


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("nowhere.png", None, 3), ("text.png", b"no picture", 3), ("cut.png", "cut", 3), ("long.png", (2000, 20), 3)],
)
def test_pictures_that_cannot_be_begun_with(tiny_folder, tmp_path, capsys, name, content, code):
    path = tmp_path / name
    if isinstance(content, tuple):
        Image.new("RGB", content).save(path)
    elif content == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content is not None:
        path.write_bytes(content)
    words = words_for(tiny_folder, tmp_path / "out")
    got, (line,) = run([*words, "--init-image", str(path), "--strength", "1"], capsys)
    assert got == code
    assert name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--scheduler ddim --karras", "--karras means nothing to ddim; samplers that take it: euler, "),
        ("--eta 0.5", "--eta 0.5 means nothing to dpm++2m; the sampler that takes it: ddim."),
        ("--prompt '(cat:11)'", "a weight of 11 in the prompt"),
        ("--negative-prompt '(cat:11)'", "a weight of 11 in the prompt"),
        ("--init-image photo.jpg", "--strength 0.8 of --num-inference-steps 1 leaves no step to take"),
        ("--init-image nopic.jpg", "--init-image nopic.jpg: no such file."),
        ("--init-image words.txt", "words.txt': not a picture"),
        ("--output words.txt", "--output words.txt is a file. Give a folder."),
        ("--lora style.safetensors", '--lora: "none" goes with no other --lora.'),
        ("--prompts-file nowhere.txt", "--prompts-file nowhere.txt: no such file."),
    ],
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "prepared_model", None)
    (tmp_path / "words.txt").write_text("a cat")
    Image.new("RGB", (64, 64), "red").save("photo.jpg")
    steps = [] if "photo" in words else ["--num-inference-steps", "4"]
    code, (line,) = run([*words_for("nowhere", "out"), *steps, *shlex.split(words)], capsys)
    assert code == (3 if "--init-image" in words and "photo" not in words else 2)
    assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg", "words.txt"]


def test_latents_that_are_no_numbers_are_exit_code_7_and_no_picture(tiny_folder, tmp_path, capsys, monkeypatch):
    """In the UNet, and in the VAE: a black picture would pass for a success."""
    original = sample_setup.load_model
    for part, number in (("unet", float("nan")), ("vae", float("inf"))):

        def load(*arguments, part=part, number=number, **options):
            model = original(*arguments, **options)
            (model.unet.conv_out if part == "unet" else model.vae.decoder.conv_out).bias.data.fill_(number)
            if part == "vae":
                model.vae.decoder.conv_out.weight.data.fill_(float("nan"))
            return model

        monkeypatch.setattr(sample_setup, "load_model", load)
        code, (line,) = run(words_for(tiny_folder, tmp_path / part), capsys)
        assert code == 7
        assert "finite" in line
        assert not (tmp_path / part).exists()


def test_a_picture_that_is_there_stays_in_every_case(tiny_folder, tmp_path, capsys):
    for name in ("000.png", "grid.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name).joinpath(name).parent.rename(tmp_path / f"{name}.folder")
        (tmp_path / name).write_bytes(b"precious")
        code, (line,) = run(words_for(tiny_folder, tmp_path), capsys)
        assert code == 2
        assert "--overwrite" in line
        assert (tmp_path / name).read_bytes() == b"precious"
        (tmp_path / name).unlink()
    assert not list(tmp_path.glob("*.png"))


FULL = """
import sys
from functools import partial
sys.path.insert(0, ".")
import sample
from minisd.command_line import parse_args
from minisd.errors import run_script
from minisd.sample_config import SampleConfig
config = parse_args(SampleConfig, sys.argv[1:])
sys.exit(run_script(partial(sample.main, config), debug=False))
"""


def test_a_full_disk_is_exit_code_6_and_no_half_picture(tiny_folder, tmp_path):
    """A disk of 40 KB: a picture of 12 KB fits, three and the grid do not."""
    mount = f'mount -t tmpfs -o size=40k full "{tmp_path}"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a file system of his own")
    words = [*words_for(tiny_folder, tmp_path), "--num-images", "3"]
    listing = f'; code=$?; for file in "{tmp_path}"/* "{tmp_path}"/.[a-z]*; do echo "$file"; done; exit $code'
    command = f'{mount} && "{sys.executable}" -c "$0" {shlex.join(words)} {listing}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command, FULL], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 6, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    names = [Path(line).name for line in done.stdout.splitlines()]
    assert "000.png" in names
    assert "grid.png" not in names
    assert not [name for name in names if name.startswith(".tmp")]
