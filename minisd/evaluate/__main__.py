"""Compare the checkpoints of a run: python -m minisd.evaluate --run OUTPUT."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

from minisd.errors import UsageError, run_script
from minisd.evaluate.options import EvaluateConfig, parse_options


def main(config: EvaluateConfig) -> None:
    """Do what the command line says. Raises MinisdError."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("an evaluation is one process. Start it without torchrun.")
    # Only here: it loads torch, which takes seconds that --help and a refused option do not need.
    from minisd.evaluate.evaluation import evaluate

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluate(config)


if __name__ == "__main__":
    CONFIG = parse_options()
    sys.exit(run_script(partial(main, CONFIG), debug=CONFIG.debug))
