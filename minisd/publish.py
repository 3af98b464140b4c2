"""Publish a run's LoRA on the Hugging Face Hub: python -m minisd.publish --help.

train.py --push-to-hub does the same at its end. What is sent is in OUTPUT/hub (publication.py), the card in it is
model_card.py's, and hub_upload.py sends it.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from minisd.command_line import refuse, tyros_refusal
from minisd.config import check_hub_model_id
from minisd.errors import NetworkError, UsageError, run_script

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Publish the LoRA of a run on the Hugging Face Hub, with a model card and sample pictures. The token is that of
    `hf auth login`, or HF_TOKEN.
    """

    run: Path
    """OUTPUT of train.py."""
    hub_model_id: str
    """The repository to publish to, USER/NAME. It is made if it is not there."""
    license: str | None = None
    """Licence on the model card, in the Hub's spelling: openrail++, cc-by-4.0 ... If not given, that of the base's
    family: creativeml-openrail-m for SD 1.x, openrail++ for SD 2.x and XL."""
    private: bool = False
    """If the repository is made, only you can see it."""
    lora: Path | None = None
    """The LoRA to publish, such as RUN/checkpoints/step-000500/lora.safetensors; RUN/lora.safetensors if not given."""
    dry_run: bool = False
    """Write RUN/hub, which is what would be sent, and send nothing."""
    debug: bool = False
    """Show the traceback of an error."""


def parse_options(arguments: Sequence[str] | None = None) -> Publish:
    """Read the command line; a mistake ends the process with one line on stderr and exit code 2."""
    try:
        with tyros_refusal():
            options: Publish = tyro.cli(Publish, args=arguments, prog="python -m minisd.publish")
            return options
    except UsageError as error:
        refuse(str(error))


def publish(options: Publish) -> str:
    """Write RUN/hub and send it, in one commit.

    Returns:
        The address of the page on the Hub; with `dry_run`, the folder.

    Raises:
        UsageError: a malformed name, no token, or a LoRA that minisd has not written.
        WeightsError: there is no LoRA, or it cannot be read.
        NetworkError: the Hub cannot be reached, or refuses; says how to try again.
        DiskError: RUN/hub cannot be written.
    """
    repo = options.hub_model_id
    check_hub_model_id(repo)
    # Only here: they load torch, which takes seconds that --help and a refused option do not need.
    from minisd.hub_upload import upload
    from minisd.publication import FOLDER, write_publication

    lora = options.run / "lora.safetensors" if options.lora is None else options.lora
    names = write_publication(options.run, repo, lora, options.license)
    folder = options.run / FOLDER
    if options.dry_run:
        log.info("%s: what would be sent: %s", folder, ", ".join(names))
        return str(folder)
    try:
        page = upload(repo, folder, names, private=options.private, message=f"Publish {names[1]}")
    except NetworkError as error:
        raise NetworkError(f"{error} The run itself is complete. To publish it later: {_command(options)}") from error
    log.info("published: %s", page)
    return page


def _command(options: Publish) -> str:
    """The command line that publishes the same."""
    words = ["python", "-m", "minisd.publish", "--run", str(options.run), "--hub-model-id", options.hub_model_id]
    words += ["--license", options.license] if options.license is not None else []
    words += ["--private"] if options.private else []
    words += ["--lora", str(options.lora)] if options.lora is not None else []
    return shlex.join(words)


def main(options: Publish) -> None:
    """Publish, as the command line says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    publish(options)


if __name__ == "__main__":
    OPTIONS = parse_options()
    sys.exit(run_script(partial(main, OPTIONS), debug=OPTIONS.debug))
