"""The menu of runs that several screens have."""

from __future__ import annotations

import gradio as gr

from dit_in_dit.app.events import QUIET
from dit_in_dit.app.library import Library


def run_menu(library: Library, elem_id: str) -> gr.Dropdown:
    """A menu of the library's runs. It lists them anew when it is opened: a run may have its first checkpoint since."""
    names = list(library.runs())
    menu = gr.Dropdown(names, value=names[0], label="Model", elem_id=elem_id)
    menu.focus(lambda: gr.Dropdown(list(library.runs())), None, menu, **QUIET)
    return menu
