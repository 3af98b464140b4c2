"""What was collected so far, and how many pictures of it count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minisd.prepare.duplicates import near_duplicates
from minisd.prepare.examine import HASH_DIGITS, Examined, unfit
from minisd.prepare.journal import KEPT, Found
from minisd.prepare.options import Rules


class Collected:
    """The pictures in RAW, of all searches, and how many distinct ones of one search count.

    They are looked at as `clean` will look at them, so that it keeps as many: by today's rules, and of those that look
    alike the best copy, which may have come last. (One that two others were left out for may itself be left out for a
    better copy; then both count again, and there can be more than the limit.) What a person deleted from the folder
    does not count, and does not come back.

    Args:
        raw: the folder.
        found: its journal.
        query: the search whose pictures are counted.
        rules: today's.
    """

    def __init__(self, raw: Path, found: Sequence[Found], query: str, rules: Rules) -> None:
        self._query, self._rules = query, rules
        self._names = {entry.sha256: entry.file_name for entry in found if entry.file_name}
        there = [entry for entry in found if entry.file_name and (raw / entry.file_name).is_file()]
        there = [entry for entry in there if unfit(entry.width, entry.height, rules) is None]
        self._queries = [entry.query for entry in there]
        self._pictures = [
            Examined(
                sha256=entry.sha256,
                width=entry.width,
                height=entry.height,
                dhash=entry.dhash,
                suffix=Path(entry.file_name).suffix,
                size_bytes=entry.size_bytes,
            )
            for entry in there
        ]
        self._hashes = [_bits(picture) for picture in self._pictures]
        self._left_out = near_duplicates(self._pictures, rules.duplicate_distance)
        self.kept = self._count()

    def add(self, picture: Examined, file_name: str) -> tuple[str, str]:
        """Take in a picture that was fetched.

        Returns:
            Status and reason, as in Found. Saved under `file_name` should be what is KEPT or a "near-duplicate".
        """
        if (refused := unfit(picture.width, picture.height, self._rules)) is not None:
            return refused
        if (name := self._names.get(picture.sha256)) is not None:
            return "duplicate", f"the same file as {name}"
        before, number = self.kept, len(self._pictures)
        own = _bits(picture)
        alone = all((own ^ other).bit_count() > self._rules.duplicate_distance for other in self._hashes)
        self._names[picture.sha256] = file_name
        self._pictures.append(picture)
        self._hashes.append(own)
        self._queries.append(self._query)
        if alone:  # as nearly all are, and nothing changes for the others
            self.kept += 1
            return KEPT, ""
        self._left_out = near_duplicates(self._pictures, self._rules.duplicate_distance)
        self.kept = self._count()
        if self.kept > before:
            return KEPT, ""
        nearest = min(range(number), key=lambda index: (own ^ self._hashes[index]).bit_count())
        return "near-duplicate", f"looks like {self._names[self._pictures[nearest].sha256]}"

    def _count(self) -> int:
        return sum(query == self._query and index not in self._left_out for index, query in enumerate(self._queries))


def _bits(picture: Examined) -> int:
    """The 64 bits of the hash; pictures that look alike differ in few of them, and in no colour."""
    return int(picture.dhash[:HASH_DIGITS], 16)


def is_settled(entry: Found, rules: Rules) -> bool:
    """Whether an address need not be tried again: not if it could not be reached, or fits by today's rules."""
    if entry.status in ("too small", "too narrow") and entry.width:
        return unfit(entry.width, entry.height, rules) is not None
    return entry.status != "unreachable"
