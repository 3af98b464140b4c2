"""GuardedPool's `map` without its processes, for tests that change or count what is done to a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minisd.picture_files import PictureError


class InlinePool:
    """Calls the function here, one item after the other."""

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            try:
                yield function(item)
            except PictureError as error:
                yield error
