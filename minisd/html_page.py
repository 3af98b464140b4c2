"""What the pages that minisd writes have in common: how they are filled in, what they may do, pictures inside them.

A page is one file that fetches nothing. Everything from outside is escaped by its template, and should something get
through all the same, the page's own policy (Content-Security-Policy) lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Literal

import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """The templates in a folder: they escape what is put into them, and a name that is not given is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def policy(script: str, style: str, *, own_server: bool = False) -> str:
    """A page's Content-Security-Policy: this script and this style, known by their hashes, and pictures in the page.

    Args:
        script: the text of its only script element.
        style: the text of its only style element.
        own_server: the page is served, and may fetch pictures from its server and ask it for changes.
    """
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (script, style)
    )
    own = "'self' " if own_server else ""
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        f"img-src {own}data:; {'connect-src ' + own.strip() + '; ' if own_server else ''}base-uri 'none'; "
        "form-action 'none'"
    )


def data_uri(picture: bytes, kind: Literal["jpeg", "png"]) -> str:
    """The bytes of a picture file as an address that holds them."""
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")
