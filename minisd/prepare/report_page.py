"""The report as an HTML page: what report.py writes into a file, and serve.py shows with captions to edit.

One page with its style and script inside; what it may do is in html_page.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from minisd import html_page
from minisd.errors import one_line
from minisd.prepare import report_data
from minisd.prepare.caption_lint import count_tokens
from minisd.prepare.summary import summary
from minisd.prepare.table import Picture

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class View:
    """How the page is shown.

    Args:
        title: its heading.
        resolution: the training resolution, which the frames are for.
        trigger: the word that captions should have, if any.
        thumbnail: the address of the small version of a kept picture, "" if it cannot be read.
        left_out: the same of one that was left out, "" if there is none.
        link: the address of a kept picture in full size.
        editable: with forms, for serve.py; the token of the session is the page's own address.
    """

    title: str
    resolution: int
    trigger: str | None
    thumbnail: Callable[[Picture], str]
    left_out: Callable[[Picture], str]
    link: Callable[[Picture], str]
    editable: bool = False


def render(pictures: Sequence[Picture], rejected: Sequence[Picture], view: View) -> str:
    """The page, for a dataset's rows and the rows of what was left out."""
    tokens = count_tokens([picture.text for picture in pictures])
    cards = [
        report_data.make_card(
            picture,
            count,
            resolution=view.resolution,
            trigger=view.trigger,
            thumbnail=view.thumbnail(picture),
            link=view.link(picture),
        )
        for picture, count in zip(pictures, tokens, strict=True)
    ]
    by_name = {card.file_name: card for card in cards}

    def thumbnail(row: Picture) -> str:
        same = by_name.get(row.duplicate_of) if row.status == "duplicate" else None
        return same.thumbnail if same is not None else view.left_out(row)

    left_out = [report_data.make_left_out(row, by_name, thumbnail=thumbnail(row)) for row in rejected]
    script, style = (_HERE.joinpath(f"report.{kind}").read_text(encoding="ascii") for kind in ("js", "css"))
    return (
        html_page.environment(_HERE)
        .get_template("report.html.jinja")
        .render(
            title=one_line(view.title)[:120],
            summary=summary(len(pictures), rejected, None),
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
            policy=html_page.policy(script, style, own_server=view.editable),
            script=script,
            style=style,
            cards=cards,
            left_out=left_out,
            reasons=report_data.by_status(left_out),
            pairs=[row for row in left_out if row.kept is not None and row.thumbnail],
            flags=report_data.flag_counts(cards),
            flag_texts=report_data.FLAGS,
            picture_flags=report_data.OF_PICTURES,
            mean_crop=report_data.mean_crop(cards),
            to_check=sum(report_data.of_caption(card.flags) for card in cards),
            charts=report_data.make_charts(cards, view.resolution),
            resolution=view.resolution,
            trigger=view.trigger,
            editable=view.editable,
        )
    )


def relative_address(path: str) -> str:
    """A path below the page as an address: nothing in it can be taken for a scheme or another host."""
    return "./" + quote(path.encode("utf-8", "surrogateescape"))
