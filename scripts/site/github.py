"""Markdown as GitHub reads it, turned into Markdown as Python-Markdown reads it.

GitHub (CommonMark) nests what is indented as far as an item's text, and lets a list or table follow a line of text.
Python-Markdown nests what is indented by four spaces, and wants an empty line before a list or table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

LINK = re.compile(r"(\]\()([^)#\s]+)")
ITEM = re.compile(r"( *)([-*+]|\d{1,9}[.)])( +)(?=\S)")
NAMED = re.compile(r"`?\bdocs/([\w/-]+\.md)`?")  # a page of docs named in running text


def targets(markdown: str) -> Iterator[str]:
    """Targets of the links to files, without their anchors."""
    for part, code in _parts(markdown):
        if not code:
            yield from (found[2] for found in LINK.finditer(part) if "://" not in found[2])


def move_links(markdown: str, place: Callable[[str], str]) -> str:
    """The text with `place(target)` in place of the target of every link to a file."""

    def moved(found: re.Match[str]) -> str:
        return found[0] if "://" in found[2] or found[2].startswith("mailto:") else found[1] + place(found[2])

    return "".join(part if code else LINK.sub(moved, part) for part, code in _parts(markdown))


def link_pages(markdown: str, pages: set[str], source: str) -> str:
    """The text of the page `source` with links where running text names a page, such as `docs/data.md`."""
    up = PurePosixPath(*[".."] * (source.count("/") + 1))  # links are relative to docs still
    root = up.parent if source.count("/") else PurePosixPath(".")

    def linked(found: re.Match[str]) -> str:
        return f"[{found[1].removesuffix('.md')}]({root / found[1]})" if found[1] in pages else found[0]

    def prose(line: str) -> str:
        return line if line.startswith("    ") or "](" in line else NAMED.sub(linked, line)

    return "".join(
        part if code else "\n".join(prose(line) for line in part.split("\n")) for part, code in _parts(markdown)
    )


def to_python_markdown(markdown: str) -> str:
    """The text with nested items indented by four spaces, and an empty line before and after lists and tables."""
    lines: list[str] = []
    margins: list[int] = []  # of each open item, the column where its text begins
    fence, before = "", ""  # the fence that is open; the line before, without its indentation
    for line in markdown.split("\n"):
        text = line.lstrip(" ")
        column = len(line) - len(text)
        if not text:
            lines.append("")
            before = ""
            continue
        item = None if fence else ITEM.match(line)
        depth = len([margin for margin in margins if margin <= column])
        lazy = bool(before) and not item and not fence and not text.startswith(("|", "#", "```", "<!--"))
        if not lazy:
            del margins[depth:]
        extra = column - margins[-1] if margins and depth else column
        if lazy and margins:
            extra = 0
        start = item and not before.startswith(("- ", "* ")) and not margins
        table = text.startswith("|") != before.startswith("|") and not item
        if before and not fence and not ITEM.match(before) and (start or table):
            lines.append("")
        lines.append(" " * (4 * len(margins) + max(extra, 0)) + text)
        if text.startswith("```"):
            fence = "" if fence else "```"
        if item:
            margins.append(len(item[0]))
        before = text
    return "\n".join(lines)


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """Text between fenced blocks, and the blocks: (part, whether it is a block)."""
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return [(part, bool(number % 2)) for number, part in enumerate(parts)]
