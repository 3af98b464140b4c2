"""Pictures that look alike, and which of them to keep.

Two pictures look alike if their perceptual hashes (dHash, 64 bits) differ in few bits and their colours nearly nowhere.
The hash alone sees only what is brighter than its neighbour: to it all flat pictures are one, and so are a red and a
blue circle. Measured on 400 scenes of the pocket world: at a distance of 4 it takes 5 pairs of different ones
for copies, with the colours none, and finds no fewer copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minisd.prepare.examine import HASH_DIGITS, Examined

# Of 256, in any channel of any of the nine cells of Examined.dhash: copies made smaller, stored as a JPEG of quality 30
# or cut by 2 % stay below it.
_COLOUR_TOLERANCE = 16


def near_duplicates(pictures: Sequence[Examined], distance: int, *, first: int = 0) -> dict[int, int]:
    """Find the pictures that look like a better one.

    The best comes first: of more pixels, then of more bytes, then the earlier. A picture is left out if it looks like
    one that is kept, not like one that is left out itself: so a row of pictures, each like the next, does not shrink to
    one. Takes time with the square of their number (a second for 10,000) and memory with their number.

    Args:
        pictures: in any order.
        distance: how many bits of the hashes may differ; -1: no two pictures look alike.
        first: the pictures before this index are kept in any case, and come before the others.

    Returns:
        Index of each picture to leave out -> index of the kept one that it is most like.
    """
    if distance < 0 or not pictures:
        return {}

    def rank(index: int) -> tuple[int, int, int]:
        picture = pictures[index]
        return -picture.width * picture.height, -picture.size_bytes, index

    order = [*range(first), *sorted(range(first, len(pictures)), key=rank)]
    hashes = np.array([int(picture.dhash[:HASH_DIGITS], 16) for picture in pictures], np.uint64)
    colours = np.array(
        [[*bytes.fromhex(picture.dhash[HASH_DIGITS + 1 :])] for picture in pictures], np.int16
    )  # [N, 27]
    kept = np.empty(len(pictures), np.intp)
    count = 0
    found: dict[int, int] = {}
    for index in order:
        others = kept[:count]
        distances = np.bitwise_count(hashes[others] ^ hashes[index])
        near = np.flatnonzero(distances <= distance)
        near = near[(abs(colours[others[near]] - colours[index]) <= _COLOUR_TOLERANCE).all(axis=1)]
        if index >= first and near.size:
            found[index] = int(others[near[distances[near].argmin()]])
        else:
            kept[count] = index
            count += 1
    return found
