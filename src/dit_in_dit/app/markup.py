"""Pieces of HTML that screens show. Every text is escaped; pictures are embedded, so that no file is left behind."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from dit_in_dit.reporting.images import Pixels, image_png, to_image

SHOWN = 128  # smallest side, in CSS pixels, at which an image is shown


def data_uri(image: Image.Image | bytes) -> str:
    """A picture, or the bytes of a PNG, as the value of a `src`."""
    content = image if isinstance(image, bytes) else image_png(image)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(image: Image.Image | bytes, alt: str) -> str:
    """A picture as wide as the page allows."""
    return f'<img class="wide" src="{data_uri(image)}" alt="{escape(alt)}">'


def picture_row(title: str, pixels: Pixels, labels: Sequence[str] = (), note: str = "") -> str:
    """Images (N, H, W, C) under a title, each above its label; small ones are enlarged, pixel by pixel."""
    side = max(SHOWN, pixels.shape[2])
    figures = "".join(
        f'<figure><img src="{data_uri(to_image(each))}" width="{side}" alt="{escape(f"{title}, image {n}")}">'
        f"<figcaption>{escape(labels[n] if n < len(labels) else '')}</figcaption></figure>"
        for n, each in enumerate(pixels)
    )
    about = f" <small>{escape(note)}</small>" if note else ""
    return f'<section class="row"><h4>{escape(title)}{about}</h4><div class="strip">{figures}</div></section>'


def html_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts and numbers."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads) if any(heads) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def progress(text: str, done: float) -> str:
    """A progress bar under a text; `done` is from 0 to 1."""
    return f'<div role="status">{escape(text)}<progress value="{done:.3f}"></progress></div>'


def refusal(message: str) -> str:
    """A message about a value that does not fit."""
    return f'<div role="alert" class="refusal">{escape(message)}</div>'


def note(message: str) -> str:
    """A remark, as a paragraph."""
    return f'<p class="note">{escape(message)}</p>'


def page_frame(html: str, title: str) -> str:
    """A whole page inside this one. Its script runs without access to this page."""
    return (
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" srcdoc="{escape(html, quote=True)}" '
        'style="width:100%;height:85vh;border:0"></iframe>'
    )


CSS = """
.row h4 { margin: 0.6em 0 0.2em } .row small { font-weight: normal; opacity: 0.7 }
.strip { display: flex; flex-wrap: wrap; gap: 6px } .strip figure { margin: 0 }
.strip img { image-rendering: pixelated; display: block; border-radius: 3px }
.strip figcaption { font-size: 12px; opacity: 0.75; min-height: 1.2em; max-width: 128px; overflow-wrap: anywhere }
.refusal { border-left: 4px solid #d33; padding: 0.4em 0.8em; background: rgba(221, 51, 51, 0.12) }
@media (min-width: 1300px) { .strip img { width: 192px } .strip figcaption { max-width: 192px } }
.pair { display: flex; flex-wrap: wrap; gap: 0 24px }
.note { opacity: 0.8 } .scroll { overflow-x: auto } .wide { max-width: 100%; background: white; border-radius: 3px }
progress { display: block; width: 100%; margin-top: 4px }
.scroll table { border-collapse: collapse }
.scroll :is(table, thead, tbody, tr) { border: 0 !important }
.scroll td, .scroll th { padding: 3px 12px 3px 0 !important; text-align: left; vertical-align: top;
  border: solid rgba(128, 128, 128, 0.3) !important; border-width: 0 0 1px !important; min-width: 4em }
.scroll td:nth-child(2) { overflow-wrap: anywhere }
#design-figure { overflow-x: auto } #design-figure svg { max-width: 100%; min-width: 600px; height: auto }
footer { display: none !important }
"""
