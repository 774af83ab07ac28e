"""`app`: a page to draw samples, look inside, design a model, follow runs and look at data."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from dit_in_dit.cli.options import Commands, add_device
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs.pretrained import find_run


def add(commands: Commands) -> None:
    """Add the command."""
    app = commands.add(
        "app", _app, "a page in the browser: draw, look inside, design a model, follow runs, look at data"
    )
    app.add_argument(
        "runs", nargs="*", type=find_run, metavar="RUN", help="runs to begin with, beside the shipped ones"
    )
    app.add_argument("--folder", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (default: runs)")
    about = "address to listen at (default: 127.0.0.1, this machine only); another one asks for a token"
    app.add_argument("--host", default="127.0.0.1", help=about)
    app.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    app.add_argument("--open", action="store_true", help="open the page in the browser")
    add_device(app)


def _app(options: argparse.Namespace) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the page needs gradio: pip install 'dit-in-dit[app]'") from None
    from dit_in_dit.app.library import Library
    from dit_in_dit.app.server import serve
    from dit_in_dit.runs.folder import read_config
    from dit_in_dit.runs.retention import checkpoint_folders
    from dit_in_dit.runtime.device import pick_device

    pick_device(options.device)  # a device that is not there is refused here
    for run in options.runs:
        read_config(run)  # a name that is no run is refused here
        if not checkpoint_folders(run):
            raise UserError(f"{run} has no checkpoint yet: leave it out; if it is in --folder, it is listed later")
    if options.folder.exists() and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder} is a file: name the folder that holds the runs")
    print("starting ...", flush=True)
    page, address = serve(Library(options.runs, options.folder, options.device), options.host, options.port)
    print(f"the page is at {address}\nCtrl-C stops it", flush=True)
    if options.open:
        webbrowser.open(address)
    page.block_thread()
