"""The screen *Inside*: attention, sub-patches and what the inner head draws, for one image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dit_in_dit.app.events import QUIET, StopFlag, Updates, connect_work, guarded
from dit_in_dit.app.inside import drawn_view, held_out_view, inside_page, own_view
from dit_in_dit.app.library import Library
from dit_in_dit.app.markup import note, page_frame, progress
from dit_in_dit.app.run_menu import run_menu
from dit_in_dit.config.errors import UserError

HELD_OUT, OWN, DRAWN = "held-out image", "my own picture", "drawn by the model"
ANY = "any class"


class InsideScreen:
    """The screen's fields and events, added to the page that is being built."""

    def __init__(self, library: Library) -> None:
        self.library = library
        with gr.Row():
            model = run_menu(library, "inside-model")
            kind = gr.Radio([HELD_OUT, OWN, DRAWN], value=HELD_OUT, label="Image", elem_id="inside-kind")
            self.classes = gr.Dropdown([ANY, *self._labels(model.value)], value=ANY, label="Class")
            number = gr.Number(0, label="Number of the held-out image, or seed", precision=0)
        own = gr.Image(label=OWN, type="numpy", sources=["upload", "clipboard"], visible=False, height=240)
        with gr.Row():
            go = gr.Button("Look inside", variant="primary", elem_id="inside-go")
            stop = gr.Button("Stop")
        self.message = gr.HTML(elem_id="inside-message")
        self.maps = gr.HTML(note("The maps of one image: move t, click a patch."), elem_id="inside-maps")
        model.change(guarded(self.message, self.choose), model, [self.classes, self.message], **QUIET)
        kind.change(lambda what: gr.Image(visible=what == OWN), kind, own, **QUIET)
        fields, flag = [model, kind, self.classes, number, own], gr.State(StopFlag())
        connect_work([go.click], stop, flag, self.message, self.look, inputs=fields, outputs=[self.maps])

    def _labels(self, name: str) -> list[str]:
        model = self.library.model(name)
        return list(model.classes) if model.config.model.num_classes else []

    def choose(self, name: str) -> Iterator[Updates]:
        """Fit the fields to a model."""
        yield {self.classes: gr.Dropdown([ANY, *self._labels(name)], value=ANY)}

    def look(self, name: str, kind: str, label: str, number: int, own: Any) -> Iterator[Updates]:
        """Record the maps of an image and show their page."""
        model, label = self.library.model(name), "" if label == ANY else label
        if kind == OWN and own is None:
            raise UserError("choose a picture first")
        views = (
            own_view(model, own, label)
            if kind == OWN
            else drawn_view(model, number, label)
            if kind == DRAWN
            else held_out_view(model, number, label)
        )
        for each in inside_page(model, views):
            if isinstance(each, str):
                yield {self.maps: page_frame(each, f"maps of {name}"), self.message: ""}
            else:
                yield {self.message: progress("looking: pass {} of {}".format(*each), each[0] / each[1])}
