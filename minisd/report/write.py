"""OUTPUT/report.html, written: by train.py at its end, by evaluate, and by python -m minisd.report at any time."""

from __future__ import annotations

import logging
from pathlib import Path

from minisd.atomic import write_atomically
from minisd.errors import one_line
from minisd.report.evaluation import read_evaluation
from minisd.report.page import render
from minisd.report.run_files import read_run

log = logging.getLogger(__name__)


def write_report(run: Path) -> Path:
    """Write the page of a run into its folder: one file, which fetches nothing.

    Nothing outside `run` and the dataset is read, and nothing else is written. The run may be going on: what is not
    there yet, or cannot be read, is left out.

    Args:
        run: OUTPUT.

    Returns:
        The file.

    Raises:
        DataError: this is no run's folder.
        UsageError: its config.json is of another version of minisd.
        DiskError: the file cannot be written.
    """
    path = run / "report.html"
    write_atomically(path, render(read_run(run), read_evaluation(run)).encode("utf-8", "replace"))
    log.info("to look at: %s", one_line(str(path)))
    return path
