"""50,000 damaged tables: each is read exactly, or refused by its line. 100,000 captions: each comes back as it was.

What a table says is decided here by a reader of its own, which has nothing in common with Python's csv.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from minisd.errors import DataError
from minisd.prepare.table import Picture, read_pictures, read_rejected, write_pictures, write_rejected
from tests.faults.harness import POWER

DOCUMENTED = {"dtype": str, "keep_default_na": False, "na_filter": False, "encoding": "utf-8"}
WORDS = ["NA", "null", "", "007", "1e5", "True", " a ", "=1+1", "'", 'say "hi"', "a, b", "a\nb", "a\r\nb", "a\rb",
         "\u732b\U0001f408", "\u2028", "\x85", "\ufeff", "cat", "castle"]  # fmt: skip

ODD = [b'"', b",", b"\n", b"\r", b"\r\n", b'""', b"\0", b";", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"=", b"\t"]


class _RefusedError(Exception):
    """A table that says nothing for certain; the argument is the line, 0 if there is none."""


# --- the other reader: RFC 4180, strictly ---
_BARE = re.compile(r"[^,\r\n]*")
_ENDING = re.compile(r"\r\n|\r|\n|\Z")


def _breaks(text: str) -> int:
    return len(re.findall(r"\r\n|\r|\n", text))


def _quoted(text: str, at: int, line: int) -> tuple[str, int]:
    """The field that is opened by the quote at `at`, and where it ends."""
    field = ""
    while True:
        end = text.find('"', at + 1)
        if end < 0:
            raise _RefusedError(line)
        field += text[at + 1 : end]
        at = end + 1
        if text[at : at + 1] != '"':
            break
        field += '"'
    if text[at : at + 1] not in ("", ",", "\r", "\n"):
        raise _RefusedError(line)
    return field, at


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row starts, and its fields: none on an empty line."""
    at, line = 0, 1
    while at < len(text):
        fields: list[str] = []
        while fields or text[at] not in "\r\n":
            if text[at : at + 1] == '"':
                field, at = _quoted(text, at, line)
            else:
                found = _BARE.match(text, at)
                assert found is not None
                field, at = found[0], found.end()
            fields.append(field)
            if text[at : at + 1] != ",":
                break
            at += 1
        yield line, fields
        line += sum(map(_breaks, fields)) + 1
        ending = _ENDING.match(text, at)
        assert ending is not None
        at = ending.end()


def _expected(raw: bytes) -> list[dict[str, str]]:
    """The cells of each row."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _RefusedError(1 + _breaks(raw[: error.start].decode("latin-1"))) from error
    if "\0" in text:
        raise _RefusedError(1 + _breaks(text[: text.index("\0")]))
    header: list[str] = []
    found: dict[int, dict[str, str]] = {}
    for line, fields in _rows(text):
        if fields and not header:
            header = fields
            if len(header) != len(set(header)) or "file_name" not in header or "text" not in header:
                raise _RefusedError(line)
        elif any(fields):
            if len(fields) != len(header):
                raise _RefusedError(line)
            found[line] = dict(zip(header, fields, strict=True))
    if not header:
        raise _RefusedError(0)
    names: set[str] = set()
    for line, cells in found.items():
        width = cells.get("width", "")
        if cells["file_name"] in names or not re.fullmatch("[0-9]{0,9}", width):
            raise _RefusedError(line)
        names.add(cells["file_name"])
    return list(found.values())


# --- the damage ---
def _table(generator: random.Random) -> bytes:
    """A table that is whole."""
    rows = [[f"{i}.png", generator.choice(WORDS), generator.choice(["", "64", "007"]), "Bo"] for i in range(3)]
    quoting = generator.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    file = io.StringIO()
    writer = csv.writer(file, quoting=quoting, lineterminator=generator.choice(["\n", "\r\n", "\r"]))
    writer.writerows([["file_name", "text", "width", "artist"], *rows])
    return generator.choice([b"", b"\xef\xbb\xbf"]) + file.getvalue().encode()


def _mutant(seed: int) -> bytes:
    """A table with one or two things done to it, at random places."""
    generator = random.Random(seed)
    data = _table(generator)
    for _ in range(generator.randint(1, 2)):
        at, to = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        near = min(to, at + 8)
        put = generator.choice([generator.choice(ODD), bytes([generator.randrange(256)]), b"a"])
        begin, end = data[:at], data[at:]
        data = generator.choice(
            [begin + put + end, begin + put + end[1:], begin + data[near:], data[:to] + data[at:near] + data[to:]]
        )
    return data[:at] if generator.random() < 0.05 else data


def _outcome(path: Path) -> list[Picture] | int | str:
    """The pictures, or the line of the refusal, or what else came of it."""
    try:
        return read_pictures(path.parent)
    except DataError as error:
        message = str(error)
        line = re.search(r", line (\d+): ", message)
        if line is None:
            return 0 if "got an empty file" in message else f"no line: {message}"
        return (
            int(line[1]) if message.isprintable() and len(message) < 500 + len(str(path)) else f"unclear: {message!r}"
        )
    except Exception as error:  # what a reader must not do
        return f"{type(error).__name__}: {error}"


def _as_pictures(rows: list[dict[str, str]]) -> list[Picture]:
    names = ("file_name", "text", "width", "height")
    return [
        Picture(
            file_name=cells["file_name"],
            text=cells["text"],
            width=int(cells.get("width") or 0),
            others=tuple((name, cell) for name, cell in cells.items() if name not in names),
        )
        for cells in rows
    ]


def _wanted(raw: bytes) -> list[Picture] | int:
    try:
        return _as_pictures(_expected(raw))
    except _RefusedError as refused:
        return int(refused.args[0])


def test_every_damaged_table_is_read_exactly_or_refused_by_its_line(disk: Path) -> None:
    path = disk / "metadata.csv"
    count = POWER["mutants"] // 4
    wrong, read = [], 0
    for seed in range(count):
        raw = _mutant(seed)
        path.write_bytes(raw)
        outcome, wanted = _outcome(path), _wanted(raw)
        read += isinstance(wanted, list)
        if outcome != wanted:
            wrong.append((seed, raw, outcome, wanted))
    assert wrong == []
    # Damage that never or always shows would prove little.
    assert 0.1 * count < read < 0.8 * count


def test_pandas_on_its_own_misreads_the_same_tables(disk: Path) -> None:
    path = disk / "metadata.csv"
    misread = 0
    for seed in range(500):
        raw = _mutant(seed)
        path.write_bytes(raw)
        wanted = _wanted(raw)
        try:
            frame = pd.read_csv(path)
            got = list(zip(frame["file_name"], frame["text"], strict=True))
        except Exception:
            continue
        pairs = [(row.file_name, row.text) for row in wanted] if isinstance(wanted, list) else None
        misread += got != pairs
    assert misread > 100


# --- captions, there and back ---
def _captions(count: int) -> Iterator[str]:
    """From the whole of Unicode, and from what tables are made of."""
    generator = random.Random(0)
    special = ["\r", "\n", '"', ",", "'", "=", "\t", " ", "\\", "\x1b", "\u2028", "\x85", "\ufeff", "\u202e", "a", ";"]
    ranges = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(count):
        letters = [
            generator.choice(special)
            if generator.random() < 0.5
            else chr(generator.randrange(*generator.choice(ranges)))
            for _ in range(generator.randrange(9))
        ]
        yield "".join(letters)


@pytest.mark.parametrize("place", ["metadata.csv", "rejected.csv"])
def test_every_caption_comes_back_as_it_was(disk: Path, place: str) -> None:
    captions = list(_captions(POWER["mutants"] // 2))
    pictures = [Picture(file_name=f"{i}.png", text=text) for i, text in enumerate(captions)]
    write, read = (write_pictures, read_pictures) if place == "metadata.csv" else (write_rejected, read_rejected)
    for start in range(0, len(pictures), 50_000):
        chunk = pictures[start : start + 50_000]
        write(disk, chunk)
        assert read(disk) == chunk
        if place == "metadata.csv":
            frame = pd.read_csv(disk / "train" / place, **DOCUMENTED)
            assert list(frame["text"]) == [picture.text for picture in chunk]
