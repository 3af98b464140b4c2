"""What is odd about a caption, and what BLIP says made presentable."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from minisd.clip import load_tokenizer
from minisd.data import with_trigger
from minisd.prepare.caption_lint import count_tokens, lint, tidy

ROOT = Path(__file__).parents[2]
CAPTIONS = ("a castle, on a hill", "", "8bit", "caf\u00e9 \U0001f3f0\n=cmd()", "l'art", "x " * 200, "<|endoftext|>")


@pytest.mark.parametrize(
    ("said", "presentable"),
    [
        ("a castle on a hill", "a castle on a hill"),
        ("  two \n lines\tof words ", "two lines of words"),
        ("an arafed man in a hat", "a man in a hat"),
        ("A Araffe orange cat , (arafed) and asleep", "An orange cat, and asleep"),
        ("araffes", ""),
        ("a carafe of wine, serafes", "a carafe of wine, serafes"),
        ("[unused12] dog ##ing on [dec] grass [SEP]", "dog on grass"),
        ("a hat on top of a hat on top of a hat", "a hat on top of a hat"),
        ("a dog, a dog, a dog.", "a dog."),
        ("a man , a man , and a Man walking", "a Man walking"),
        ("a red and red car", "a red car"),
        ("the the cat of of", "the cat"),
        ("very very very old", "very old"),
        ("a choo choo train", "a choo choo train"),
        ("a cat and a", "a cat"),
        ("a picture of an arafed", "a picture"),
        ("a a a a", ""),
        ("... , -", ""),
        ("a house on a hill and a tree on a hill", "a house on a hill and a tree on a hill"),
    ],
)
def test_tidy_takes_out_what_means_nothing(said: str, presentable: str) -> None:
    assert tidy(said) == presentable


def test_tidy_keeps_300_characters_and_whole_words() -> None:
    words = [f"word{number}" for number in range(200)]
    kept = tidy(" ".join(words))
    assert 290 < len(kept) <= 300
    assert words[: len(kept.split())] == kept.split()
    assert tidy("x" * 1000) == "x" * 300
    assert tidy("y" * 300 + " z") == "y" * 300


def test_tidy_leaves_nothing_to_tidy_and_invents_nothing() -> None:
    """Of random captions in which loops within loops are common."""
    draw = random.Random(0)
    vocabulary = "a an and or the of red hat hat, dog , - arafed ##s Araffe [unk]"
    words = vocabulary.split()
    loops = 0
    for _ in range(5000):
        said = " ".join(draw.choices(words, k=draw.randint(0, 16)))
        loops += "repeated phrase" in lint(said, trigger=None, tokens=3)
        kept = tidy(said)
        assert tidy(kept) == kept
        assert kept.isprintable()
        assert "BLIP word" not in lint(kept, trigger=None, tokens=3)
        rest = iter([word.strip(",").casefold().replace("an", "a") for word in said.split()])
        for word in kept.split():  # a part of the words, in order; "an" may become "a"
            assert word.strip(",").casefold().replace("an", "a") in rest
    assert loops > 1000


@pytest.mark.parametrize(
    ("text", "trigger", "tokens", "flags"),
    [
        ("8bit castle", "8BIT", 77, ()),
        ("", None, 2, ("empty",)),
        (" \n.,-", "8bit", 5, ("empty", "trigger missing")),
        ("\U0001f3f0", None, 5, ()),
        ("a hat a hat", None, 5, ("repeated phrase",)),
        ("pixel art of a cat, pixel art of a dog", None, 5, ("repeated phrase",)),
        ("art of a cat, art of a dog", None, 5, ()),
        ("Arafed man", None, 5, ("BLIP word",)),
        ("a castle", None, 78, ("too long",)),
        ("a castle", "8bit", 5, ("trigger missing",)),
        ("a [trigger] castle", "8bit", 5, ()),
        ("an arafed a hat a hat", "8bit", 78, ("repeated phrase", "BLIP word", "too long", "trigger missing")),
    ],
)
def test_lint_flags(text: str, trigger: str | None, tokens: int, flags: tuple[str, ...]) -> None:
    assert lint(text, trigger=trigger, tokens=tokens) == flags


def test_a_caption_that_training_gives_the_trigger_does_not_miss_it() -> None:
    for text in ("a castle", "8BIT castle", "a [trigger] castle", ""):
        assert "trigger missing" not in lint(with_trigger(text, "8bit"), trigger="8bit", tokens=3)


def test_tokens_are_counted_as_training_counts_them() -> None:
    tokenizer = load_tokenizer(ROOT / "minisd" / "clip_tokenizer")
    one_by_one = [len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) + 2 for text in CAPTIONS]
    assert count_tokens(CAPTIONS) == one_by_one
    assert count_tokens([]) == []
    assert count_tokens(["castle " * 75, "castle " * 76]) == [77, 78]


def test_lint_and_its_tokenizer_need_no_torch() -> None:
    """The report, which calls them, is to start at once."""
    code = "import sys; from minisd.prepare.caption_lint import *; print(count_tokens(['a']), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[3] False\n"
    assert result.stderr == ""
