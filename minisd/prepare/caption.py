"""Captions for the pictures that have none, with BLIP, on one process or several.

What a picture gets does not depend on how many processes there are, nor on where an earlier run was stopped: pictures
are described in batches of always the same size, so that they are computed in the same way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minisd.atomic import remove_leftovers
from minisd.data import with_trigger
from minisd.distributed import Distributed, gather, process_group, wait_for_all
from minisd.errors import DataError, one_line
from minisd.picture_files import load_image
from minisd.prepare.blip import load_captioner
from minisd.prepare.caption_journal import Said, delete_said, read_said, write_said
from minisd.prepare.caption_lint import count_tokens, lint, tidy
from minisd.prepare.options import Caption, Captioner
from minisd.prepare.table import (
    Picture,
    one_line_caption,
    picture_path,
    read_pictures,
    table_path,
    with_flags,
    write_pictures,
)
from minisd.vision_files import BLIP, resolve_vision_model

log = logging.getLogger(__name__)

Describe = Callable[[Sequence[Image.Image]], list[str]]

_SAVE_SECONDS = 3.0
_MOST_FAILURES = 20  # in a row: then it is not the pictures
_READERS = 4  # threads, of each process


def caption(options: Caption, *, describe: Describe | None = None) -> None:
    """Describe the pictures of a dataset that have no caption, and note in its table what is odd about any caption.

    Under torchrun each process describes a share. Captions that are there are kept, unless --recaption. Stopped and
    started again, it goes on. A picture that cannot be read or described is passed over, with a warning.

    Args:
        options: the command.
        describe: pictures -> what they show, one text for each; None for BLIP.

    Raises:
        DataError: the table or a journal is damaged, or no picture could be read.
        WeightsError, NetworkError, UsageError: there is no such model, or it cannot be used.
        DiskError: something cannot be written.
    """
    data, captioner = options.data, options.captioner
    with process_group() as dist:
        if dist.is_main:
            _take_over(data, captioner)
        wait_for_all(dist)
        before, pictures = read_said(data), read_pictures(data)
        wait_for_all(dist)  # nobody writes before all have read
        done = {(entry.file_name, entry.sha256) for entry in before}
        wanted = [picture for picture in pictures if captioner.recaption or not picture.text.strip()]
        missing = [picture for picture in wanted if (picture.file_name, picture.sha256) not in done]
        counts: Counter[str] = Counter()
        if missing:
            # The main process goes on with the journal of an earlier run.
            work = _Work(options, dist, describe or _blip(captioner, dist), before if dist.is_main else [])
            work.describe(missing[dist.rank :: dist.world_size])
            for share in gather(dist, work.counts):
                counts.update(share)
            if work.failure is not None and counts["failed"] == len(pictures):
                raise work.failure
        if dist.is_main:
            said = read_said(data)
            if len(said) < len(before) + counts["described"]:
                raise DataError(
                    f"{data / 'captions'}: expected {counts['described']} new captions, got {len(said) - len(before)}. "
                    "All processes need the same folder."
                )
            _finish(data, captioner, said, counts)
        wait_for_all(dist)


class _Work:
    """What one process does: describes its share of the pictures, and writes its journal."""

    def __init__(self, options: Caption, dist: Distributed, describe: Describe, said: Sequence[Said]) -> None:
        self.counts: Counter[str] = Counter()
        self.failure: Exception | None = None  # the last one
        self._data, self._captioner, self._settings = options.data, options.captioner, _settings(options.captioner)
        self._dist, self._describe, self._said = dist, describe, list(said)
        self._failures_in_a_row = 0

    def describe(self, pictures: Sequence[Picture]) -> None:
        """Caption pictures. Raises the last failure if there are too many in a row."""
        saved = time.monotonic()
        try:
            with tqdm(
                total=len(pictures), desc="caption", unit="picture", disable=None if self._dist.is_main else True
            ) as bar:
                for batch in _batches(self._data, pictures, self._captioner.batch_size):
                    self._describe_batch(batch)
                    bar.update(len(batch))
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        write_said(self._data, self._dist.rank, self._said)
                        saved = time.monotonic()
        finally:
            write_said(self._data, self._dist.rank, self._said)

    def _describe_batch(self, batch: Sequence[tuple[Picture, Future[Image.Image]]]) -> None:
        read = []
        for picture, reading in batch:
            try:
                read.append((picture, reading.result()))
            except DataError as error:
                self._failed(picture, error)
        together = self._describe_together([image for _, image in read])
        for index, (picture, image) in enumerate(read):
            try:
                words = together[index] if together else self._describe([image])[0]
            except Exception as error:
                self._failed(picture, error)
            else:
                self._say(picture, words)

    def _describe_together(self, images: Sequence[Image.Image]) -> list[str]:
        """What the pictures show, said at once; nothing if that fails."""
        size = self._captioner.batch_size
        if not images or size == 1:
            return []
        filled = [*images] + [images[-1]] * (size - len(images))
        try:
            return self._describe(filled)[: len(images)]
        except Exception as error:
            log.warning("a batch of %d failed, now one by one: %s", size, _in_a_line(error))
            return []

    def _say(self, picture: Picture, words: str) -> None:
        text = tidy(words)
        self.counts["described"] += 1
        self.counts["mended"] += len(text.split()) < len(words.split())
        self._failures_in_a_row = 0
        key = {"file_name": picture.file_name, "sha256": picture.sha256, "settings": self._settings}
        self._said.append(Said(text=_complete(text, self._captioner), **key))

    def _failed(self, picture: Picture, error: Exception) -> None:
        log.warning("%s is not described: %s", one_line(picture.file_name), _in_a_line(error))
        self.counts["failed"] += 1
        self.failure = error
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= _MOST_FAILURES:
            raise error


def _settings(captioner: Captioner) -> str:
    """A hash of what captions depend on. The size of a batch is not among it."""
    values = asdict(captioner)
    del values["batch_size"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _take_over(data: Path, captioner: Captioner) -> None:
    """Put what stopped runs have written into the table, and keep in one journal what is not to be written again."""
    said = read_said(data)
    if said:
        write_pictures(data, _with_captions(read_pictures(data), said, captioner))
        ours = [entry for entry in said if entry.settings == _settings(captioner)]
        write_said(data, 0, [*dict.fromkeys(ours)])
    delete_said(data, keep="rank-0.jsonl")
    remove_leftovers(table_path(data).parent)


def _finish(data: Path, captioner: Captioner, said: Sequence[Said], counts: Counter[str]) -> None:
    """Put the captions into the table, look at all of them, and say how it ended."""
    pictures = _with_captions(read_pictures(data), said, captioner)  # read again: somebody may have edited it
    tokens = count_tokens([picture.text for picture in pictures])
    flags = [lint(p.text, trigger=captioner.trigger, tokens=n) for p, n in zip(pictures, tokens, strict=True)]
    write_pictures(data, [with_flags(*found) for found in zip(pictures, flags, strict=True)])
    delete_said(data)
    had = len(pictures) - counts["described"] - counts["failed"]
    log.info("%d pictures: %d described, %d had captions", len(pictures), counts["described"], had)
    if counts["mended"]:
        log.info("words that mean nothing, and repetitions, were taken out of %d captions", counts["mended"])
    if counts["failed"]:
        log.warning("%d pictures could not be described. Run caption again, or leave them out.", counts["failed"])
    odd = Counter(flag for found in flags for flag in found)
    if odd:
        log.info("to look at: %s; see `report` or `serve`", ", ".join(f"{n} {flag}" for flag, n in odd.most_common()))


def _with_captions(pictures: Sequence[Picture], said: Sequence[Said], captioner: Captioner) -> list[Picture]:
    """The pictures with what was said of them: where there is no caption and, of this run, with --recaption anywhere.

    Where nothing was said, an old caption stays.
    """
    settings = _settings(captioner)
    ours_last = sorted(said, key=lambda entry: entry.settings == settings)
    found = {(entry.file_name, entry.sha256): entry for entry in ours_last if entry.text}
    captioned = []
    for picture in pictures:
        entry = found.get((picture.file_name, picture.sha256))
        anew = captioner.recaption and entry is not None and entry.settings == settings
        if entry is not None and (anew or not picture.text.strip()):
            picture = replace(picture, text=entry.text, caption_source="blip")
        captioned.append(picture)
    return captioned


def _complete(words: str, captioner: Captioner) -> str:
    """The caption with prefix and trigger word; "" if nothing was said."""
    words, prefix = one_line_caption(words), captioner.prefix.strip()
    if not words:
        return ""
    return with_trigger(f"{prefix} {words}" if prefix else words, captioner.trigger)


def _blip(captioner: Captioner, dist: Distributed) -> Describe:
    find = partial(resolve_vision_model, BLIP, captioner.caption_model, revision=captioner.caption_revision)
    if dist.is_main:
        find()  # downloads once, for all
    wait_for_all(dist)
    return load_captioner(
        find(),
        num_beams=captioner.num_beams,
        max_new_tokens=captioner.max_new_tokens,
        repetition_penalty=captioner.repetition_penalty,
        device=dist.device,
    ).describe


def _batches(data: Path, pictures: Sequence[Picture], size: int) -> Iterator[list[tuple[Picture, Future[Image.Image]]]]:
    """Pictures in batches, the next of which is being read while one is worked on."""
    with ThreadPoolExecutor(_READERS) as readers:

        def read(start: int) -> list[tuple[Picture, Future[Image.Image]]]:
            return [(picture, readers.submit(_load, data, picture)) for picture in pictures[start : start + size]]

        ahead = read(0)
        for start in range(size, len(pictures) + size, size):
            batch, ahead = ahead, read(start)
            yield batch


def _load(data: Path, picture: Picture) -> Image.Image:
    return load_image(picture_path(data, picture.file_name))


def _in_a_line(error: Exception) -> str:
    return one_line(" ".join(f"{type(error).__name__}: {error}".split())[:300])
