"""Drawing of a model's figure: two lanes of boxes, arrows between them, and bars of cost, as SVG text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

Theme = Literal["auto", "light", "dark"]
Lane = Literal["image", "outer", "inner"]  # boxes of the image are in the outer lane

WIDTH, BOX, LEFT, GAP = 900, 360, 30, 110  # of the figure, of a box, left of the outer lane, between the lanes
LINE, SPACE, ROW = 18, 30, 22  # heights: a line of text, the space below a box, a row of costs
LETTER = 7.0  # width of a letter of 13 pixels; the usual system fonts are narrower
LANES = {"outer": LEFT, "inner": LEFT + BOX + GAP}
LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "faint": "#6b7280"}
LIGHT |= {"outer": "#0072B2", "inner": "#C2500A", "join": "#00745A"}
DARK = {"paper": "#0f1419", "ink": "#e6e8eb", "faint": "#9aa4b2"}
DARK |= {"outer": "#56B4E9", "inner": "#F0935A", "join": "#3CC9A0"}
EVERY = {(row, column) for row in range(8) for column in range(8)}
QUERY = (2, 5)  # the inner token whose view a pictogram shows
SEEN = {  # inner tokens that it sees, in an image of 2x2 patches of 4x4 sub-patches
    "patch": {(row, column) for row, column in EVERY if row < 4 <= column},
    "window": EVERY,
    "image": EVERY,
    "compact": {(row, column) for row, column in EVERY if row % 4 == 1 and column % 4 == 1},
    "conv": {(row, column) for row, column in EVERY if abs(row - QUERY[0]) < 2 and abs(column - QUERY[1]) < 2},
}


@dataclass(frozen=True)
class Box:
    """A stage: its lane, title, lines below it, and the mixer that its pictogram shows, `outer` or nothing."""

    lane: Lane
    title: str
    lines: tuple[str, ...] = ()
    sees: str = ""


@dataclass(frozen=True)
class Join:
    """An arrow to a lane from the other one, with its words."""

    to: Literal["outer", "inner"]
    text: str


@dataclass(frozen=True)
class Repeat:
    """The stages from here on run this many times; 0 ends them."""

    times: int


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of a part."""

    part: str
    parameters: int
    macs: int


Row = tuple[Box, ...] | Join | Repeat  # boxes side by side, one in a lane


class Sheet:
    """The elements drawn so far, where the next row begins, and what each lane reaches."""

    def __init__(self) -> None:
        self.y, self.elements = 76, list[str]()
        self.reach: dict[str, list[int]] = {"outer": [], "inner": []}
        self.opened, self.image = 0, 0
        self.ending = False
        self.last: tuple[str, ...] = ()  # lanes of the last boxes

    def add(self, row: Row) -> None:
        """Draw a row."""
        if isinstance(row, Join):
            self._join(row)
        elif isinstance(row, Repeat):
            self._repeat(row)
        else:
            self._boxes(row)

    def _join(self, join: Join) -> None:
        outer, inner = (LANES[lane] + BOX // 2 for lane in ("outer", "inner"))
        start, end = (outer, inner) if join.to == "inner" else (inner, outer)
        before, at = (end - 5 if join.to == "inner" else end + 5), self.y - 4
        self.reach["outer" if join.to == "inner" else "inner"].append(at)
        self.elements += [
            f'<path class="line join" d="M {start} {at} H {before}" marker-end="url(#tip)" />',
            f'<circle class="tip" cx="{end}" cy="{at}" r="4" />',
            _text((outer + inner) / 2, at - 6, join.text, "join middle"),
        ]
        self.y += SPACE - 6

    def _repeat(self, repeat: Repeat) -> None:
        right = WIDTH - 14
        if repeat.times:
            self.opened = self.y - 12
            self.elements.append(_text(right - 8, self.y - 14, f"{repeat.times} times", "strong end"))
        else:
            low = self.y - SPACE + 12
            self.elements.append(f'<path class="bracket" d="M {right - 8} {self.opened} h 8 V {low} h -8" />')

    def _boxes(self, row: tuple[Box, ...]) -> None:
        wrapped = [wrap_lines(box) for box in row]
        high = 34 + LINE * max(map(len, wrapped))
        for box, lines in zip(row, wrapped, strict=True):
            lane = "inner" if box.lane == "inner" else "outer"
            x = LANES[lane]
            if box.lane != "image" or not self.image or "outer" in self.last:
                self.reach[lane] += [self.y, self.y + high]
            place = f'x="{x}" y="{self.y}" width="{BOX}" height="{high}" rx="8"'
            self.elements += [f'<rect class="paper" {place} />', f'<rect class="box {box.lane}" {place} />']
            self.elements.append(_text(x + 14, self.y + 22, box.title, f"strong {box.lane}"))
            for number, line in enumerate(lines):
                self.elements.append(_text(x + 14, self.y + 41 + LINE * number, line, ""))
            if box.sees:
                self.elements += draw_pictogram(box.sees, x + BOX - 54, self.y + 8)
        self.ending, self.last = "inner" in self.last and row[0].lane == "image", tuple(box.lane for box in row)
        self.image = self.image or self.y + high // 2
        self.y += high + SPACE

    def lanes(self) -> Iterator[str]:
        """The lines behind the boxes: from the image to the inner lane, down each lane, and to the prediction."""
        x, bottom = LANES["inner"] + BOX // 2, self.y - SPACE - 18
        for lane, reach in self.reach.items():
            if reach:
                middle = LANES[lane] + BOX // 2
                yield f'<path class="line {lane}" d="M {middle} {min(reach)} V {max(reach)}" />'
        if inner := self.reach["inner"]:
            yield f'<path class="line image" d="M {LEFT + BOX} {self.image} H {x} V {min(inner)}" />'
            if self.ending:  # the inner head has a part in the prediction
                yield f'<path class="line inner" d="M {x} {max(inner)} V {bottom} H {LEFT + BOX}" />'


def figure_svg(rows: Sequence[Row], costs: Sequence[Cost], *, title: str, under: str, theme: Theme) -> str:
    """The figure of these rows, with a line for each part's cost below.

    Args:
        under: the line below the title.
        theme: auto takes the colours that the viewer prefers.
    """
    sheet = Sheet()
    for row in rows:
        sheet.add(row)
    height = sheet.y + ROW * len(costs) + 16
    total = max(1, sum(cost.macs for cost in costs))
    bars = [line for number, cost in enumerate(costs) for line in _cost(cost, total, sheet.y + ROW * number)]
    head = [_text(LEFT, 32, title, "title"), _text(LEFT, 54, under, "")]
    style = _style(DARK if theme == "dark" else LIGHT)
    if theme == "auto":
        style += f"@media (prefers-color-scheme: dark) {{ {_style(DARK)} }}"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    place = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={quoteattr(title)}>',
        f"<style>{style}</style>",
        f'<defs><marker id="tip" {place}><path class="tip" d="M 0 0 L 8 4 L 0 8 z" /></marker></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{height}" />',
        *(*head, *sheet.lanes(), *sheet.elements, *bars, "</svg>"),
    ]
    return "\n".join(parts) + "\n"


def wrap_lines(box: Box) -> list[str]:
    """The lines of a box, broken where they would leave the box or meet its pictogram."""
    letters = int((BOX - 28 - (48 if box.sees else 0)) / LETTER)
    return [part for line in box.lines for part in textwrap.wrap(line, letters, break_on_hyphens=False)]


def draw_pictogram(sees: str, x: int, y: int) -> Iterator[str]:
    """A grid of tokens: one in full colour, and those that it sees. Outer: 4x4 patches; inner: 2x2 patches of 4x4
    sub-patches. A mixer that the package does not know has no other tokens in colour."""
    kind, side, query = ("outer", 4, (1, 1)) if sees == "outer" else ("inner", 8, QUERY)
    seen = EVERY if sees == "outer" else SEEN.get(sees, {query})
    step = 40 / side
    for row in range(side):
        for column in range(side):
            shade = 0.95 if (row, column) == query else 0.4 if (row, column) in seen else 0.08
            place = f'x="{x + column * step:.1f}" y="{y + row * step:.1f}"'
            size = f'width="{step - 0.8:.1f}" height="{step - 0.8:.1f}"'
            yield f'<rect class="cell {kind}" {place} {size} fill-opacity="{shade}" />'
    if kind == "inner":
        yield f'<path class="faint" d="M {x + 19.6} {y} v 40 M {x} {y + 19.6} h 40" />'


def _cost(cost: Cost, total: int, y: int) -> Iterator[str]:
    """Name, parameters, MACs, and a bar of the share of all MACs."""
    kind = next((level for level in ("outer", "inner") if cost.part.startswith(level)), "join")
    yield _text(LEFT, y + 12, cost.part.replace("_", " "), "")
    yield _text(LEFT + 300, y + 12, f"{cost.parameters:,} parameters", "end")
    yield _text(LEFT + 490, y + 12, f"{cost.macs:,} MACs", "end")
    size = f'width="{max(320 * cost.macs / total, 0.5):.1f}" height="12"'
    yield f'<rect class="cell {kind}" x="{LEFT + 510}" y="{y + 2}" {size} fill-opacity="0.8" />'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


def _style(colours: dict[str, str]) -> str:
    """CSS of one theme."""
    rules = {
        "text": f"font: 13px system-ui, sans-serif; fill: {colours['ink']};",
        "text.title": "font-size: 20px; font-weight: 600;",
        "text.strong": "font-size: 14px; font-weight: 600;",
        ".end": "text-anchor: end;",
        ".middle": "text-anchor: middle;",
        ".paper": f"fill: {colours['paper']};",
        ".box": "fill-opacity: 0.07; stroke-width: 1.5;",
        ".box.image": f"fill: {colours['faint']}; stroke: {colours['faint']};",
        ".line": "stroke-width: 1.5; fill: none;",
        ".line.image, .bracket, .faint": f"stroke: {colours['faint']}; fill: none;",
        ".tip": f"fill: {colours['join']};",
    }
    for kind in ("outer", "inner", "join"):
        rules[f"text.{kind}, .cell.{kind}"] = f"fill: {colours[kind]};"
        rules[f".box.{kind}"] = f"fill: {colours[kind]}; stroke: {colours[kind]};"
        rules[f".line.{kind}"] = f"stroke: {colours[kind]};"
    return " ".join(f"{selector} {{ {rule} }}" for selector, rule in rules.items())
