"""The command line of prepare_data.py: its options, and mistakes said in one line.

Imports nothing slow, so that `--help` and a refusal come at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import ImageColor

from minisd.command_line import refuse, tyros_refusal
from minisd.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """What is searched for, and how much of it."""

    query: str
    """What to search for, such as "8bit illustration"."""
    limit: int = 100
    """Pictures wanted: distinct ones, large enough. More are fetched to make up for those that are not."""
    min_images: int = 1
    """End with code 3 if fewer were found."""
    safe_search: bool = True
    """Ask Bing to leave out adult pictures."""
    filter: Literal["line", "photo", "clipart", "gif", "transparent"] | None = None
    """Only drawings, photos ..., as Bing sorts them."""
    max_minutes: float = 30.0
    """End the search after so long, with what has been found."""

    def __post_init__(self) -> None:
        if not self.query.strip():
            raise UsageError(f'--query {self.query!r}: expected words to search for, such as "8bit illustration".')
        if len(self.query) > 1000:
            raise UsageError(
                f"--query: expected at most 1000 characters, got {len(self.query)}. Say it in fewer words."
            )
        if not 1 <= self.limit <= 10_000:
            raise UsageError(f"--limit {self.limit}: expected 1 to 10000 pictures.")
        if not 1 <= self.min_images <= self.limit:
            raise UsageError(f"--min-images {self.min_images}: expected 1 to --limit ({self.limit}).")
        if not 0 < self.max_minutes < math.inf:
            raise UsageError(f"--max-minutes {self.max_minutes}: expected minutes above 0.")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which pictures are kept, and how they are written."""

    min_side: int = 256
    """Leave out pictures with a side shorter than this, in pixels."""
    max_aspect: float = 4.0
    """Leave out pictures with a side more than so many times the other."""
    duplicate_distance: int = 4
    """Of pictures whose perceptual hashes (64 bits) differ in at most so many, keep the best. -1: keep all."""
    background: str = "white"
    """What is put behind transparent pictures: the name of a colour, or #RRGGBB."""
    resize: int | None = None
    """Make larger pictures as small as training at this resolution will make them. If not given, keep their size."""

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise UsageError(f"--min-side {self.min_side}: expected at least 1 pixel.")
        if not 1 <= self.max_aspect <= 16:
            raise UsageError(f"--max-aspect {self.max_aspect}: expected 1 (squares) to 16.")
        if not -1 <= self.duplicate_distance <= 16:
            raise UsageError(f"--duplicate-distance {self.duplicate_distance}: expected -1 (keep all) to 16.")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            wanted = "expected a colour's name, such as white, or #RRGGBB."
            raise UsageError(f"--background {self.background!r}: {wanted}") from None
        if self.resize is not None and not 64 <= self.resize <= 4096:
            raise UsageError(f"--resize {self.resize}: expected 64 to 4096 pixels.")


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """How pictures are described."""

    caption_model: str = "Salesforce/blip-image-captioning-base"
    """A BLIP model: a repo id on the Hub (Salesforce/blip-image-captioning-large describes more) or a folder."""
    caption_revision: str | None = None
    """Of that repository: branch, tag or commit."""
    batch_size: int = 8
    """Pictures described at once, by each process."""
    num_beams: int = 4
    """Beam search: how many wordings are followed at once. 1: none, the likeliest word each time."""
    max_new_tokens: int = 40
    """The longest caption, in tokens of BLIP."""
    repetition_penalty: float = 1.2
    """Above 1: words that were said are less likely to be said again. No three words are said twice in any case."""
    prefix: str = ""
    """Put before each caption that BLIP writes: "8bit illustration of" a castle."""
    trigger: str | None = None
    """The word that calls the style: put in front of a caption that BLIP wrote without it, and missed in others."""
    recaption: bool = False
    """Describe all pictures anew, also those that have a caption."""

    def __post_init__(self) -> None:
        if not self.caption_model.strip():
            raise UsageError("--caption-model: expected a repo id or a folder, got nothing.")
        for name in ("batch_size", "num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        if not 1 <= self.repetition_penalty <= 10:
            raise UsageError(f"--repetition-penalty {self.repetition_penalty}: expected 1 (none) to 10.")
        if not self.prefix.isprintable():
            raise UsageError(f"--prefix {self.prefix!r}: expected words in one line.")
        _check_trigger(self.trigger)


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Find pictures by keyword with Bing, and save them with where they are from. They belong to their makers."""

    crawl: Annotated[Crawl, tyro.conf.arg(name="")]
    output: Path
    """The dataset's folder; the pictures go into its folder raw/."""
    rules: Annotated[Rules, tyro.conf.arg(name="")] = field(default_factory=Rules)
    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Clean:
    """From pictures as they are to OUTPUT/train/*.png: decoded, upright, RGB, large enough, each once."""

    output: Path
    """The dataset's folder."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A folder of pictures of your own, which is not changed. If not given, what `collect` found."""
    follow_symlinks: bool = False
    """Also take pictures that links in that folder lead to outside of it."""
    rules: Annotated[Rules, tyro.conf.arg(name="")] = field(default_factory=Rules)
    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Describe the pictures that have no caption, with BLIP. On several GPUs: torchrun."""

    data: Path
    """The dataset's folder."""
    captioner: Annotated[Captioner, tyro.conf.arg(name="")] = field(default_factory=Captioner)
    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write DATA/report.html: the pictures as training will see them, their captions, and what was left out and why."""

    data: Path
    """The dataset's folder."""
    resolution: int = 512
    """The training resolution, which the crops are for."""
    trigger: str | None = None
    """Mark captions that miss this word."""
    debug: bool = False
    """Show where an error came from."""

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)
        _check_trigger(self.trigger)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Open the report in a browser of this machine, with captions to edit and pictures to drop and restore."""

    data: Path
    """The dataset's folder."""
    resolution: int = 512
    """The training resolution, which the crops are for."""
    trigger: str | None = None
    """Mark captions that miss this word."""
    port: int = 0
    """On 127.0.0.1; 0: any that is free."""
    browser: bool = True
    """Open a browser; else only print the address."""
    debug: bool = False
    """Show where an error came from."""

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)
        _check_trigger(self.trigger)
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: expected 0 to 65535.")


@dataclass(frozen=True, kw_only=True)
class All:
    """From a keyword (--query) or a folder (--from) to a dataset for train.py: collect, clean, caption, report."""

    output: Path
    """The dataset's folder."""
    query: str | None = None
    """What to search for, such as "8bit illustration"."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A folder of pictures of your own, which is not changed."""
    limit: int = 100
    """With --query: pictures wanted, distinct ones, large enough."""
    min_images: int = 1
    """With --query: end with code 3 if fewer were found."""
    safe_search: bool = True
    """Ask Bing to leave out adult pictures."""
    filter: Literal["line", "photo", "clipart", "gif", "transparent"] | None = None
    """Only drawings, photos ..., as Bing sorts them."""
    max_minutes: float = 30.0
    """End the search after so long, with what has been found."""
    follow_symlinks: bool = False
    """With --from: also take pictures that links in that folder lead to outside of it."""
    resolution: int = 512
    """The training resolution, which the report shows the crops for."""
    rules: Annotated[Rules, tyro.conf.arg(name="")] = field(default_factory=Rules)
    captioner: Annotated[Captioner, tyro.conf.arg(name="")] = field(default_factory=Captioner)
    debug: bool = False
    """Show where an error came from."""

    def __post_init__(self) -> None:
        if (self.query is None) == (self.source is None):
            got = "neither" if self.query is None else "both"
            raise UsageError(f"expected --query WORDS or --from FOLDER, got {got}. Give one of them.")
        self.stages()  # checks what they check
        _check_resolution(self.resolution)

    def stages(self) -> tuple[Collect | None, Clean, Caption, Report]:
        """The options of each stage; no collect with --from."""
        collect = None
        if self.query is not None:
            crawl = Crawl(
                query=self.query,
                limit=self.limit,
                min_images=self.min_images,
                safe_search=self.safe_search,
                filter=self.filter,
                max_minutes=self.max_minutes,
            )
            collect = Collect(crawl=crawl, output=self.output, rules=self.rules)
        return (
            collect,
            Clean(output=self.output, source=self.source, follow_symlinks=self.follow_symlinks, rules=self.rules),
            Caption(data=self.output, captioner=self.captioner),
            Report(data=self.output, resolution=self.resolution, trigger=self.captioner.trigger),
        )


Options = Collect | Clean | Caption | Report | Serve | All

_PATHS = ("--output", "--from", "--data", "--caption-model")

_Subcommands = (
    Annotated[All, tyro.conf.subcommand("all")]
    | Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Clean, tyro.conf.subcommand("clean")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; a mistake ends the process with one line on stderr and exit code 2."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        for option, value in pairwise([*words, "-"]):
            # Path("") is the current folder: not what somebody means whose shell variable is not set.
            if (option in _PATHS and value == "") or (option.removesuffix("=") in _PATHS and option.endswith("=")):
                raise UsageError(f"{option.removesuffix('=')}: expected a folder, got nothing.")
        with tyros_refusal():
            options: Options = tyro.cli(
                _Subcommands,
                args=arguments,
                prog="python prepare_data.py",
                description="From a keyword, or a folder of pictures, to a captioned dataset.",
            )
            return options
    except UsageError as error:
        refuse(str(error))


def _check_resolution(resolution: int) -> None:
    if not 64 <= resolution <= 4096:
        raise UsageError(f"--resolution {resolution}: expected 64 to 4096 pixels.")


def _check_trigger(trigger: str | None) -> None:
    if trigger is not None and not (trigger.strip() and trigger.isprintable()):
        raise UsageError(f"--trigger {trigger!r}: expected a word. Leave it out for none.")
