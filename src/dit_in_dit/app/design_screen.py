"""The screen *Design*: stages as blocks, choices as menus; figure, costs, plain twin, and the command to copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from dit_in_dit.app import design
from dit_in_dit.app.events import QUIET, Updates, guarded
from dit_in_dit.app.library import Library
from dit_in_dit.app.markup import html_table, note
from dit_in_dit.config import presets
from dit_in_dit.config.program import MOST_BLOCKS
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection.diagram import draw_model

Blocks = Sequence[Sequence[Any]]  # level and number of blocks of each stage
Plan = tuple[str, Blocks, dict[str, Any]]  # the preset at the start, the stages, and each field's value by key
EDIT: dict[str, Any] = {**QUIET, "concurrency_id": "design", "concurrency_limit": 1}  # changes of a plan, in order
FIRST = "emoji"


class DesignScreen:
    """The screen's fields and events, added to the page that is being built."""

    def __init__(self, library: Library) -> None:
        start = presets.get(FIRST)
        self.plan = gr.State(_plan(FIRST))  # the browser may report old values of fields that `load` sets
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                names = list(presets.NAMES)
                self.preset = gr.Dropdown(names, value=FIRST, label="Start from the preset", elem_id="design-preset")
                gr.Markdown("**Stages**, in the order of execution")
                _add_stage_rows(self.plan)
                with gr.Row():
                    for level in ("outer", "inner"):
                        add = gr.Button(f"Add {level} blocks", size="sm", elem_id=f"design-add-{level}")
                        add.click(_on_blocks(_added, level), self.plan, self.plan, **EDIT)
                self.fields = _add_fields(start)
            with gr.Column(scale=2, min_width=320):
                self.message = gr.HTML(elem_id="design-message")
                self.figure = gr.HTML(elem_id="design-figure")
                self.numbers = gr.HTML(elem_id="design-numbers")
                self.command = gr.Code(label="Train it", language="shell", wrap_lines=True, elem_id="design-command")
                with gr.Accordion("The whole config as YAML", open=False):
                    self.yaml = gr.Code(language="yaml", show_label=False)
        self._connect()

    def _connect(self) -> None:
        outputs = [self.figure, self.numbers, self.command, self.yaml, self.message]
        load, show = guarded(self.message, self.load), guarded(self.message, self.show)
        self.preset.change(load, self.preset, [self.plan, *self.fields.values(), self.message], **EDIT)
        for field, component in self.fields.items():
            component.input(partial(_edited, field.key), [self.plan, component], self.plan, **EDIT)
        self.plan.change(show, self.plan, outputs, concurrency_limit=2, trigger_mode="always_last", **QUIET)
        gr.on(None, show, self.plan, outputs, **QUIET)  # when the page opens

    def load(self, name: str) -> Iterator[Updates]:
        """Set all fields to a preset."""
        plan = _plan(name)
        yield {self.plan: plan, **{component: plan[2][field.key] for field, component in self.fields.items()}}

    def show(self, plan: Plan) -> Iterator[Updates]:
        """Show the figure, the command and the costs; then the costs that take longer."""
        name, blocks, values = plan
        config = design.designed(name, [(level, count) for level, count in blocks], values)
        rows = design.cost_rows(config)
        notes = "".join(map(note, design.without_effect(name, config)))
        yield {
            self.figure: draw_model(config.model, theme="auto", title=name),
            self.numbers: html_table(("", ""), rows) + notes,
            self.command: design.command(name, config),
            self.yaml: design.yaml_text(config),
        }
        for more in (design.plain_twin, design.memory):
            rows = [*rows, *more(config)]
            yield {self.numbers: html_table(("", ""), rows) + notes}


def _plan(name: str) -> Plan:
    config = presets.get(name)
    values = {field.key: design.field_value(config, field) for field in design.fields()}
    return name, [list(run) for run in config.model.program], values


def _edited(key: str, plan: Plan, value: Any) -> Plan:
    return *plan[:2], {**plan[2], key: value}


def _add_fields(config: RunConfig) -> dict[design.Field, Any]:
    """Components of all fields, in groups that open."""
    components, fields = dict[design.Field, Any](), design.fields()
    for title, prefix in design.GROUPS.items():
        with gr.Accordion(title, open=False):
            for field in fields:
                if field.key.startswith(prefix) and field not in components:
                    components[field] = _component(field, design.field_value(config, field))
    return components


def _component(field: design.Field, value: Any) -> Any:
    text: dict[str, Any] = {"label": field.key.removeprefix("model."), "info": field.meaning}
    if field.choices:
        return gr.Dropdown(list(field.choices), value=value, **text)
    if field.kind is bool:
        return gr.Checkbox(value, **text)
    if field.kind is str:
        return gr.Textbox(value, max_lines=1, **text)
    whole = field.kind is int
    return gr.Number(value, precision=0 if whole else None, step=1 if whole else 0.1, **text)


def _add_stage_rows(plan: Any) -> None:
    """Add a row for each stage: its level, its number of blocks, and buttons that move or remove it."""

    @gr.render(inputs=plan, show_progress="hidden")  # type: ignore[untyped-decorator]
    def rows(shown: Plan) -> None:
        plain: dict[str, Any] = {"show_label": False, "container": False}
        for place, (level, count) in enumerate(shown[1]):
            with gr.Row(equal_height=True):
                menu = gr.Dropdown(["outer", "inner"], value=level, min_width=90, **plain)
                number = gr.Number(count, precision=0, minimum=1, maximum=MOST_BLOCKS, min_width=70, **plain)
                menu.input(_on_blocks(_changed, place, 0), [plan, menu], plan, **EDIT)
                number.input(_on_blocks(_changed, place, 1), [plan, number], plan, **EDIT)
                for sign, action in (("↑", _moved_up), ("↓", _moved_down), ("✕", _removed)):
                    button = gr.Button(sign, size="sm", min_width=32, scale=0)
                    button.click(_on_blocks(action, place), plan, plan, **EDIT)


def _on_blocks(change: Callable[..., Blocks], *where: Any) -> Callable[..., Plan]:
    """The change of stages as one of the plan."""
    return lambda plan, *value: (plan[0], change(*where, plan[1], *value), plan[2])


def _added(level: str, blocks: Blocks) -> Blocks:
    return [*blocks, [level, 1]]


def _changed(place: int, part: int, blocks: Blocks, value: Any) -> Blocks:
    if not value or place >= len(blocks) or value == blocks[place][part]:  # empty while it is typed
        return blocks
    changed = [list(each) for each in blocks]
    changed[place][part] = value
    return changed


def _removed(place: int, blocks: Blocks) -> Blocks:
    return [each for number, each in enumerate(blocks) if number != place]


def _moved_up(place: int, blocks: Blocks) -> Blocks:
    order = list(blocks)
    if 0 < place < len(order):
        order[place - 1], order[place] = order[place], order[place - 1]
    return order


def _moved_down(place: int, blocks: Blocks) -> Blocks:
    return _moved_up(place + 1, blocks)
