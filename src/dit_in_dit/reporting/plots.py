"""Plots in one style, by matplotlib (the extra `viz`), which is imported on first use."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from dit_in_dit.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito 2008: distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")


def figure(rows: int = 1, columns: int = 1, *, width: float = 4.0, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure of rows x columns axes, each `width` x `height` inches, and the axes as a 2-D array.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'dit-in-dit[viz]'") from None
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with rc_context(style):  # applies to new axes; a caller's own settings are unchanged
        plot = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(plot)
        return plot, plot.subplots(rows, columns, squeeze=False)


def panel_grid(count: int, columns: int, *, width: float = 4.0, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure of `count` panels in `columns` columns, each panel `width` x `height` inches; and the panels' axes."""
    page, axes = figure(-(-count // columns), columns, width=width, height=height)
    for axis in axes.ravel()[count:]:
        axis.set_visible(False)
    return page, axes.ravel()[:count]


def figure_png(plot: Figure, *, colours: int | None = None) -> bytes:
    """A figure as the bytes of a PNG file; the same figure gives the same bytes.

    Args:
        colours: number of colours of the PNG, at most 256: enough for lines and letters, in a third of the bytes.
    """
    plot.savefig(drawn := io.BytesIO(), dpi=110, metadata={"Software": None})
    if colours is None:
        return drawn.getvalue()
    with Image.open(drawn) as picture:
        reduced = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        reduced.save(few := io.BytesIO(), "PNG", optimize=True)
    return few.getvalue()
