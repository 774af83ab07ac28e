"""Tables as plain text, aligned by rich."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

NUMBER = re.compile(r"[-+<=> ]*[\d.]|-?$|not finite$")  # the start of a numeric cell
UNLIMITED = 100_000


def text_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int | None = None) -> str:
    """A table as lines indented by two; cells are plain text, None is "-".

    Numeric columns are aligned right, except the first, which is always aligned left.

    Args:
        heads: one per column; empty: a table without a head.
        width: of the terminal, at which columns of words wrap; None: no wrapping. Cells are never cut.
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=bool(heads))
    for number, column in enumerate(zip(*cells, strict=True)):
        head = heads[number] if heads else ""
        numbers = number > 0 and all(NUMBER.match(cell) for cell in column)
        pieces = [piece for cell in (head, *column) for piece in ([cell] if numbers else cell.split())]
        table.add_column(
            Text(head),
            justify="right" if numbers else "left",
            no_wrap=numbers,
            overflow="fold",
            min_width=max(map(cell_len, pieces), default=0),
        )
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=UNLIMITED, color_system=None, force_terminal=False)
    least, most = Measurement.get(console, console.options, table)
    console.width = most if width is None else max(least, min(width, most))
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
