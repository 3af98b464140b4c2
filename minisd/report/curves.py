"""Curves for the report: a few points that look like many, axes with round numbers, paths for an SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from minisd.report.run_files import Points

MAX_POINTS = 1000
WIDTH, HEIGHT = 1000, 300  # of the drawing; the page stretches it

_ROUND = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Line:
    """A curve in a chart.

    Args:
        name: in the legend.
        kind: what it looks like: "raw", "average", "train", "held-out" or "plain".
        points: at least one.
    """

    name: str
    kind: str
    points: Points


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with evenly spaced marks on its axes, from edge to edge: the page sets their labels beside the drawing.

    Args:
        title: above it.
        note: behind the title.
        lines: the curves.
        steps: marks of the lower axis.
        values: marks of the left axis, from the lowest.
        level: a value to rule a line at; None for none.
        is_minor: one of several small ones in a row.
    """

    title: str
    note: str
    lines: tuple[Line, ...]
    steps: tuple[float, ...]
    values: tuple[float, ...]
    level: float | None
    is_minor: bool

    def path(self, line: Line) -> str:
        """A curve as the d of an SVG path."""
        ends = (self.steps[-1] - self.steps[0], self.values[-1] - self.values[0])
        places = [
            f"{WIDTH * (step - self.steps[0]) / ends[0]:.1f} {self.height(value):.1f}" for step, value in line.points
        ]
        return "M" + "L".join(places) + ("h0" if len(places) == 1 else "")  # a dot, for the ends are round

    def height(self, value: float) -> float:
        """Where a value is in the drawing, from its top."""
        return HEIGHT * (self.values[-1] - value) / (self.values[-1] - self.values[0])

    @property
    def labels(self) -> list[str]:
        """The marks of the left axis in words, from the highest."""
        return [label(value, self.values[1] - self.values[0]) for value in reversed(self.values)]

    @property
    def data(self) -> str:
        """What the page reads values off by: JSON of the axes' ends and of each curve's points."""
        lines = [{"name": line.name, "points": [[step, _short(value)] for step, value in line.points]} for line in
                 self.lines]  # fmt: skip
        return json.dumps({"steps": [self.steps[0], self.steps[-1]], "lines": lines})


def make_chart(
    title: str,
    lines: Sequence[Line],
    last_step: int,
    *,
    note: str = "",
    level: float | None = None,
    is_minor: bool = False,
) -> Chart | None:
    """A chart of the curves that have points; None if none has.

    Args:
        title: above it.
        lines: the curves, any number of points.
        last_step: how far the lower axis goes at least: that a run is not at its end is to be seen.
        note: behind the title.
        level: a value that is shown in any case, with a rule.
        is_minor: one of several small ones in a row, with fewer marks.
    """
    thinned = tuple(Line(line.name, line.kind, thin(line.points)) for line in lines if line.points)
    if not thinned:
        return None
    shown = [value for line in thinned for _, value in line.points] + ([] if level is None else [level])
    first = min(0, *(line.points[0][0] for line in thinned))
    last = max(4, last_step, *(line.points[-1][0] for line in thinned))
    values = ticks(min(shown), max(shown), 2 if is_minor else 4)
    steps = ticks(first, last, 2 if is_minor else 4, whole=True)
    return Chart(title=title, note=note, lines=thinned, steps=steps, values=values, level=level, is_minor=is_minor)


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` of the points: first, last, and of each stretch between them the lowest and the highest.

    So a spike of one step in 100,000 is still there.
    """
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> tuple[float, ...]:
    """Evenly spaced round (or whole) numbers, the first not above `low` and the last not below `high`.

    About `count`, and two at least. Where `low` and `high` are almost the same, there is room around them.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    steps = (factor * size for factor in _ROUND)
    step = next(step for step in steps if step >= rough * 0.999 and (not whole or step % 1 == 0))
    start, end = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return tuple(number * step for number in range(start, end + 1))


def label(value: float, step: float) -> str:
    """A mark of an axis in words, with as many places as its spacing needs."""
    if value and (abs(value) < 1e-3 or step < 1e-4):
        return f"{value:.2g}".replace("e-0", "e-")
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**places, 6) % 1:  # steps of 2.5
        places += 1
    return f"{value:,.{places}f}"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
