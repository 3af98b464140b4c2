"""The report's file: what it shows, and that nothing in a dataset gets out of its place in the page (row O2)."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from minisd.buckets import bucket_geometry
from minisd.errors import DataError
from minisd.prepare.options import Report
from minisd.prepare.report import report
from minisd.prepare.report_data import make_card, source_of, training_frame
from minisd.prepare.table import Picture, write_pictures, write_rejected

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</textarea></style></script><script>alert(2)</script>",
    "{{ 7 * 7 }} {% raw %} ${alert(3)} `code` | a | b |",
    "\u202eevil\u202c \u2066rtl\u2069 \u05e9\u05dc\u05d5\u05dd",
    "javascript:alert(4) https://evil.example/a.png",
    "<base href=https://evil.example/><meta http-equiv=refresh content=0;url=https://evil.example>",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "long " * 2000,
]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text by tag."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def of(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]


def _dataset(folder: Path, captions: list[str], **columns: str) -> list[Picture]:
    (folder / "train").mkdir(parents=True)
    pictures = []
    for index, caption in enumerate(captions):
        name = f"{index:06d}.png"
        Image.new("RGB", (96 + 8 * index, 64), (20 * index % 256, 90, 160)).save(folder / "train" / name)
        pictures.append(Picture(file_name=name, text=caption, width=96 + 8 * index, height=64, **columns))
    write_pictures(folder, pictures)
    return pictures


def test_hostile_captions_names_and_addresses_stay_text(tmp_path: Path) -> None:
    pictures = _dataset(tmp_path, HOSTILE)
    for index, words in enumerate(HOSTILE):
        (tmp_path / "train" / pictures[index].file_name).rename(tmp_path / "train" / f"{index} \"'<b>&.png")
        few = words[:200]
        pictures[index] = replace(
            pictures[index], file_name=f"{index} \"'<b>&.png", source_url=few, query=few, caption_source=few
        )
    write_pictures(tmp_path, pictures)
    rows = [
        Picture(
            status=words[:80],
            reason=words,
            original=words[:200],
            source_url=words[:200],
            original_sha256=f"../../{words[:20]}",
            duplicate_of=pictures[0].file_name,
        )
        for words in HOSTILE
    ]
    write_rejected(tmp_path, rows)
    page = Page(report(Report(data=tmp_path, resolution=64, trigger='"><script>')))
    assert len(page.of("script")) == len(page.of("style")) == 1
    assert not {name for name, _ in page.tags} & {"base", "iframe", "object", "embed", "form"}
    for tag, attrs in page.tags:
        assert not {name for name in attrs if name.startswith("on")}, (tag, attrs)
        assert "style" not in attrs  # the policy forbids it
        for name in ("src", "href", "action", "formaction", "xlink:href", "srcset", "data"):
            assert attrs.get(name, "#").startswith(("data:image/jpeg;base64,", "data:,", "#", "./train/")), attrs
    shown = [attrs["data-name"] for attrs in page.of("article")]
    assert shown == [picture.file_name for picture in pictures]
    text = "".join(part for _, part in page.texts)
    for words in HOSTILE:
        assert words in text


def test_only_web_addresses_become_links_and_tell_nothing_of_where_they_were_followed(tmp_path: Path) -> None:
    _dataset(tmp_path, ["a"], source_url="https://pictures.example/a.png?b=1&c=2")
    links = Page(report(Report(data=tmp_path))).of("a", href="https://pictures.example/a.png?b=1&c=2")
    assert [link["rel"] for link in links] == ["noreferrer noopener"]
    strange = ["javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "ftp://a.example/b", "//a.example/b",
               "https:///a.png", "https://[", " https://a.example", "https://a.example/\u202eb", ""]  # fmt: skip
    for url in strange:
        assert source_of(url).link == "", url
    assert source_of("HTTP://A.example/x").link == "HTTP://A.example/x"


def test_the_policy_of_the_page_lets_its_own_script_and_style_run_and_nothing_else(tmp_path: Path) -> None:
    _dataset(tmp_path, ["a"])
    path = report(Report(data=tmp_path))
    text = path.read_text(encoding="utf-8")
    (policy,) = (attrs["content"] for attrs in Page(path).of("meta", **{"http-equiv": "Content-Security-Policy"}))
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        sha = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{sha}';" in policy
    assert "default-src 'none';" in policy
    assert "img-src data:;" in policy
    assert "unsafe" not in policy
    assert str(tmp_path) not in text  # no path of this machine in what may be sent to somebody


def test_cards_have_the_flags_of_caption_and_picture(tmp_path: Path) -> None:
    captions = ["style, a cat", "", "a cat " * 60, "style, an arafed dog"]
    pictures = _dataset(tmp_path, captions)
    # Half of the picture is cut away; too small for a bucket at all; and a file that is not there.
    Image.new("RGB", (1024, 100)).save(tmp_path / "train" / pictures[0].file_name)
    pictures[0] = replace(pictures[0], width=1024, height=100)
    (tmp_path / "train" / pictures[1].file_name).unlink()
    write_pictures(tmp_path, pictures)
    page = Page(report(Report(data=tmp_path, resolution=64, trigger="style")))
    flags = [json.loads(card["data-flags"]) for card in page.of("article")]
    assert flags[0] == ["much cropped"]
    assert flags[1] == ["empty", "trigger missing", "unusable"]
    assert flags[2] == ["repeated phrase", "too long", "trigger missing"]
    assert flags[3] == ["BLIP word"]
    assert len(page.of("img")) == 3
    assert make_card(
        Picture(file_name="a", text="x", width=7, height=7), 3, resolution=64, trigger=None, thumbnail="y", link=""
    ).flags == ("unusable",)


@pytest.mark.parametrize("size", [(600, 1000), (1000, 600), (512, 512), (300, 420), (520, 530), (2000, 512)])
def test_the_frame_is_the_part_of_the_picture_that_training_cuts_out(size: tuple[int, int]) -> None:
    geometry = bucket_geometry(size, 512, 64, upscale=False)
    frame = training_frame(size, 512)
    assert frame is not None
    assert frame.bucket == geometry.size
    assert 0 <= frame.left <= frame.left + frame.width <= size[1] + 1e-9
    assert 0 <= frame.top <= frame.top + frame.height <= size[0] + 1e-9
    assert 1 - frame.width * frame.height / (size[0] * size[1]) == pytest.approx(frame.cropped, abs=1e-9)
    # In the middle, to the pixel of the resized picture that centre crops round to.
    scale = max(size[0] / geometry.resized[0], size[1] / geometry.resized[1])
    assert abs(frame.left - (size[1] - frame.width) / 2) <= scale / 2 + 1e-9
    assert abs(frame.top - (size[0] - frame.height) / 2) <= scale / 2 + 1e-9
    assert frame.small == (size == (300, 420))


def test_near_duplicates_stand_beside_the_one_that_was_kept(tmp_path: Path) -> None:
    pictures = _dataset(tmp_path, ["a", "b"])
    (tmp_path / "left_out").mkdir()
    sha = "ab" * 32
    Image.new("RGB", (50, 40)).save(tmp_path / "left_out" / f"{sha[:16]}.jpg")
    near = Picture(status="near-duplicate", reason="like the other", original="copy.jpg", original_sha256=sha)
    rows = [
        replace(near, duplicate_of=pictures[1].file_name),
        replace(near, duplicate_of="no such.png"),
        replace(near, duplicate_of=pictures[0].file_name, original_sha256="cd" * 32),
    ]
    write_rejected(tmp_path, rows)
    page = Page(report(Report(data=tmp_path)))
    assert len(page.of("figure", **{"class": "pair"})) == 1
    alt = [attrs["alt"] for attrs in page.of("img") if attrs["alt"]]
    assert alt == ["a", "b", pictures[1].file_name, "copy.jpg"]
    assert len(page.of("details")) == 1


def test_a_strangers_table_is_shown_with_the_sizes_that_it_does_not_say(tmp_path: Path) -> None:
    Image.new("RGB", (640, 512)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    secret = tmp_path.parent / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    rows = ["a.png,a cat", "broken.png,x", "../secret.png,y", "gone.png,z"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")
    page = Page(report(Report(data=tmp_path)))
    assert [card["data-pixels"] for card in page.of("article")] == [str(640 * 512), "0", "0", "0"]
    assert [len(page.of("img")), len(page.of("svg", **{"class": "frame"}))] == [1, 1]
    with pytest.raises(DataError, match=r"expected train/metadata\.csv or metadata\.csv"):
        report(Report(data=tmp_path / "nothing"))
