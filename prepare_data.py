"""From a keyword, or a folder of pictures, to a captioned dataset that train.py can use.

python prepare_data.py all --query "8bit illustration" --limit 100 --output gen_ai_custom_dataset

Each stage is a command of its own, too, can be run again, and then does only what is missing.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to interrupt: no traceback of an import

from minisd.prepare.options import All, Caption, Clean, Collect, Options, Report, Serve, parse_options

OPTIONS = parse_options() if __name__ == "__main__" else None  # before anything slow: --help and refusals at once

import logging
import os
from contextlib import nullcontext
from functools import partial

from minisd.errors import DataError, UsageError, run_script
from minisd.run_lock import output_lock


def prepare(options: Options) -> None:
    """Carry out one command. Raises MinisdError."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not isinstance(options, Caption):
        raise UsageError("only `caption` works on several processes. Run the other stages without torchrun.")
    if isinstance(options, All | Collect | Clean):
        from minisd.prepare.source_folder import check_folders

        folder = options.output
        check_folders(folder, None if isinstance(options, Collect) else options.source)
    else:
        folder = options.data
        if not folder.is_dir():  # which the lock would make
            raise DataError(f"--data {str(folder)!r}: no such folder. Make it: prepare_data.py clean --from PICTURES.")
    # Who only reads may look while another writes, and serve locks the folder for as long as it saves something.
    alone = os.environ.get("RANK", "0") == "0" and not isinstance(options, Report | Serve)
    with output_lock(folder) if alone else nullcontext():
        stages = options.stages() if isinstance(options, All) else (options,)
        for stage in stages:
            _run(stage)


def _run(stage: Options | None) -> None:
    """Run one stage. Imported one by one: only `caption` needs torch."""
    if isinstance(stage, Collect):
        from minisd.prepare.collect import collect

        collect(stage)
    elif isinstance(stage, Clean):
        from minisd.prepare.clean import clean

        clean(stage)
    elif isinstance(stage, Caption):
        from minisd.prepare.caption import caption

        caption(stage)
    elif isinstance(stage, Report):
        from minisd.prepare.report import report

        report(stage)
    elif isinstance(stage, Serve):
        from minisd.prepare.serve import serve

        serve(stage)


if __name__ == "__main__":
    assert OPTIONS is not None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prefix = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    sys.exit(run_script(partial(prepare, OPTIONS), debug=OPTIONS.debug, prefix=prefix))
