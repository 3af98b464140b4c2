"""The command line: quick, in one line when it refuses, both spellings, defaults from a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minisd.command_line import as_json, parse_args
from minisd.config import TrainConfig
from minisd.sample_config import SampleConfig

ROOT = Path(__file__).parents[2]


def test_dashes_and_underscores():
    a = parse_args(TrainConfig, ["--data", "x", "--train-batch-size", "2", "--lr-scheduler", "constant"])
    b = parse_args(TrainConfig, ["--data", "x", "--train_batch_size", "2", "--lr_scheduler", "constant"])
    assert a == b
    assert a.train_batch_size == 2


def test_switches_have_two_forms():
    config = parse_args(TrainConfig, ["--data", "x", "--random-flip", "--no-buckets"])
    assert config.random_flip
    assert not config.buckets


def test_repeated_options():
    config = parse_args(SampleConfig, ["--prompt", "a", "--prompt", "b", "--lora", "x:1", "--lora", "y"])
    assert config.prompt == ("a", "b")
    assert config.lora == ("x:1", "y")


def test_two_numbers_and_none(write, capsys):
    config = parse_args(SampleConfig, ["--prompt", "a", "--guidance-interval", "0.2", "0.8"])
    assert (config.guidance_interval, config.negative_prompt) == ((0.2, 0.8), None)
    assert parse_args(SampleConfig, ["--prompt", "a", "--negative-prompt", ""]).negative_prompt == ""
    config = parse_args(SampleConfig, ["--prompt", "a", "--config", write("guidance-interval = [0, 0.5]", "a.toml")])
    assert config.guidance_interval == (0.0, 0.5)
    for wrong in ("[0.5]", "[0, 0.5, 1]", "0.5", "['a', 1]"):
        words = ["--prompt", "a", "--config", write(f"guidance-interval = {wrong}", "a.toml")]
        assert "a list of 2, each a number" in refusal(words, capsys, SampleConfig)


def refusal(words, capsys, config_class=TrainConfig):
    """The line that is said when the words are refused."""
    with pytest.raises(SystemExit) as stop:
        parse_args(config_class, words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("minisd: error E-USAGE: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data x --rnak 3", "--rnak"),
        ("--data x --rank 0", "--rank 0: expected a whole number of at least 1"),
        ("--data x --rank many", "--rank"),
        ("--data x --mixed-precision fp8", "'no', 'fp16', 'bf16'"),
        ("--data x --learning-rate nan", "--learning-rate nan"),
        ("--data x --learning-rate -1", "--learning-rate"),
        ("--data x --lora-dropout 1", "--lora-dropout 1"),
        ("--data x --alpha 0", "--alpha 0"),
        ("--data x --checkpoints-total-limit 1", "at least 2"),
        ("--data x --max-train-steps 5 --num-train-epochs 1", "exclude each other"),
        ("--data x --seed -1", "--seed -1"),
        ("--data x --config", "--config"),
        ("", "--data"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, said, capsys):
    assert said in refusal(words.split(), capsys)


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.toml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_file_gives_defaults_and_the_command_line_wins(write):
    path = write("""
        data = "pictures"  # required, and may come from here
        rank = 8
        learning-rate = 1  # not yet: an int will do for a float
        random_flip = true
        buckets = false
        lora-targets = "attn+ff"
        validation_prompts = ["a", "b"]
    """)
    config = parse_args(TrainConfig, ["--config", path, "--learning-rate", "2e-4", "--buckets"])
    assert config == TrainConfig(
        data=Path("pictures"), rank=8, learning_rate=2e-4, random_flip=True, lora_targets="attn+ff",
        validation_prompts=("a", "b"),
    )  # fmt: skip
    config = parse_args(TrainConfig, [f"--config={path}", "--learning-rate", "0.5", "--data", "~/other", "--rank", "4",
                                      "--no-random-flip", "--validation-prompts", "c"])  # fmt: skip
    assert (config.data, config.rank, config.random_flip) == (Path("~/other"), 4, False)
    assert config.validation_prompts == ("c",)  # instead of the file's, not after them
    config = parse_args(SampleConfig, ["--config", write('prompt = ["a"]\nscheduler = "ddim"\neta = 1', "sample.toml")])
    assert (config.prompt, type(config.eta)) == (("a",), float)


def test_a_run_can_be_repeated_from_its_config(write):
    first = parse_args(TrainConfig, ["--data", "x y", "--rank", "3", "--allow-change", "seed", "--output", "o/p"])
    saved = write(as_json(first), "config.json")
    assert json.loads(as_json(first))["data"] == "x y"
    assert parse_args(TrainConfig, ["--config", saved]) == first
    assert parse_args(TrainConfig, ["--config", saved, "--seed", "5"]).seed == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak = 3", ["unknown option 'rnak'", "Did you mean 'rank'?"]),
        ("[options]\nrank = 3", ["unknown option 'options'"]),
        ("zzzz = 3", ["unknown option 'zzzz'", "--help"]),
        ("lora-dropout = 0\nlora_dropout = 0", ["given twice"]),
        ('rank = "8"', ["rank = '8'", "a whole number"]),
        ("rank = 8.0", ["rank = 8.0", "a whole number"]),
        ("rank = true", ["rank = True", "a whole number"]),
        ("random-flip = 1", ["random-flip = 1", "true or false"]),
        ("data = 3", ["data = 3", "a path"]),
        ("learning_rate = '1e-4'", ["a number"]),
        ("alpha = false", ["a number"]),
        ("lr_scheduler = 'linear'", ["lr_scheduler = 'linear'", "'cosine', 'constant'"]),
        ("validation_prompts = 'a'", ["a list, each text"]),
        ("validation_prompts = ['a', 1]", ["a list, each text"]),
        ("rank = ", ["not valid TOML"]),
        ("rank = 8\nrank = 9", ["not valid TOML"]),
        ("data = 'x'\nrank = 0", ["--rank 0: expected", "recipe.toml"]),
        ("rank = 3", ["--data"]),
        ("data = 'x'\nmax_train_steps = 3\nnum_train_epochs = 1", ["exclude each other"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(write, text, said, capsys):
    line = refusal(["--config", write(text)], capsys)
    for words in [*said, "recipe.toml"]:
        assert words in line


def test_a_file_that_cannot_be_read(write, tmp_path, capsys):
    assert "No such file" in refusal(["--config", str(tmp_path / "no.toml")], capsys)
    (tmp_path / "x.toml").mkdir()
    assert "directory" in refusal(["--config", str(tmp_path / "x.toml")], capsys)
    assert "expected a .toml file" in refusal(["--config", write("rank: 3", "recipe.yaml")], capsys)
    assert "not valid JSON" in refusal(["--config", write("{", "config.json")], capsys)
    assert "not valid JSON" in refusal(["--config", write("[" * 100_000, "config.json")], capsys)
    assert "by name" in refusal(["--config", write("[]", "config.json")], capsys)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('trigger = "caf\xe9"'.encode("latin-1"))
    assert "not valid TOML" in refusal(["--config", str(latin)], capsys)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_does_not_wait_for_torch(script):
    code = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('torch' in sys.modules, code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.split() == ["False", "0"]
    assert "--seed" in done.stdout
    assert "--config" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["a castle"],
            "options: a castle. A value stands behind its option, as in --output NAME. See --help.",
        ),
        (
            ["--prompt", "a", "--sheduler", "euler"],
            ": --sheduler, euler. Perhaps you meant --scheduler? See --help.",
        ),
        (["--prompt", "a", "--seed", "1.5"], "Error parsing --seed: expected a whole number, got '1.5'. See --help."),
        (["--prompt", "a", "--eta", "x"], "Error parsing --eta: expected a number, got 'x'. See --help."),
    ],
)
def test_a_mistake_is_said_once_and_in_words(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(SampleConfig, words)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("config_class", "first", "last"),
    [
        (TrainConfig, "Folder of pictures with captions", "one caption a line)."),
        (SampleConfig, "LoRA file or PEFT folder", '"none" draws without.'),
        (SampleConfig, "A text file with one prompt a line", "are comments."),
    ],
)
def test_the_help_breaks_no_line_where_the_source_does(config_class, first, last, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        parse_args(config_class, ["--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if first in line]
    assert last in line


def test_who_leaves_in_the_middle_of_the_help_gets_no_traceback():
    command = f"{sys.executable} sample.py --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:")
