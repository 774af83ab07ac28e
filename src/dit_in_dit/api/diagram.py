"""Figures of architectures, and a page with all presets' figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from xml.sax.saxutils import escape

from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.inspection.diagram import draw_model
from dit_in_dit.inspection.diagram_svg import Theme
from dit_in_dit.runs import atomic


@dataclass(frozen=True)
class Diagram:
    """A figure as SVG text; notebooks show it."""

    svg: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the figure to a file."""
        atomic.write_atomic(Path(path), self.svg)


def draw(config: Any, *, theme: str = "auto", title: str = "DiT-in-DiT") -> Diagram:
    """Draw the architecture of a model as an SVG of 900 pixels' width.

    Args:
        config: a `ModelConfig`, a `RunConfig`, a loaded model or a network.
        theme: light, dark, or auto, which follows the viewer.
        title: heading of the figure.

    Raises:
        UserError: the theme is unknown.

    >>> dd.draw(dd.preset("emoji")).svg[:4]
    '<svg'
    """
    themes = get_args(Theme)
    if theme not in themes:
        raise UserError(f"theme must be one of {', '.join(themes)}: got {theme!r}{did_you_mean(theme, themes)}")
    config = getattr(config, "config", config)
    model: ModelConfig = getattr(config, "model", config)
    return Diagram(draw_model(model, theme=theme, title=title))  # type: ignore[arg-type]  # checked above


def gallery_page(about: Mapping[str, str]) -> str:
    """An HTML page with the figures NAME.svg beside it; `about` has a line below each name."""
    figures = "".join(
        f'<section id="{escape(name)}"><p>{escape(line)}</p>'
        f'<img src="{escape(name)}.svg" alt="{escape(name)}" loading="lazy"></section>'
        for name, line in about.items()
    )
    links = " ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in about)
    style = (
        ":root { color-scheme: light dark } body { font: 15px system-ui, sans-serif; max-width: 900px; "
        "margin: 2em auto; padding: 0 1em } nav a { margin-right: 0.8em; white-space: nowrap } "
        "img { max-width: 100% } p { opacity: 0.7 }"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Presets of DiT-in-DiT</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>'
        f"<body><h1>Presets</h1><nav>{links}</nav>{figures}</body></html>\n"
    )
