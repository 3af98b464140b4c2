"""How a stage ended, in one line: what was wanted, what was kept, what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minisd.prepare.table import Picture

# How a status is said of one picture and of several, where the word does not do for both.
_WORDS = {
    "not a picture": ("not a picture", "not pictures"),
    "duplicate": ("duplicate", "duplicates"),
    "near-duplicate": ("near-duplicate", "near-duplicates"),
}


def counts(rejected: Sequence[Picture]) -> str:
    """How many were left out for each reason, most first: "12 duplicates, 9 not pictures, 5 too small"."""
    numbers = Counter(picture.status for picture in rejected)
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {_WORDS.get(status, (status,) * 2)[number > 1]}" for status, number in ordered)


def summary(kept: int, rejected: Sequence[Picture], wanted: int | None) -> str:
    """Say how a stage ended: "100 wanted, 74 kept; left out: 12 duplicates, 9 not pictures, 5 too small".

    Args:
        kept: pictures in the dataset.
        rejected: the rows of those that are not.
        wanted: how many were asked for; None if that was not said.
    """
    begin = f"{kept} kept" if wanted is None else f"{wanted} wanted, {kept} kept"
    return f"{begin}; left out: {counts(rejected) or 'none'}"
