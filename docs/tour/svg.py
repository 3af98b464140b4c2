"""The few pieces that diagrams.py puts its drawings together from, as lines of SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

INK, QUIET, PAPER, LINE = "#1f2430", "#5b6472", "#fbfaf7", "#9aa3b2"
# Attributes of text, to be added up.
LEFT, RIGHT, MONO = ' text-anchor="start"', ' text-anchor="end"', ' font-family="Menlo, Consolas, monospace"'
BOLD = ' font-weight="bold"'


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """A drawing on paper of its own: readable on a dark page, too."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0.5 L8 4 L0 7.5 z" fill="{QUIET}"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" rx="12" fill="{PAPER}"/>',
            *parts,
            "</svg>\n",
        )
    )


def text(x: float, y: float, words: str, size: float = 12, colour: str = INK, more: str = "") -> str:
    """Words, centred on x unless `more` says otherwise."""
    anchor = "" if "text-anchor" in more else ' text-anchor="middle"'
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{anchor}{more}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    """A rounded rectangle."""
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {size} rx="6" fill="{fill}" stroke="{LINE}"{more}/>'


def arrow(*points: tuple[float, float], more: str = "") -> str:
    """A line with corners and a head."""
    path = " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{QUIET}" stroke-width="1.4" marker-end="url(#to)"{more}/>'


def in_words(count: int) -> str:
    """A count in three digits: 860 M, 3.19 M."""
    for factor, letter in ((10**6, " M"), (10**3, " k")):
        if count >= factor:
            value = count / factor
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f}{letter}"
    return str(count)
