"""What the report shows, as plain values: a card for each picture, pairs that look alike, bars of the charts.

Nothing here reads a file or knows HTML; the template escapes what it prints.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from urllib.parse import urlsplit

from minisd.buckets import PIXELS_PER_LATENT, Size, bucket_geometry, default_step
from minisd.errors import DataError, one_line
from minisd.prepare.caption_lint import MAX_TOKENS, lint
from minisd.prepare.table import DROPPED, Picture

_MUCH = 0.15  # of a picture that is cut away
_LABELS = 14  # of buckets in the chart; the others are counted together
_WORDS = 24
_TOKENS_IN_BAR = 7
_WORD = re.compile(r"\w*[^\W\d_][\w'-]*")
# fmt: off
_SMALL_WORDS = {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "her", "his", "in",
                "into", "is", "it", "its", "of", "on", "or", "that", "the", "their", "there", "to", "up", "with"}
# fmt: on
# What a flag means, for those who wonder; in the order of the chips. Those of a picture come last.
FLAGS = {
    "empty": "No caption: the picture teaches the style to whatever is drawn.",
    "too long": f"More than {MAX_TOKENS} tokens, begin and end included: CLIP does not read the rest.",
    "repeated phrase": "The same words again: the captioner went in circles.",
    "BLIP word": "A word that BLIP makes up, such as arafed.",
    "trigger missing": "The trigger word is not in the caption.",
    "much cropped": f"More than {_MUCH:.0%} of the picture is outside of its frame.",
    "small": "Fewer pixels than the training resolution asks for: it is used as it is, not enlarged.",
    "unusable": "Too small for training at this resolution, or it cannot be read.",
}
OF_PICTURES = ("much cropped", "small", "unusable")


@dataclass(frozen=True)
class Frame:
    """The part of a picture that training shows: its corner and size in the picture's pixels, and the bucket's size."""

    left: float
    top: float
    width: float
    height: float
    bucket: Size
    cropped: float
    small: bool


@dataclass(frozen=True)
class Source:
    """Where a picture is from: what to show, and the address to go to, "" if there is none that is safe."""

    name: str
    link: str


@dataclass(frozen=True)
class Card:
    """A picture of the dataset. `thumbnail` and `link` are addresses, "" for none."""

    file_name: str
    caption: str
    caption_source: str
    width: int
    height: int
    tokens: int
    flags: tuple[str, ...]
    frame: Frame | None
    source: Source
    query: str
    thumbnail: str
    link: str


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not in the dataset, and why."""

    name: str
    width: int
    height: int
    status: str
    reason: str
    source: Source
    thumbnail: str
    file_name: str  # of a picture that can be restored, else ""
    kept: Card | None  # which looks the same


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: `warn` if it counts what is better not there; `shape` is that of a bucket."""

    label: str
    count: int
    warn: bool = False
    shape: Size | None = None


@dataclass(frozen=True)
class Charts:
    """The bars of each chart."""

    sides: list[Bar]
    buckets: list[Bar]
    tokens: list[Bar]
    words: list[Bar]


def training_frame(size: Size, resolution: int) -> Frame | None:
    """The part of a picture (height, width) that train.py shows with its defaults; None if it refuses the picture."""
    step = default_step(resolution, PIXELS_PER_LATENT)
    try:
        geometry = bucket_geometry(size, resolution, step, upscale=False)
    except DataError:
        return None
    down, across = (pixels / resized for pixels, resized in zip(size, geometry.resized, strict=True))
    top, left = geometry.corner(None)
    height, width = geometry.size
    small = geometry != bucket_geometry(size, resolution, step, upscale=True)
    return Frame(left * across, top * down, width * across, height * down, geometry.size, geometry.cropped_share, small)


def source_of(url: str) -> Source:
    """Where a picture is from, in a form that can do no harm: only http and https addresses can be followed."""
    try:
        parts = urlsplit(url)
        safe = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
        name = parts.hostname or url
    except ValueError:  # an address in brackets that is none
        safe, name = False, url
    return Source(one_line(name)[:60], url if safe else "")


def make_card(
    picture: Picture, tokens: int, *, resolution: int, trigger: str | None, thumbnail: str, link: str
) -> Card:
    """The card of a picture. A width and height of 0, or no thumbnail, mean that it cannot be read."""
    size = (picture.height, picture.width)
    frame = training_frame(size, resolution) if min(size) > 0 else None
    of_picture = [frame is None or not thumbnail, frame is not None and frame.small]
    flags = list(lint(picture.text, trigger=trigger, tokens=tokens))
    if frame is not None and frame.cropped > _MUCH:
        flags.append("much cropped")
    flags += [flag for flag, holds in zip(("unusable", "small"), of_picture, strict=True) if holds]
    return Card(
        file_name=picture.file_name,
        caption=picture.text,
        caption_source=picture.caption_source,
        width=picture.width,
        height=picture.height,
        tokens=tokens,
        flags=tuple(flags),
        frame=frame,
        source=source_of(picture.source_url),
        query=picture.query,
        thumbnail=thumbnail,
        link=link,
    )


def make_left_out(picture: Picture, cards: Mapping[str, Card], *, thumbnail: str) -> LeftOut:
    """A row of what was left out. `cards`: of the dataset, by file name."""
    name = picture.original or picture.file_name or picture.source_url
    return LeftOut(
        name=one_line(name)[:120],
        width=picture.width,
        height=picture.height,
        status=picture.status,
        reason=picture.reason,
        source=source_of(picture.source_url),
        thumbnail=thumbnail,
        file_name=picture.file_name if picture.status == DROPPED else "",
        kept=cards.get(picture.duplicate_of),
    )


def flag_counts(cards: Iterable[Card]) -> dict[str, int]:
    """How many pictures have each flag, in the order of FLAGS."""
    counts = Counter(flag for card in cards for flag in card.flags)
    return {flag: counts[flag] for flag in FLAGS}


def mean_crop(cards: Sequence[Card]) -> float:
    """The share of a picture that is cut away on average."""
    return fmean([card.frame.cropped for card in cards if card.frame is not None] or [0.0])


def by_status(left_out: Iterable[LeftOut]) -> list[tuple[str, list[LeftOut]]]:
    """What was left out for each reason, most first."""
    groups: dict[str, list[LeftOut]] = {}
    for row in left_out:
        groups.setdefault(row.status, []).append(row)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def of_caption(flags: Iterable[str]) -> bool:
    """Whether one of the flags is about the caption."""
    return any(flag not in OF_PICTURES for flag in flags)


def make_charts(cards: Sequence[Card], resolution: int) -> Charts:
    """The bars of the charts; those of words are clickable and have no case."""
    sides = [min(card.width, card.height) for card in cards if card.width]
    # Shares of the resolution: what is left of it is enlarged or used as it is, what is right of it made smaller.
    edges = [int(resolution * share) for share in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)]
    seen = Counter(bisect.bisect(edges, side) for side in sides)
    names = [f"< {edges[0]}", *(f"{a}-{b - 1}" for a, b in pairwise(edges)), f"{edges[-1]}+"]
    bars = [Bar(name, seen[index], warn=index < edges.index(resolution) + 1) for index, name in enumerate(names)]
    used = [index for index, bar in enumerate(bars) if bar.count]
    lengths = Counter(min((card.tokens - 1) // _TOKENS_IN_BAR, MAX_TOKENS // _TOKENS_IN_BAR) for card in cards)
    tokens = [
        Bar(f"{i * _TOKENS_IN_BAR + 1}-{(i + 1) * _TOKENS_IN_BAR}", lengths[i])
        for i in range(MAX_TOKENS // _TOKENS_IN_BAR)
    ]
    tokens.append(Bar(f"{MAX_TOKENS + 1}+", lengths[MAX_TOKENS // _TOKENS_IN_BAR], warn=True))
    return Charts(
        sides=bars[used[0] : used[-1] + 1] if used else [],
        buckets=_bucket_bars(cards),
        tokens=tokens,
        words=_common_words(card.caption for card in cards),
    )


def _bucket_bars(cards: Sequence[Card]) -> list[Bar]:
    """The commonest buckets, from tall to wide."""
    counts = Counter(card.frame.bucket for card in cards if card.frame is not None)
    most = counts.most_common(_LABELS)
    bars = [
        Bar(f"{width} x {height}", count, shape=(height, width))
        for (height, width), count in sorted(most, key=lambda bucket: (-bucket[0][0] / bucket[0][1], bucket[0]))
    ]
    others = counts.total() - sum(count for _, count in most)
    return [*bars, Bar(f"{len(counts) - len(most)} others", others)] if others else bars


def _common_words(captions: Iterable[str]) -> list[Bar]:
    """The words that are in most captions, small ones left out; once a caption."""
    counts = Counter(word for text in captions for word in set(_WORD.findall(text.lower())) - _SMALL_WORDS)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Bar(word, count) for word, count in ranked[:_WORDS]]
