"""The screen *Draw*: samples of one seed by a nested model, its plain twin, and itself without the inner path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dit_in_dit.app.drawing import ALL, DrawnWays, Settings, Way, difference, draw_way
from dit_in_dit.app.events import QUIET, StopFlag, Updates, connect_work, guarded
from dit_in_dit.app.library import Library
from dit_in_dit.app.markup import note, picture_row, progress
from dit_in_dit.app.run_menu import run_menu
from dit_in_dit.config.choices import choice_names
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.inspection.hooks import can_run_without_inner

NOBODY = "no other model"
ESTIMATE, NOISY = "image estimate of the model", "x_t: what the model sees"
HOUR = 3600
EACH = 4  # calls of the network between two pictures of the work so far


class DrawScreen:
    """The screen's fields and events, added to the page that is being built."""

    def __init__(self, library: Library) -> None:
        self.library = library
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._add_fields()
            with gr.Column(scale=3, min_width=320):
                self.moment = gr.Slider(0, 1, value=1, step=1, label="Moment: 0 is noise, the last one the samples")
                self.kind = gr.Radio([ESTIMATE, NOISY], value=ESTIMATE, show_label=False, container=False)
                self.pictures = gr.HTML(note("Press Draw."), elem_id="draw-pictures")
        self.drawing = gr.State(DrawnWays(), time_to_live=HOUR)
        self.flag = gr.State(StopFlag())
        self._connect()

    def _add_fields(self) -> None:
        self.model = run_menu(self.library, "draw-model")
        first = _facts(self.library, self.model.value)
        others = [NOBODY, *first["beside"]]
        self.beside = gr.Dropdown(others, value=first["plain"], label="Beside it, from the same noise")
        self.classes = gr.Dropdown([ALL, *first["classes"]], value=ALL, label="Class")
        self.seed = gr.Number(0, label="Seed", precision=0, elem_id="draw-seed")
        self.num = gr.Slider(1, first["most"], value=min(4, first["most"]), step=1, label="Images")
        self.guidance = gr.Slider(0, 8, value=first["guidance"], step=0.1, label="Classifier-free guidance")
        self.steps = gr.Slider(1, 100, value=first["steps"], step=1, label="Sampler steps", elem_id="draw-steps")
        self.sampler = gr.Dropdown(first["samplers"], value=first["sampler"], label="Sampler")
        self.off = gr.Checkbox(True, label="Also with the inner path switched off", visible=first["inner"])
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw-go")
            self.stop = gr.Button("Stop", min_width=80, elem_id="draw-stop")
        self.message = gr.HTML(elem_id="draw-message")

    def _connect(self) -> None:
        settings = [self.classes, self.seed, self.guidance, self.steps, self.sampler, self.num]
        inputs = [self.model, self.beside, self.off, self.kind, *settings]
        outputs = [self.drawing, self.moment, self.pictures]
        triggers = [self.go.click, self.seed.submit]
        connect_work(triggers, self.stop, self.flag, self.message, self.draw, inputs=inputs, outputs=outputs)
        fields = [self.beside, *settings[:1], *settings[2:], self.off, self.message]
        self.model.change(guarded(self.message, self.choose), self.model, fields, **QUIET)
        for field in (self.moment, self.kind):
            look = guarded(self.message, self.look)
            shown = [self.pictures, self.message]
            field.change(look, [self.drawing, self.moment, self.kind], shown, **QUIET, trigger_mode="always_last")

    def choose(self, name: str) -> Iterator[Updates]:
        """Fit the fields to a model."""
        facts = _facts(self.library, name)
        yield {
            self.beside: gr.Dropdown([NOBODY, *facts["beside"]], value=facts["plain"]),
            self.classes: gr.Dropdown([ALL, *facts["classes"]], value=ALL),
            self.num: gr.Slider(1, facts["most"], value=min(4, facts["most"])),
            self.guidance: gr.Slider(value=facts["guidance"]),
            self.steps: gr.Slider(value=facts["steps"]),
            self.sampler: gr.Dropdown(facts["samplers"], value=facts["sampler"]),
            self.off: gr.Checkbox(visible=facts["inner"]),
        }

    def draw(self, name: str, other: str, switched: bool, kind: str, *values: Any) -> Iterator[Updates]:
        """Draw by the model, by the other one, and without the inner path, and show the work so far."""
        settings, chosen = Settings(*values), self.library.model(name)
        jobs = [(chosen, True)] + ([(self.library.model(other), True)] if other != NOBODY else [])
        jobs += [(chosen, False)] if switched and can_run_without_inner(chosen.net) else []
        ways, calls = list[Way](), 0
        for number, (one, inner) in enumerate(jobs, 1):
            for each in draw_way(one, settings, inner=inner):
                if isinstance(each, Way):
                    ways.append(each)
                    continue
                t, estimate = each
                said = f"model {number} of {len(jobs)}, t = {t:.2f}"
                updates: Updates = {self.message: progress(said, 1 - t)}
                if not ways and (calls := calls + 1) % EACH == 1:
                    updates[self.pictures] = picture_row(name, estimate)
                yield updates
            drawing = DrawnWays(tuple(ways))
            last = drawing.moments - 1
            moment = gr.Slider(0, last, value=last)
            html = show(drawing, last, kind)
            yield {self.drawing: drawing, self.moment: moment, self.pictures: html, self.message: ""}

    def look(self, drawing: DrawnWays, moment: int, kind: str) -> Iterator[Updates]:
        """Show another moment."""
        yield {self.pictures: show(drawing, moment, kind)}


def _facts(library: Library, name: str) -> dict[str, Any]:
    """What the fields offer for a model, and their first values."""
    model = library.model(name)
    config, beside = model.config, library.beside(name)
    known = choice_names("sample.sampler")
    return {
        "classes": list(model.classes) if config.model.num_classes else [],
        "beside": beside,
        "plain": beside[0] if beside else NOBODY,
        "most": config.sample.micro_batch,
        "guidance": config.sample.guidance,
        "steps": config.sample.steps,
        "samplers": [each for each in known if config.diffusion.path in SAMPLERS[each].schedulers],
        "sampler": config.sample.sampler,
        "inner": can_run_without_inner(model.net),
    }


def show(drawing: DrawnWays, moment: int, kind: str) -> str:
    """HTML of all models' images at a moment. If the first model was drawn without its inner path too: their
    difference and its finest level."""
    if not drawing.ways:
        return note("Press Draw.")
    rows, shown = [], []
    for way in drawing.ways:
        at = min(int(moment), len(way.times) - 1)
        pixels = (way.estimate if kind == ESTIMATE else way.noisy)[at]
        rows.append(picture_row(way.title, pixels, way.labels, f"t = {way.times[at]:.2f}"))
        shown.append(pixels)
    if not drawing.ways[-1].inner:
        for title, fine in (("difference: inner path on minus off", False), ("its finest level", True)):
            apart, factor = difference(shown[0], shown[-1], fine=fine)
            rows.append(picture_row(title, apart, note=f"contrast times {factor:.1f}"))
    return "".join(rows)
