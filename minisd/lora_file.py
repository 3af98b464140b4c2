"""LoRA files on the command line: python -m minisd.lora_file {inspect,convert,merge,resize} --help."""

from __future__ import annotations

import logging
import sys
from functools import partial

from minisd.errors import run_script
from minisd.lora_options import Convert, Inspect, Merge, Resize, parse_options


def main(options: Inspect | Convert | Merge | Resize) -> None:
    """Do what the command line says. Raises MinisdError."""
    # Only here: they load torch, which takes seconds that --help and a refused option do not need.
    from minisd.lora_commands import convert, merge, resize_file
    from minisd.lora_inspect import inspect

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if isinstance(options, Inspect):
        print(inspect(options.file))
    elif isinstance(options, Convert):
        convert(options)
    elif isinstance(options, Merge):
        merge(options)
    else:
        resize_file(options)


if __name__ == "__main__":
    sys.exit(run_script(partial(main, parse_options()), debug=False))
