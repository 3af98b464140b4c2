"""The figures of an evaluation as a table, for the terminal and as a CSV file."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from minisd.evaluate.judging import FigureKind, Figures

_BETTER = {"low": "; lower is better", "high": "; higher is better"}


def table_text(first: str, labels: Sequence[str], rows: Sequence[Figures], kinds: Sequence[FigureKind]) -> str:
    """Rows of figures under their names. A column without figures is left out.

    Args:
        first: heading of the first column.
        labels: what stands there, one a row.
        rows: figures by name.
        kinds: the columns.
    """
    columns = {first: list(labels)} | {kind.name: [_cell(row, kind) for row in rows] for kind in _shown(rows, kinds)}
    return pd.DataFrame(columns).to_string(index=False)


def legend(rows: Sequence[Figures], kinds: Sequence[FigureKind]) -> str:
    """What the columns of such a table are, one a line."""
    return "\n".join(f"{kind.name}: {kind.title}{_BETTER.get(kind.better or '', '')}" for kind in _shown(rows, kinds))


def table_csv(steps: Sequence[int], rows: Sequence[Figures], kinds: Sequence[FigureKind], pick: int) -> bytes:
    """All figures as evaluation.json has them, one checkpoint a row: step, figures by their names, pick (1 or 0)."""
    columns: dict[str, list[float | int | None]] = {"step": list(steps)}
    columns |= {kind.name: [row.get(kind.name) for row in rows] for kind in kinds}
    columns["pick"] = [int(step == pick) for step in steps]
    return pd.DataFrame(columns).to_csv(index=False).encode()


def _shown(rows: Sequence[Figures], kinds: Sequence[FigureKind]) -> list[FigureKind]:
    return [kind for kind in kinds if any(row.get(kind.name) is not None for row in rows)]


def _cell(row: Figures, kind: FigureKind) -> str:
    value = row.get(kind.name)
    return "-" if value is None else format(value, kind.format)
