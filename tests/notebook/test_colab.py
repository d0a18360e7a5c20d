"""The notebooks' first cell on Colab, with only the notebook there, and elsewhere."""

import os
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from notebook_files import FOLDER, code_cells, read
from stand_in import ROOT, committed, environment, repository, run, site_packages

FIRST = code_cells(read(FOLDER / "01_smoke_test.ipynb"))[0].source
TWICE = f"{FIRST}\n{FIRST}\nprint('found in', notebook.__file__)\n"


@pytest.fixture(scope="module")
def clone_from(tmp_path_factory: pytest.TempPathFactory) -> str:
    return repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def content(tmp_path: Path) -> Path:
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def first_cell(python: Path, folder: Path, **variables: str) -> str:
    """The output of the first cell, run twice in ``folder``, and the package's place."""
    script = python.with_name("first.ipy")
    script.write_text(TWICE)
    return run(python, ["-m", "IPython", "--colors=NoColor", str(script)], folder, **variables)


def write_wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A wheel of an empty package; a folder of wheels stands for the package index."""
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", head + (f"Requires-Dist: {needs}\n" if needs else ""))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_notebook_01_runs_on_colab_with_nothing_else_there(tmp_path, content, clone_from):
    """By papermill with another parameter; the package is that of the clone."""
    notebook = read(FOLDER / "01_smoke_test.ipynb")
    notebook.cells.append(nbformat.v4.new_code_cell(TWICE))
    nbformat.write(notebook, content / "01_smoke_test.ipynb")
    papermill = "-m papermill --no-progress-bar --kernel python3 01_smoke_test.ipynb done.ipynb"
    said = run(
        environment(tmp_path, colab=True),
        [*papermill.split(), "--parameters_yaml", "{SEEDS: [0, 1]}"],
        content,
        BITSTACK_REPOSITORY=clone_from,
        BITSTACK_PRESET="ci",
    )
    assert (content / "done.ipynb").exists(), said
    cells = code_cells(read(content / "done.ipynb"))
    assert all(cell.execution_count for cell in cells), said
    assert "SEEDS = [0, 1]" in cells[2].source
    shown = "".join(output.text for output in cells[-1].outputs)
    assert f"found in {content / 'bitstack' / 'bitstack_nb'}" in shown


def test_colab_gets_missing_packages_and_keeps_its_torch(tmp_path, content, clone_from):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "ipywidgets", "98.0")
    write_wheel(wheels, "ipywidgets", "99.0", needs="torch>=99")
    write_wheel(wheels, "torch", "99.0")
    write_wheel(wheels, "transformers", "99.0")
    python = environment(tmp_path, colab=True, without=["ipywidgets"])
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    said = first_cell(python, content, BITSTACK_REPOSITORY=clone_from, **pip)
    assert f"found in {content / 'bitstack' / 'bitstack_nb'}" in said, said
    assert f"torch {torch.__version__}," in said
    assert {info.stem for info in site_packages(python).glob("*.dist-info")} == {"ipywidgets-98.0"}


def test_a_missing_repository_is_named(tmp_path, content):
    nowhere = tmp_path / "nowhere"
    python = environment(tmp_path, colab=True)
    said = first_cell(python, content, BITSTACK_REPOSITORY=nowhere.as_uri())
    assert (
        f"ImportError: no bitstack_nb in {nowhere.as_uri()}: run %env BITSTACK_REPOSITORY" in said
    )
    assert list(content.iterdir()) == []


def test_a_repository_without_the_package_is_named_and_another_one_works(
    tmp_path, content, clone_from
):
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").touch()
    python = environment(tmp_path, colab=True)
    said = first_cell(python, content, BITSTACK_REPOSITORY=committed(other))
    assert f"no bitstack_nb in {other.as_uri()}: run %env BITSTACK_REPOSITORY=" in said
    assert list(content.iterdir()) == []
    said = first_cell(python, content, BITSTACK_REPOSITORY=clone_from)
    assert f"found in {content / 'bitstack' / 'bitstack_nb'}" in said, said


def test_with_a_gpu_notebook_02_chooses_quick(tmp_path):
    """A torch that says there is a GPU stands for one."""
    parameters = code_cells(read(FOLDER / "02_benchmark.ipynb"))[1].source
    python = environment(tmp_path, colab=False)
    script = python.with_name("gpu.py")
    script.write_text(
        f"import torch\ntorch.cuda.is_available = lambda: True\n{parameters}\nprint('is', PRESET)"
    )
    chosen = run(python, [str(script)], ROOT, PYTHONPATH=str(ROOT), BITSTACK_PRESET="")
    assert "is quick" in chosen


def test_elsewhere_the_first_cell_uses_the_clone(tmp_path):
    """Also if another package of our name is installed."""
    python = environment(tmp_path, colab=False)
    (site_packages(python) / "bitstack_nb").mkdir()
    (site_packages(python) / "bitstack_nb" / "__init__.py").touch()
    for folder in (ROOT, ROOT / "notebooks", ROOT / "docs", ROOT / "tests" / "colab"):
        before = sorted(folder.iterdir())
        said = first_cell(python, folder, BITSTACK_REPOSITORY="file:///not/cloned")
        assert f"found in {ROOT / 'bitstack_nb'}" in said, said
        assert sorted(folder.iterdir()) == before
    said = first_cell(python, tmp_path)
    assert f", not in {tmp_path}" in said and "start this notebook in a clone of" in said
