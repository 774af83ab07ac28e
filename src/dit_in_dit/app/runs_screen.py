"""The screen *Runs*: curves of runs as arms, grids through time, the doctor, and runs to start, stop and resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dit_in_dit.app.events import QUIET, TURN, Updates, guarded
from dit_in_dit.app.library import Library
from dit_in_dit.app.markup import html_table, note, picture
from dit_in_dit.app.runs import Trainings, curve_figures, grids, training_runs
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError

SECONDS = 5.0  # between two looks at the runs


class RunsScreen:
    """The screen's fields and events, added to the page that is being built."""

    def __init__(self, library: Library) -> None:
        self.library, self.folder = library, library.folder
        self.trainings = Trainings(library.folder)
        names = self._names()
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._add_fields(names)
            with gr.Column(scale=3, min_width=320):
                self.message = gr.HTML(elem_id="runs-message")
                self.curves = gr.HTML(note(f"Runs are folders in {self.folder}."), elem_id="runs-figures")
                self.grid_step = gr.Slider(0, 1, step=1, label="Grid of samples through time", visible=False)
                self.grid = gr.HTML(elem_id="runs-grid")
                self.output = gr.Textbox(label="The run's last lines", lines=4, interactive=False)
                self.findings = gr.HTML(elem_id="runs-findings")
        self._connect()

    def _add_fields(self, names: list[str]) -> None:
        self.table = gr.HTML(elem_id="runs-table")
        self.shown = gr.CheckboxGroup(names, value=names, label="Runs in the curves")
        self.draw = gr.Button("Draw the curves", elem_id="runs-curves")
        self.run = gr.Dropdown(names, value=names[0] if names else None, label="One run", elem_id="runs-run")
        with gr.Row():
            self.stop, self.resume, self.doctor = (
                gr.Button(text, min_width=70, elem_id=f"runs-{text.lower()}") for text in ("Stop", "Resume", "Doctor")
            )
        with gr.Accordion("Start a run", open=not names):
            self.preset = gr.Dropdown(list(presets.NAMES), value="emoji", label="Preset")
            self.sets = gr.Textbox("", label="Config keys", info="KEY=VALUE, separated by spaces", elem_id="runs-sets")
            self.name = gr.Textbox("", label="Name", info=f"a folder in {self.folder}", elem_id="runs-name")
            self.start = gr.Button("Start", variant="primary", elem_id="runs-start")

    def _connect(self) -> None:
        def on(trigger: Any, handler: Any, inputs: Any, outputs: list[Any], **more: Any) -> Any:
            return trigger(guarded(self.message, handler), inputs, [*outputs, self.message], **QUIET, **more)

        states = [self.table, self.output]
        look = guarded(self.message, self.look, clear=False)
        for triggers in (gr.Timer(SECONDS).tick, None):  # None: when the page opens
            gr.on(triggers, look, self.run, [*states, self.message], **QUIET)
        on(self.draw.click, self.compare, self.shown, [self.curves], **TURN)
        on(self.run.focus, self.refresh, [self.shown, self.run], [self.shown, self.run])
        on(self.run.change, self.choose, self.run, [self.grid_step, self.grid])
        on(self.grid_step.change, self.turn, [self.run, self.grid_step], [self.grid])
        on(self.start.click, self.begin, [self.name, self.preset, self.sets], [])
        on(self.stop.click, self.end, self.run, [])
        on(self.resume.click, self.go_on, self.run, [])
        on(self.doctor.click, self.examine_run, self.run, [self.findings], **TURN)

    def _names(self) -> list[str]:
        return [name for name, state in training_runs(self.folder).items() if not state.fault]

    def look(self, one: str | None) -> Iterator[Updates]:
        """Show where the runs are."""
        states = training_runs(self.folder)
        rows = [(key, state.text, f"{state.step} of {state.steps}") for key, state in states.items()]
        updates: Updates = {self.table: html_table(("run", "", "step"), rows) if rows else note("no run yet")}
        yield updates | ({self.output: self.trainings.output(one)} if one else {})

    def refresh(self, kept: list[str], one: str | None) -> Iterator[Updates]:
        """List the runs anew."""
        known = self._names()
        chosen = one if one in known else known[0] if known else None
        yield {
            self.shown: gr.CheckboxGroup(known, value=[each for each in kept if each in known] or known),
            self.run: gr.Dropdown(known, value=chosen),
        }

    def compare(self, chosen: list[str]) -> Iterator[Updates]:
        """Draw the curves of the chosen runs."""
        states = training_runs(self.folder)
        figures, remarks = curve_figures([states[each] for each in chosen if each in states])
        html = "".join(picture(png, title) for title, png in figures) + "".join(map(note, remarks))
        yield {self.curves: html}

    def choose(self, one: str | None) -> Iterator[Updates]:
        """Show the newest grid of a run."""
        pictures = grids(self.folder / one) if one else []
        last = len(pictures) - 1
        slider = gr.Slider(0, max(1, last), value=max(0, last), visible=last > 0)
        yield {self.grid_step: slider, self.grid: _grid(pictures, last)}

    def turn(self, one: str | None, number: int) -> Iterator[Updates]:
        """Show the grid of another step."""
        yield {self.grid: _grid(grids(self.folder / one) if one else [], int(number))}

    def begin(self, name: str, preset: str, sets: str) -> Iterator[Updates]:
        """Start a run."""
        run = self.trainings.start(name, preset, sets)
        yield {self.message: note(f"training {run}: its row appears in a moment")}

    def end(self, one: str | None) -> Iterator[Updates]:
        """Stop a run."""
        self.trainings.stop(_named(one))
        yield {self.message: note(f"{one} writes a checkpoint and stops")}

    def go_on(self, one: str | None) -> Iterator[Updates]:
        """Resume a run."""
        self.trainings.resume(_named(one))
        yield {self.message: note(f"training {one} from its last checkpoint")}

    def examine_run(self, one: str | None) -> Iterator[Updates]:
        """Show the doctor's findings about a run."""
        from dit_in_dit.doctor.doctor import examine
        from dit_in_dit.runs.folder import read_config
        from dit_in_dit.runtime.device import pick_device

        yield {self.message: note(f"examining {one} ...")}
        path = self.folder / _named(one)
        report = examine(read_config(path), pick_device(self.library.device), path)
        rows = [(each.severity, each.check, each.seen, each.advice) for each in report.findings]
        text = html_table(("", "check", "finding", "advice"), rows) if rows else note(f"{one}: no findings")
        yield {self.findings: text, self.message: ""}


def _named(one: str | None) -> str:
    if not one:
        raise UserError("choose a run first")
    return one


def _grid(pictures: list[tuple[int, Path]], number: int) -> str:
    if not pictures:
        return ""
    step, path = pictures[max(0, min(number, len(pictures) - 1))]
    return f"<h4>step {step:,}</h4>" + picture(path.read_bytes(), f"samples at step {step}")
