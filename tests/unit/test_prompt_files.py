"""Prompts from a file, in the dialect of kohya's sd-scripts."""

import re

import pytest

from minisd.errors import UsageError
from minisd.prompt_files import one_config_a_prompt, parse_line
from minisd.sample_config import SampleConfig


def sd_scripts(line):
    """`line_to_prompt_dict` of kohya's sd-scripts, the part for Stable Diffusion, under our names."""
    patterns = {"width": r"w (\d+)", "height": r"h (\d+)", "seed": r"d (\d+)", "num_inference_steps": r"s (\d+)",
                "guidance_scale": r"l ([\d\.]+)", "negative_prompt": r"n (.+)"}  # fmt: skip
    found = {}
    parts = line.split(" --")
    for part in parts:
        for name, pattern in patterns.items():
            if match := re.match(pattern, part, re.IGNORECASE):
                found[name] = match[1] if name == "negative_prompt" else float(match[1])
                break
    return parts[0], found


@pytest.mark.parametrize(
    "line",
    [
        "a castle by the sea",
        "a castle, (stone:1.2) --n blurred, text or - both --w 512 --h 768 --d 7 --l 6.5 --s 30",
        "a cat --W 64 --S 3 --l 7",
        "caf\xe9 \U0001f408 --d 0 --l 0.5",
        "a well-known -dash- --n low-quality, a - b",
    ],
)
def test_reads_what_sd_scripts_reads(line):
    assert parse_line(line) == sd_scripts(line)


def config(path, **options):
    return SampleConfig(prompts_file=path, **options)


def test_a_line_s_options_win_over_those_of_the_command_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment --x\n\n  a cat \na dog --n ugly --w 64 --h 96 --d 9 --l 3 --s 4\r\n", "utf-8")
    first, cat, dog = one_config_a_prompt(config(path, prompt=("a hen",), seed=5, negative_prompt="blurred"))
    assert [one.prompt for one in (first, cat, dog)] == [("a hen",), ("a cat",), ("a dog",)]
    assert (first.seed, cat.seed, cat.negative_prompt, cat.width) == (5, 5, "blurred", None)
    assert (dog.seed, dog.negative_prompt, dog.width, dog.height) == (9, "ugly", 64, 96)
    assert (dog.guidance_scale, dog.num_inference_steps, dog.num_images) == (3.0, 4, 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a cat --ss euler_a", r"line 2: --ss: expected one of --n, --w, --h, --d, --l, --s"),
        ("a cat --cn edges.png", "line 2: --cn"),
        ("a cat --steps 3", "line 2: --steps"),
        ("a cat --w", "line 2: --w '': expected a whole number"),
        ("a cat --w 512px", "line 2: --w '512px': expected a whole number"),
        ("a cat --w -8", "line 2: --w '-8'"),
        ("a cat --d 1.5", "line 2: --d '1.5'"),
        ("a cat --l 7..5", "line 2: --l '7..5': expected a number"),
        ("a cat --l nan", "line 2: --l 'nan'"),
        ("a cat -- or a dog", "line 2: --: expected one of"),
        ("a cat --n", "line 2: --n '': expected text"),
        ("a cat --w 64 --w 64", "line 2: --w is given twice"),
        ("a cat --s 0", "line 2: --num-inference-steps 0: expected a whole number of at least 1"),
        ("a cat --h 100000", "line 2: --height 100000: expected from 8 to 8192"),
        ("a cat --d 99999999999999999999", "line 2: --seed 99999999999999999999"),
        ("  --w 64 --n red", "line 2: there is no prompt, only options"),
        ("a cat <lora:style:1>", "line 2: '<lora:style:1>' in a prompt"),
    ],
)
def test_what_is_not_understood_names_file_and_line(tmp_path, line, said):
    path = tmp_path / "prompts.txt"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(UsageError, match=said) as error:
        one_config_a_prompt(config(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n# nothing\n", b"caf\xe9", None])
def test_files_without_prompts(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="--prompts-file"):
        one_config_a_prompt(config(path))
    with pytest.raises(UsageError, match="expected a text file"):
        one_config_a_prompt(config(tmp_path / "prompts.json"))
