"""Reports of headings, text, tables and pictures, rendered as HTML, Markdown and LaTeX."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from markupsafe import escape

from dit_in_dit.reporting.templates import code_block, escape_markdown, render

Tone = Literal["", "better", "worse", "soft"]


class Cell(NamedTuple):
    """A highlighted cell of a table."""

    text: str
    tone: Tone


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Bullets(NamedTuple):
    """A list."""

    items: Sequence[str]


class Table(NamedTuple):
    """A table with a head, and a note below it. With `words`, columns are aligned left and wrap."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    note: str = ""
    words: bool = False


class Picture(NamedTuple):
    """A PNG in the report's folder."""

    path: Path
    caption: str

    @property
    def name(self) -> str:
        """The file's name as words."""
        return self.path.stem.replace("-", " ")

    @property
    def data_uri(self) -> str:
        """The PNG as a data URI, for a page that loads no files."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


class Drawing(NamedTuple):
    """An SVG with a title, shown in HTML only: Markdown cannot embed it."""

    title: str
    svg: str

    @property
    def data_uri(self) -> str:
        """The SVG as a data URI. As an image it runs no script, and its ids do not meet those of the page."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


class Verbatim(NamedTuple):
    """Text to copy, in a block of code."""

    title: str
    text: str


DocumentPart = Text | Bullets | Table | Picture | Drawing | Verbatim


class Chapter(NamedTuple):
    """A heading and the parts below it; `folded`: hidden until the heading is clicked."""

    title: str
    blocks: Sequence[DocumentPart]
    folded: bool = False

    @property
    def anchor(self) -> str:
        """The chapter's id within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def cell_text(cell: str | Cell) -> str:
    """The text of a cell."""
    return cell.text if isinstance(cell, Cell) else cell


# --------------------------------------------------------------------------------------------- HTML


def to_html(title: str, lead: str, chapters: Sequence[Chapter]) -> str:
    """One HTML page with embedded pictures: it loads no files."""
    return render("reporting", "report.html.j2", title=title, lead=lead, chapters=chapters)


# ----------------------------------------------------------------------------------------- Markdown


def to_markdown(title: str, lead: str, chapters: Sequence[Chapter], folder: Path) -> str:
    """The report as Markdown, with pictures by their paths below `folder`."""
    parts = [f"# {escape_markdown(title)}", escape_markdown(lead)]
    for chapter in chapters:
        blocks = list(filter(None, (_markdown(block, folder) for block in chapter.blocks)))
        if chapter.folded and blocks:  # HTML within Markdown: a blank line begins Markdown again
            parts += [f"<details>\n<summary>{escape(chapter.title)}</summary>", *blocks, "</details>"]
        elif blocks:
            parts += [f"## {escape_markdown(chapter.title)}", *blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: DocumentPart, folder: Path) -> str:
    if isinstance(block, Drawing):
        return ""
    if isinstance(block, Text):
        return escape_markdown(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {escape_markdown(item)}" for item in block.items)
    if isinstance(block, Verbatim):
        return f"### {escape_markdown(block.title)}\n\n{code_block(block.text)}"
    if isinstance(block, Picture):
        path = quote(block.path.relative_to(folder).as_posix())
        return f"![{escape_markdown(block.name)}]({path})\n\n{escape_markdown(block.caption)}"
    title = f"### {escape_markdown(block.title)}\n\n" if block.title else ""
    note = f"\n\n{escape_markdown(block.note)}" if block.note else ""
    return title + markdown_table(block.heads, block.rows) + note


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """A table in Markdown; better and worse cells are bold."""

    def line(cells: Sequence[str | Cell]) -> str:
        return "| " + " | ".join(map(shown, cells)) + " |"

    def shown(cell: str | Cell) -> str:
        text = escape_markdown(cell_text(cell))
        return f"**{text}**" if isinstance(cell, Cell) and cell.tone in ("better", "worse") else text

    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


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
    """Text in one line with LaTeX's special characters escaped."""
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str | Cell]], caption: str) -> str:
    """A table for the package booktabs; if it has more than WIDE columns, graphicx shrinks it to the line width."""

    def line(cells: Sequence[str | Cell]) -> str:
        minus = (re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", cell_text(cell)) for cell in cells)
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
