"""Run the notebooks and store their outputs.

    python scripts/run_notebooks.py [NAME ...]

Standard error (progress bars) and second forms of an output are left out, and pictures have at most 256 colours.
The same machine and versions write the same file.
"""

from __future__ import annotations

import io
import os
import sys
from base64 import b64decode, b64encode
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FORMS = ("image/png", "image/svg+xml", "text/html", "text/plain")  # of an output, the best first
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run(notebook: Any, folder: Path) -> None:
    """Run a notebook in a folder; its cells get their outputs. Raises nbclient's CellExecutionError."""
    place = {"metadata": {"path": str(folder)}}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # where `dit-in-dit` is
    environment = {**os.environ, "PATH": path, "IPYTHONDIR": str(folder / "ipython")}
    client = NotebookClient(notebook, timeout=300, resources=place, record_timing=False)
    client.execute(env=environment)


def clean(notebook: Any) -> None:
    """Keep what a reader sees: no standard error, no second form of an output, small pictures, one text per cell."""
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        outputs: list[Any] = []
        for out in cell.outputs:
            if out.output_type == "stream":
                if out.name == "stdout" and outputs and outputs[-1].output_type == "stream":
                    outputs[-1].text += out.text
                elif out.name == "stdout":
                    outputs.append(out)
            elif form := next((kind for kind in FORMS if out.data.get(kind, "").strip() and not is_bar(out)), None):
                out.data = {form: shrink(out.data[form]) if form == "image/png" else out.data[form]}
                outputs.append(out)
        cell.outputs = outputs


def is_bar(output: Any) -> bool:
    """Whether the output is what a progress bar leaves."""
    return output.output_type == "display_data" and not output.data.get("text/plain", "").strip()


def shrink(png: str) -> str:
    """A PNG in base64 with at most 256 colours."""
    image, small = Image.open(io.BytesIO(b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return b64encode(small.getvalue()).decode()


def main(names: list[str]) -> None:
    """Run the named notebooks, or all."""
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        clean(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
