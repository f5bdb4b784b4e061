"""Makes the tutorials' notebooks from their scripts, and runs them.

    python docs/tutorials/execute.py              # all of them
    python docs/tutorials/execute.py toy mnist    # these

The script NAME.py, in percent format, is what a person edits; NAME.ipynb stores the same cells with
what they printed and drew, at the sizes that the script says.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

TUTORIALS = Path(__file__).parent
ROOT = TUTORIALS.parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LONGEST_CELL = 600  # seconds


def scripts() -> list[Path]:
    """The tutorials' scripts."""
    return sorted(path for path in TUTORIALS.glob("*.py") if path != Path(__file__))


def notebook_of(script: Path) -> Any:
    """The cells of a script, which are named by their number: random names would be changes."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(script: Path) -> None:
    """Writes the script's notebook, with its outputs.

    Raises:
        CellExecutionError: if a cell raises.
        ValueError: if a cell writes to standard error, which a page should not show.
    """
    notebook = notebook_of(script)
    client = NotebookClient(
        notebook,
        timeout=LONGEST_CELL,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # how often a cell's text was sent is chance
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(f"{script.name} must not write to stderr, got:\n{output.text}")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = METADATA  # without the version of this machine's Python
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def smaller(png: str) -> str:
    """A picture with 256 colours, which take a third of the room; base64 in and out."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Runs the tutorials that the command line names, or all."""
    for script in [TUTORIALS / f"{name}.py" for name in sys.argv[1:]] or scripts():
        began = time.perf_counter()
        execute(script)
        print(f"{script.with_suffix('.ipynb').name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
