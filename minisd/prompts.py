"""Weights inside a prompt: "a (red:1.3) house" asks for more red."""

from __future__ import annotations

import re

from minisd.errors import UsageError

_MAX_WEIGHT = 10.0
_TOKENS = re.compile(r"\\[()]|\(|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|[^\\():]+|[\\:]")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of equal weight; joined, the pieces are the prompt without the marks.

    `(text:1.3)` gives its text the weight 1.3, and weights of nested groups are multiplied. Brackets without a number
    are text like any other; `\(` and `\)` are brackets that never begin or end a group.

    Raises:
        UsageError: a weight is beyond 10 in size, those of nested groups multiplied.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[int] = []  # where in pieces each bracket is that is still open
    for token in _TOKENS.finditer(prompt):
        text, number = token[0], token[1]
        if number is not None and opened:
            start, weight = opened.pop(), float(number)
            pieces[start:] = [(inner, outer * weight) for inner, outer in pieces[start + 1 :]]
            heaviest = max(abs(value) for value in (weight, *(value for _, value in pieces[start:])))
            if heaviest > _MAX_WEIGHT:
                raise UsageError(
                    f"a weight of {heaviest:g} in the prompt: expected -{_MAX_WEIGHT:g} to {_MAX_WEIGHT:g}, those of "
                    "nested groups multiplied."
                )
            continue
        if text == "(":
            opened.append(len(pieces))
        elif text == ")" and opened:
            opened.pop()
        pieces.append((text[1:] if text in (r"\(", r"\)") else text, 1.0))
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined
