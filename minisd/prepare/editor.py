"""The dataset that serve.py shows: what the page is made of, and the changes that a person makes there.

Everything is read anew for each request, for other programs may write the dataset, too; each change is made alone, in
the files, before it is answered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minisd.errors import DataError, one_line
from minisd.picture_files import PictureError, open_regular
from minisd.prepare.caption_lint import count_tokens, lint
from minisd.prepare.dropping import drop, restore
from minisd.prepare.examine import preview, suffix_of
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Serve
from minisd.prepare.report import find_picture, saved_preview, title_of, with_sizes
from minisd.prepare.report_data import make_card
from minisd.prepare.report_page import View, render
from minisd.prepare.table import (
    DROPPED,
    Picture,
    one_line_caption,
    read_pictures,
    read_rejected,
    with_flags,
    write_pictures,
)
from minisd.run_lock import output_lock

_THUMBNAIL = 384
_THUMBNAILS = 4096  # kept in memory, some 25 kB each
_PATIENCE = 5.0  # seconds for another command to end what it writes
# By the suffix that belongs to the content. SVG, which may have scripts, is not among them.
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif", ".bmp": "image/bmp", ".webp": "image/webp",
          ".tif": "image/tiff", ".avif": "image/avif"}  # fmt: skip


class Editor:
    """What can be seen and done. Used by several threads at once.

    Args:
        options: of the command.
        pool: processes that decode pictures.
    """

    def __init__(self, options: Serve, pool: GuardedPool) -> None:
        self.options, self.data = options, options.data
        self._pool = pool
        self.writing = threading.Lock()  # run.lock is for other processes: this one could take it any number of times
        self._sizes: dict[str, tuple[int, int]] = {}  # which the table does not say
        self._preview = lru_cache(maxsize=_THUMBNAILS)(self._make_preview)

    def page(self) -> str:
        """The page as it is now."""
        pictures, rejected = self._with_sizes(read_pictures(self.data)), read_rejected(self.data)

        def left_out(picture: Picture) -> str:
            if picture.status == DROPPED:
                return _address("thumbnail", picture.file_name)
            return _address("left-out", picture.original_sha256) if saved_preview(self.data, picture) else ""

        view = View(
            title=title_of(self.data, pictures),
            resolution=self.options.resolution,
            trigger=self.options.trigger,
            thumbnail=lambda picture: _address("thumbnail", picture.file_name) if picture.width else "",
            left_out=left_out,
            link=lambda picture: _address("picture", picture.file_name),
            editable=True,
        )
        return render(pictures, rejected, view)

    def thumbnail(self, file_name: str) -> tuple[str, bytes] | None:
        """A small version of a picture, also of a dropped one: media type and bytes; None if there is none."""
        path = self._path(file_name)
        if path is None:
            return None
        known = path.stat()
        jpeg = self._preview(path, known.st_mtime_ns, known.st_size)
        return None if jpeg is None else ("image/jpeg", jpeg)

    def picture(self, file_name: str) -> tuple[str, bytes] | None:
        """A picture as it is: media type by content and bytes; None if there is none."""
        path = self._path(file_name)
        if path is None:
            return None
        with open_regular(path) as file:
            content = file.read()
        kind = _TYPES.get(suffix_of(content[:32]))
        return None if kind is None else (kind, content)

    def left_out(self, sha256: str) -> tuple[str, bytes] | None:
        """The preview of a picture that was left out, by its hash: media type and bytes; None if there is none."""
        jpeg = saved_preview(self.data, Picture(original_sha256=sha256))
        return ("image/jpeg", jpeg) if jpeg else None

    def set_caption(self, file_name: str, before: str, text: str) -> dict[str, Any]:
        """Change a caption, if it still is what the page shows.

        Returns:
            The caption, as it is saved, its length in tokens and the flags of the picture; or, if somebody else has
            changed it, {"error", "caption"} with theirs.

        Raises:
            DataError: the picture is gone.
            DiskError: the table cannot be written.
        """
        with self._changing():
            pictures = read_pictures(self.data)
            index = next((i for i, picture in enumerate(pictures) if picture.file_name == file_name), None)
            if index is None:
                raise DataError("This picture is not in the dataset any more. Reload the page.")
            picture = pictures[index]
            if _as_shown(picture.text) != _as_shown(before):
                error = f"Changed elsewhere meanwhile, to: {one_line(picture.text)}. Ctrl-Enter replaces that."
                return {"error": error, "caption": _as_shown(picture.text)}
            picture = replace(picture, text=one_line_caption(text), caption_source="edited")
            (tokens,) = count_tokens([picture.text])
            flags = lint(picture.text, trigger=self.options.trigger, tokens=tokens)
            pictures[index] = with_flags(picture, flags)
            write_pictures(self.data, pictures)
        (shown,) = self._with_sizes([picture])
        resolution, trigger = self.options.resolution, self.options.trigger
        card = make_card(shown, tokens, resolution=resolution, trigger=trigger, thumbnail="shown", link="")
        return {"caption": picture.text, "tokens": tokens, "flags": card.flags}

    def drop(self, file_name: str) -> dict[str, Any]:
        """Take a picture out."""
        with self._changing():
            drop(self.data, file_name)
        return {}

    def restore(self, file_name: str) -> dict[str, Any]:
        """Put a picture back that was taken out."""
        with self._changing():
            restore(self.data, file_name)
        return {}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the dataset, among our threads and among processes."""
        with self.writing, output_lock(self.data, patience=_PATIENCE):
            yield

    def _path(self, file_name: str) -> Path | None:
        return find_picture(self.data, Picture(file_name=file_name, status=DROPPED))  # dropped or not

    def _with_sizes(self, pictures: Sequence[Picture]) -> list[Picture]:
        """The rows with all sizes; each picture is looked at once at most."""
        new = [picture for picture in pictures if not picture.width and picture.file_name not in self._sizes]
        self._sizes |= {row.file_name: (row.width, row.height) for row in with_sizes(self.data, new, self._pool)}
        filled = []
        for picture in pictures:
            if not picture.width:
                width, height = self._sizes[picture.file_name]
                picture = replace(picture, width=width, height=height)
            filled.append(picture)
        return filled

    def _make_preview(self, path: Path, _changed: int, _size: int) -> bytes | None:
        """The arguments after the path say which state of the file a thumbnail in memory is of."""
        try:
            return self._pool.submit(preview, path, _THUMBNAIL).result()
        except PictureError:
            return None


def _address(kind: str, name: str) -> str:
    """Where the server has a picture, relative to the page."""
    return f"{kind}/{quote(name, safe='')}"


def _as_shown(caption: str) -> str:
    """A caption as a browser's text field gives it back."""
    return caption.replace("\r\n", "\n").replace("\r", "\n")
