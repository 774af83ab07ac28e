"""A report as headings, text, tables and pictures, and the same as HTML and as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Literal

Tone = Literal["", "better", "worse", "soft"]


@dataclass(frozen=True)
class Cell:
    """A table's cell that stands out."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table with a head; `note` stands below it. Of `words`, columns start at the left and wrap."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    note: str = ""
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Verbatim:
    """Text to copy."""

    title: str
    text: str


Block = Text | Bullets | Table | Picture | Verbatim


@dataclass(frozen=True)
class Chapter:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def plain(cell: str | Cell) -> str:
    """A cell's text."""
    return cell.text if isinstance(cell, Cell) else cell


# --------------------------------------------------------------------------------------------- HTML


def to_html(title: str, lead: str, chapters: Sequence[Chapter]) -> str:
    """A page that needs nothing else: pictures are in it."""
    page = (files("dit_in_dit.study") / "page.html").read_text()
    contents = "".join(f'<li><a href="#{_anchor(c.title)}">{escape(c.title)}</a></li>' for c in chapters)
    body = "\n".join(
        f'<section id="{_anchor(c.title)}">\n<h2>{escape(c.title)}</h2>\n'
        + "\n".join(_html(block) for block in c.blocks)
        + "\n</section>"
        for c in chapters
    )
    parts = {"TITLE": escape(title), "LEAD": escape(lead), "CONTENTS": contents, "BODY": body}
    return re.sub(r"<!--([A-Z]+)-->", lambda found: parts[found[1]], page)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Verbatim):
        return f"<h3>{escape(block.title)}</h3>\n<pre>{escape(block.text)}</pre>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        name = escape(block.path.stem.replace("-", " "))
        image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{escape(block.caption)}</figcaption></figure>"
    heads = "".join(f"<th>{escape(head)}</th>" for head in block.heads)
    rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in block.rows)
    title = f"<h3>{escape(block.title)}</h3>\n" if block.title else ""
    note = f'\n<p class="note">{escape(block.note)}</p>' if block.note else ""
    kind = ' class="words"' if block.words else ""
    table = f"<table{kind}><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'{title}<div class="wide">{table}</div>{note}'


def _html_cell(cell: str | Cell) -> str:
    tone = f' class="{cell.tone}"' if isinstance(cell, Cell) and cell.tone else ""
    return f"<td{tone}>{escape(plain(cell))}</td>"


# ----------------------------------------------------------------------------------------- Markdown


def to_markdown(title: str, lead: str, chapters: Sequence[Chapter], folder: Path) -> str:
    """The same as Markdown, with pictures by their paths below `folder`."""
    parts = [f"# {_quoted(title)}", _quoted(lead)]
    for chapter in chapters:
        parts.append(f"## {_quoted(chapter.title)}")
        parts += [_markdown(block, folder) for block in chapter.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Text):
        return _quoted(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_quoted(item)}" for item in block.items)
    if isinstance(block, Verbatim):
        fence = "```" + "`" * max((len(run) for run in re.findall(r"`{3,}", block.text)), default=0)
        return f"### {_quoted(block.title)}\n\n{fence}\n{block.text.rstrip()}\n{fence}"
    if isinstance(block, Picture):
        path = block.path.relative_to(folder).as_posix()
        return f"![{_quoted(block.path.stem.replace('-', ' '))}]({path})\n\n{_quoted(block.caption)}"
    title = f"### {_quoted(block.title)}\n\n" if block.title else ""
    note = f"\n\n{_quoted(block.note)}" if block.note else ""
    return title + markdown_table(block.heads, block.rows) + note


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """A table in Markdown; what stands out is bold."""

    def line(cells: Sequence[str | Cell]) -> str:
        return "| " + " | ".join(map(shown, cells)) + " |"

    def shown(cell: str | Cell) -> str:
        text = _quoted(plain(cell))
        return f"**{text}**" if isinstance(cell, Cell) and cell.tone in ("better", "worse") else text

    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


def _quoted(text: str) -> str:
    """Text in one line whose characters mean nothing to Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))


# -------------------------------------------------------------------------------------------- LaTeX

WIDE = 8  # columns that fit on a page
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\N{MINUS SIGN}": r"$-$",
    "†": r"$^\dagger$",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}


def latex(text: str) -> str:
    """Text in one line whose characters mean nothing to LaTeX."""
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str | Cell]], caption: str) -> str:
    """A table for the package booktabs; one of many columns needs graphicx to be shrunk to the line."""

    def line(cells: Sequence[str | Cell]) -> str:
        minus = (re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", plain(cell)) for cell in cells)
        return " & ".join(map(latex, minus)) + r" \\"

    table = [
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        line(heads),
        r"\midrule",
        *map(line, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if len(heads) > WIDE:
        table = [r"\resizebox{\linewidth}{!}{%", *table[:-1], table[-1] + "}"]
    start = [r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}"]
    return "\n".join([*start, *table, r"\end{table}", ""])
