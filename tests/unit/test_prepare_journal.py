"""The journal of collect: minisd/prepare/journal.py."""

import errno
import os
import threading

import pytest

from minisd.errors import DataError, DiskError
from minisd.prepare.journal import KEPT, NAME, Found, Journal, read_journal


def found(number, **others):
    return Found(url=f"https://a.example/{number}", query="q", fetched_at="2026-01-01T00:00:00+00:00", **others)


KEPT_ONE = found(
    1,
    status=KEPT,
    file_name="0123456789abcdef.jpg",
    sha256="0123456789abcdef" * 4,
    width=640,
    height=480,
    dhash="0" * 16 + "-" + "f" * 54,
    size_bytes=9,
)
ODD = found(2, status="refused", reason="\u202e\x1b[2J\ud800 \u2028 \n emoji \U0001f600")


def test_what_is_appended_is_read_back_and_of_an_address_the_last_line(tmp_path):
    assert read_journal(tmp_path) == []
    with Journal(tmp_path) as journal:
        for entry in (KEPT_ONE, found(3, status="unreachable"), ODD):
            journal.append(entry)
    with Journal(tmp_path) as journal:
        journal.append(found(3, status=KEPT))
    assert read_journal(tmp_path) == [KEPT_ONE, ODD, found(3, status=KEPT)]


def test_a_file_of_control_characters_shows_none_on_a_terminal(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(ODD)
    text = (tmp_path / NAME).read_bytes()
    assert text.isascii()
    assert text.decode().rstrip("\n").isprintable()


def test_half_a_line_at_the_end_is_no_line_wherever_it_was_cut(tmp_path):
    path = tmp_path / NAME
    with Journal(tmp_path) as journal:
        journal.append(KEPT_ONE)
        whole = path.read_bytes()
        journal.append(ODD)
    data = path.read_bytes()
    for length in range(len(whole), len(data)):
        path.write_bytes(data[:length])
        assert read_journal(tmp_path) == [KEPT_ONE]
        with Journal(tmp_path) as journal:
            journal.append(ODD)
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[]",
        b"[" * 10_000,
        b'{"url": "https://a.example/"}',
        KEPT_ONE.file_name.join(["{", "}"]).encode(),
    ],
)
def test_another_damaged_line_is_named_with_its_number(tmp_path, line):
    with Journal(tmp_path) as journal:
        journal.append(KEPT_ONE)
        journal.append(ODD)
    first, second = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / NAME).write_bytes(first + line + b"\n" + second)
    with pytest.raises(DataError, match="line 2: not a line that collect writes"):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"width": 640', b'"width": "640"'),
        (b'"width": 640', b'"width": true'),
        (b'"width": 640, ', b""),
        (b'"width"', b'"breadth"'),
        (b"0123456789abcdef.jpg", b"../../elsewhere.jpg"),
        (b'"dhash": "00', b'"dhash": "xx'),
    ],
)
def test_a_line_with_other_fields_or_a_name_that_leads_elsewhere_is_damaged(tmp_path, old, new):
    with Journal(tmp_path) as journal:
        journal.append(KEPT_ONE)
    data = (tmp_path / NAME).read_bytes()
    assert old in data
    (tmp_path / NAME).write_bytes(data.replace(old, new))
    with pytest.raises(DataError, match="line 1"):
        read_journal(tmp_path)


def test_lines_of_several_threads_stay_whole(tmp_path):
    def append(thread):
        for number in range(20):
            journal.append(found(f"{thread}-{number}", status="damaged", reason="x" * 3000))

    with Journal(tmp_path) as journal:
        threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_journal(tmp_path)) == 80


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path) as journal:
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(DiskError, match="No space left"):
            journal.append(KEPT_ONE)
