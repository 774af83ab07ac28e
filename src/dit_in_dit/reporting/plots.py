"""Plots in one style. Needs matplotlib (the extra `viz`), imported when the first one is drawn."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from dit_in_dit.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito 2008: told apart with any colour vision.
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
    with rc_context(style):  # read when axes are made: a caller's own settings stay as they are
        made = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(made)
        return made, made.subplots(rows, columns, squeeze=False)


def figure_png(made: Figure, *, colours: int | None = None) -> bytes:
    """A figure as the bytes of a PNG file; the same figure gives the same bytes.

    Args:
        colours: at most 256; lines and letters need no more, and take a third of the bytes.
    """
    made.savefig(drawn := io.BytesIO(), dpi=110, metadata={"Software": None})
    if colours is None:
        return drawn.getvalue()
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(
            few := io.BytesIO(), "PNG", optimize=True
        )
    return few.getvalue()
