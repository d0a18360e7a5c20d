"""The committed notebooks: ``python tests/notebook_files.py [FILE ...]`` runs and writes them.

``python tests/notebook_files.py --repository OWNER/REPO`` points all badges and first cells to
another repository on GitHub, without running anything.

Solutions of their exercises are notebooks too. All run on the preset smoke. Outputs that differ
from run to run are left out: timings, the kernel's version, widgets (they need the kernel), stderr
(progress bars) and the Trainer's tables, which show the time.
"""

import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
_METADATA = {
    "colab": {"provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    # The last is for scripts that nbconvert makes: without it cells keep their ! and %.
    "language_info": {
        "file_extension": ".py",
        "name": "python",
        "nbconvert_exporter": "python",
    },
}
_ON_A_GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}
_NO_GPU = ("01_smoke_test.ipynb", "04_mask_visualization.ipynb")  # too small to need one
# The first code cell is hidden, by Colab and by JupyterLab.
HIDDEN = {"cellView": "form", "jupyter": {"source_hidden": True}}
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(file: Path) -> nbformat.NotebookNode:
    """The notebook, valid or an error."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def metadata(file: Path) -> dict[str, Any]:
    """A notebook's metadata for Colab and Jupyter."""
    small = file.name in _NO_GPU or file.parent.name == "solutions"
    return _METADATA if small else _METADATA | _ON_A_GPU


def repository(root: Path = ROOT) -> str:
    """The address that pyproject.toml gives; the only place where it is not a copy."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def set_repository(name: str, root: Path = ROOT) -> None:
    """Let the project's address, its badges and the first cells name ``OWNER/REPO``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SystemExit(f"--repository is {name!r}, expected OWNER/REPO")
    old = re.escape(repository(root).removeprefix("https://github.com/"))
    copies = [root / file for file in ("pyproject.toml", "CITATION.cff", "README.md")]
    for file in [*copies, *(root / "notebooks").rglob("*.ipynb")]:
        text = file.read_text()
        file.write_text(re.sub(rf"(github(?:\.com)?/){old}(?![\w.-])", rf"\g<1>{name}", text))


def _stays(output: nbformat.NotebookNode) -> bool:
    """Whether an output is the same in each run."""
    data = output.get("data", {})
    timed = output.get("name") == "stderr" or "<progress" in data.get("text/html", "")
    return not timed and WIDGET not in data


def refresh(file: Path) -> None:
    """Run a notebook and write it with new outputs; an error leaves the file as it was."""
    notebook = read(file)
    NotebookClient(
        notebook,
        resources={"metadata": {"path": str(file.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        timeout=1200,
    ).execute()
    notebook.metadata = metadata(file)
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if _stays(output)]
    nbformat.write(notebook, file)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--repository"]:
        set_repository(*arguments[1:])
        return
    os.environ["BITSTACK_PRESET"] = "smoke"
    with tempfile.TemporaryDirectory() as runs:
        os.environ["BITSTACK_OUTPUT"] = runs
        given = [Path(name).resolve() for name in arguments]
        for file in given or NOTEBOOKS + SOLUTIONS:
            refresh(file)


if __name__ == "__main__":
    main(sys.argv[1:])
