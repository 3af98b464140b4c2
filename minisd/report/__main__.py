"""Write OUTPUT/report.html: python -m minisd.report --run OUTPUT. Also while the run goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from minisd.command_line import refuse, tyros_refusal
from minisd.errors import UsageError, run_script


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write OUTPUT/report.html: the recipe, the data, the curves, the pictures along a run, in one file."""

    run: Path
    """The --output of the run; it may still be going on."""
    debug: bool = False
    """Show the traceback of an error."""


def parse_options(arguments: Sequence[str] | None = None) -> ReportConfig:
    """Read the command line; a mistake ends the process with one line on stderr and exit code 2."""
    try:
        with tyros_refusal():
            options: ReportConfig = tyro.cli(ReportConfig, args=arguments, prog="python -m minisd.report")
            return options
    except UsageError as error:
        refuse(str(error))


def main(config: ReportConfig) -> None:
    """Write the page. Raises MinisdError."""
    from minisd.report.write import write_report  # not before --help is answered

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_report(config.run)


if __name__ == "__main__":
    CONFIG = parse_options()
    sys.exit(run_script(partial(main, CONFIG), debug=CONFIG.debug))
