"""The command line: quick, in one line when it refuses, both spellings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minisd.config import SampleConfig, TrainConfig, as_json, parse_args
from minisd.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_dashes_and_underscores():
    a = parse_args(TrainConfig, ["--data", "x", "--train-batch-size", "2", "--lr-scheduler", "constant"])
    b = parse_args(TrainConfig, ["--data", "x", "--train_batch_size", "2", "--lr_scheduler", "constant"])
    assert a == b
    assert a.train_batch_size == 2


def test_defaults_follow_from_each_other():
    config = parse_args(TrainConfig, ["--data", "x", "--rank", "8"])
    assert config.scale_alpha == 8.0
    assert parse_args(TrainConfig, ["--data", "x", "--alpha", "2"]).scale_alpha == 2.0
    assert json.loads(as_json(config))["data"] == "x"


def test_repeated_options():
    config = parse_args(SampleConfig, ["--prompt", "a", "--prompt", "b", "--lora", "x:1", "--lora", "y"])
    assert config.prompt == ("a", "b")
    assert config.lora == ("x:1", "y")


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
        ("", "--data"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(TrainConfig, words.split())
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("minisd: error E-USAGE: ")
    assert said in lines[0]


@pytest.mark.parametrize("options", [{}, {"prompt": ("a",), "num_images": 0}, {"prompt": ("a",), "seed": -1},
                                     {"prompt": ("a",), "guidance_scale": float("nan")},
                                     {"prompt": ("a",), "height": 0}])  # fmt: skip
def test_sample_options_are_checked(options):
    with pytest.raises(UsageError):
        SampleConfig(**options)


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
