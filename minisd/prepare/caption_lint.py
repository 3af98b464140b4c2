"""What may be wrong with a caption, and what BLIP says made presentable."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

MAX_TOKENS = 77  # of a chunk of CLIP, begin and end marks included
MAX_CHARACTERS = 300  # of what BLIP says

_TOKENIZER = Path(__file__).parents[1] / "clip_tokenizer"
# Words that BLIP has learned from broken captions and that mean nothing (arafed, araffe, araffes, arafy ...), pieces of
# words, and marks of its vocabulary.
_BLIP_WORD = re.compile(r"araf+(e|es|ed|y|ing|ian|ic)?|##\w*|\[(unused\d+|unk|dec|enc|cls|sep|pad|mask)\]")
_LONGEST_LOOP = 8  # words
_SAID_TWICE = 4  # words in a row that are not said twice by chance
_SMALL = {"a", "an", "and", "of", "or", "the"}  # neither a loop's meaning nor the end of a caption


def lint(text: str, *, trigger: str | None, tokens: int) -> tuple[str, ...]:
    """Name what a person should look at in a caption.

    Args:
        text: the caption.
        trigger: the word that it is to have, in upper or lower case; None for none.
        tokens: its length as `count_tokens` gives it.

    Returns:
        Some of "empty", "repeated phrase" (a loop, or four words in a row that come twice), "BLIP word" (see `tidy`),
        "too long" (more tokens than CLIP reads at once: 77), "trigger missing", in this order.
    """
    words = [_plain(word) for word in _words(text)]
    found = {
        "empty": not any(words),
        "repeated phrase": _first_loop(words) is not None or _says_twice(words),
        "BLIP word": any(_BLIP_WORD.fullmatch(word) for word in words),
        "too long": tokens > MAX_TOKENS,
        # As minisd.data.with_trigger sees it, which also fills in the place marked so.
        "trigger missing": trigger is not None
        and "[trigger]" not in text
        and trigger.casefold() not in text.casefold(),
    }
    return tuple(flag for flag, is_there in found.items() if is_there)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Count the tokens that CLIP makes of each text, begin and end marks included."""
    if not texts:
        return []
    encoded: list[list[int]] = _tokenizer()(list(texts), verbose=False).input_ids
    return [len(ids) for ids in encoded]


def tidy(text: str) -> str:
    """Take what means nothing out of a caption that BLIP wrote: words it invented, and loops.

    A loop is a phrase that follows itself at once ("a hat on a hat on a hat"); a single word three times, or twice with
    "and" between ("red and red"), or if it is a small one ("the the"). It is said once.

    Returns:
        One line of at most 300 characters, without such words and loops; "" if nothing is left.
    """
    words = _without_blip_words(_words(text))
    plain = [_plain(word) for word in words]
    while loop := _first_loop(plain):
        del words[loop], plain[loop]
    text = " ".join(words)
    if len(text) > MAX_CHARACTERS:
        words = text[: MAX_CHARACTERS + 1].rpartition(" ")[0].split() or [text[:MAX_CHARACTERS]]
    while words and _plain(words[-1]) in _SMALL | {""}:
        words.pop()
    return " ".join(words).rstrip(",;:-")


def _words(text: str) -> list[str]:
    """Split at spaces, punctuation that stands alone put to the word before it: "a cat , a dog" has four words."""
    return re.sub(r"(?<!\s)\s+([,.;:!?])(?=\s|$)", r"\1", text).split()


def _plain(word: str) -> str:
    """A word without punctuation around it, for comparison; "" if it is nothing else."""
    bare = word.strip(",.;:!?").casefold()
    return bare if _BLIP_WORD.fullmatch(bare) else bare.strip(string.punctuation)  # brackets may belong to it


def _without_blip_words(words: Sequence[str]) -> list[str]:
    """The words that mean something; "an arafed man" becomes "a man"."""
    kept: list[str] = []
    left_out = False
    for word in words:
        if _BLIP_WORD.fullmatch(_plain(word)):
            left_out = True
            continue
        if left_out and kept and kept[-1].casefold() in ("a", "an"):
            kept[-1] = kept[-1][0] + ("n" if word[0].casefold() in "aeiou" else "")
        kept.append(word)
        left_out = False
    return kept


def _first_loop(plain: Sequence[str]) -> slice | None:
    """The first words that are said again right after, with what joins them to that; see `tidy`."""
    for at in range(len(plain)):
        for length in range(1, min(_LONGEST_LOOP, (len(plain) - at) // 2) + 1):
            phrase, then = plain[at : at + length], _said_again(plain, at, length)
            if then is None or not any(phrase):
                continue
            while plain[then + length : then + 2 * length] == phrase:
                then += length  # to where it is said last
            # "choo choo" and "bora bora" are words.
            if length > 1 or then > at + 1 or phrase[0] in _SMALL:
                return slice(at, then)
    return None


def _said_again(plain: Sequence[str], at: int, length: int) -> int | None:
    """Where so many words are said again, at once or behind an "and"; None if they are not."""
    for then in range(at + length, at + length + 3):
        if plain[then : then + length] == plain[at : at + length]:
            return then
        if then >= len(plain) or plain[then] not in ("", "and", "or"):
            return None
    return None


def _says_twice(words: Sequence[str]) -> bool:
    said = [word for word in words if word]
    phrases = [tuple(said[at : at + _SAID_TWICE]) for at in range(len(said) - _SAID_TWICE + 1)]
    return len(set(phrases)) < len(phrases)


@cache
def _tokenizer() -> Any:
    """CLIP's tokenizer, the one that Stable Diffusion 1.x reads prompts with."""
    from transformers import CLIPTokenizer  # a second to import

    return CLIPTokenizer.from_pretrained(str(_TOKENIZER), local_files_only=True)
