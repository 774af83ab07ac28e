"""Pages and cards: no name of a class, an arm or a file becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from dit_in_dit.attention_maps.page import page
from dit_in_dit.config import presets
from dit_in_dit.config.run import RunConfig
from dit_in_dit.interop.card import card
from dit_in_dit.interop.release import sampling_instructions
from dit_in_dit.reporting.document import (
    Bullets,
    Cell,
    Chapter,
    Drawing,
    Picture,
    Table,
    Text,
    Verbatim,
    to_html,
    to_markdown,
)
from dit_in_dit.reporting.images import image_grid
from dit_in_dit.reporting.templates import code, code_block
from test_maps import maps_of

EVIL = "<script>alert(1)</script>"
NAMES = [EVIL, "</script><img src=x onerror=alert(1)>", "<b>a</b> & \"b\" 'c'", "[a](javascript:alert(1)) *b* | `c`"]


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; the text of scripts and styles is separate."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.cdata_elem else self.text).append(data)


def markdown_tokens(text: str) -> list[Any]:
    """All tokens of a Markdown text with tables, with HTML enabled."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


def chapters(name: str, folder: Path) -> list[Chapter]:
    """A chapter with every kind of block and with the name in every place."""
    path = folder / f"{name.replace('/', '')}.png"
    image_grid(np.zeros((1, 8, 8, 3), np.uint8)).save(path)
    rows = [[name, Cell(name, "better")], ["plain", Cell(name, "")]]
    tables = [Table([name, "value"], rows, name, name), Table([name], [[name]], words=True)]
    drawing = Drawing(name, "<svg xmlns='http://www.w3.org/2000/svg'/>")
    parts = [Text(name), Bullets([name]), *tables, Picture(path, name), drawing, Verbatim(name, name)]
    return [Chapter(name, parts), Chapter(f"folded {name}", parts, folded=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_report_shows_names_as_text(name, tmp_path):
    found, harmless = (Parsed(to_html(text, text, chapters(text, tmp_path))) for text in (name, "harmless"))
    assert found.tags == harmless.tags
    assert found.attributes == harmless.attributes
    assert found.text.count(name) == harmless.text.count("harmless") >= 10


@pytest.mark.parametrize("name", NAMES)
def test_the_markdown_of_a_report_shows_names_as_text(name, tmp_path):
    found, harmless = (
        markdown_tokens(to_markdown(text, text, chapters(text, tmp_path), tmp_path)) for text in (name, "harmless")
    )
    assert [token.type for token in found] == [token.type for token in harmless]
    tags = [re.findall(r"</?\w+", "".join(t.content for t in each if "html" in t.type)) for each in (found, harmless)]
    assert tags[0] == tags[1] == ["<details", "<summary", "</summary", "</details"]


@pytest.mark.parametrize("name", NAMES)
def test_maps_show_names_as_text(name):
    found = Parsed(page(maps_of("inner outer"), (name, name), name, 1))
    harmless = Parsed(page(maps_of("inner outer"), ("a", "b"), "c", 1))
    assert found.tags == harmless.tags
    assert found.attributes == harmless.attributes
    assert len(found.scripts) == len(harmless.scripts)
    assert not any(name in script for script in found.scripts if "<" in name)


def card_of(name: str, *, use: bool) -> str:
    """A card with the name in every place that a user's text reaches."""
    start = presets.get("emoji")
    config: RunConfig = replace(start, data=replace(start.data, source=name))
    evaluation = {
        "subject": {"checkpoint": ""},
        "protocol": {"images": 8, "samples": {name: name}, "reference": {"data": name, "part": [name]}},
        "scores": {name: {"value": 1.0, "low": 0.5, "high": 2.0, "floor": None}},
        "warnings": [name],
    }
    classes = [name] * 9
    return card(
        name,
        config,
        1,
        classes,
        2,
        evaluation,
        picture="samples.png",
        use=sampling_instructions(name, config) if use else None,
    )


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_names_as_text(name, use):
    found, harmless = (markdown_tokens(card_of(text, use=use)) for text in (name, "harmless"))
    assert [token.type for token in found] == [token.type for token in harmless]
    html = [[token.content for token in tokens if token.type.startswith("html")] for tokens in (found, harmless)]
    assert html[0] == html[1]  # the folds of the card, and nothing of the name
    assert "".join(html[0]).count("<details>") == "".join(html[0]).count("</details>") == 6


@pytest.mark.parametrize("text", ["plain", "a ` b", "``", "a\n```\nb", "~~~"])
def test_code_blocks_may_hold_any_text(text):
    (block,) = markdown_tokens(code_block(text))
    assert (block.type, block.content) == ("fence", text + "\n")
    _, _, inline, _ = markdown_tokens(code(text))
    assert inline.type == "code_inline"
    assert inline.content == " ".join(text.split())
