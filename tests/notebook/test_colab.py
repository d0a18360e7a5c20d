"""The first cell where its users meet it: on Colab with nothing but the notebook, and elsewhere."""

import os
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from notebook_files import FOLDER, code_cells, read
from stand_in import ROOT, environment, repository, run, site_packages

SETUP = code_cells(read(FOLDER / "01_smoke_test.ipynb"))[0].source
TWICE = f"{SETUP}\n{SETUP}\nprint('found in', notebook.__file__)\n"


@pytest.fixture(scope="module")
def cloned_from(tmp_path_factory: pytest.TempPathFactory) -> str:
    return repository(tmp_path_factory.mktemp("repository")).as_uri()


@pytest.fixture
def content(tmp_path: Path) -> Path:
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def setup_cell(python: Path, folder: Path, **variables: str) -> str:
    """What the first cell says, run twice in ``folder``, and where it found the package."""
    script = python.with_name("setup.ipy")
    script.write_text(TWICE)
    done = run(python, ["-m", "IPython", "--colors=NoColor", str(script)], folder, **variables)
    return done.stdout + done.stderr


def write_wheel(folder: Path, name: str, version: str, *, needs: str = "") -> None:
    """A wheel of an empty package; a folder of them stands for the package index."""
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", head + (f"Requires-Dist: {needs}\n" if needs else ""))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_notebook_01_runs_on_colab_with_nothing_else_there(tmp_path, content, cloned_from):
    """By papermill with other parameters; the package is that of the clone."""
    notebook = read(FOLDER / "01_smoke_test.ipynb")
    notebook.cells.append(nbformat.v4.new_code_cell(TWICE))
    nbformat.write(notebook, content / "01_smoke_test.ipynb")
    papermill = "-m papermill --no-progress-bar --kernel python3 01_smoke_test.ipynb done.ipynb"
    done = run(
        environment(tmp_path, colab=True),
        [*papermill.split(), "--parameters_yaml", "{SEEDS: [0, 1]}"],
        content,
        BITSTACK_REPOSITORY=cloned_from,
    )
    assert done.returncode == 0, done.stderr
    cells = code_cells(read(content / "done.ipynb"))
    assert all(cell.execution_count for cell in cells)
    assert "SEEDS = [0, 1]" in cells[2].source
    said = "".join(output.text for output in cells[-1].outputs)
    assert f"found in {content / 'bitstack' / 'bitstack_nb'}" in said


def test_colab_gets_what_is_missing_and_keeps_its_torch(tmp_path, content, cloned_from):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "ipywidgets", "98.0")
    write_wheel(wheels, "ipywidgets", "99.0", needs="torch>=99")
    write_wheel(wheels, "torch", "99.0")
    write_wheel(wheels, "transformers", "99.0")
    python = environment(tmp_path, colab=True, without=["ipywidgets"])
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    said = setup_cell(python, content, BITSTACK_REPOSITORY=cloned_from, **pip)
    assert f"found in {content / 'bitstack' / 'bitstack_nb'}" in said, said
    assert f"torch {torch.__version__}," in said
    installed = {info.stem for info in site_packages(python).glob("*.dist-info")}
    assert installed == {"ipywidgets-98.0"}


def test_an_installation_that_fails_is_not_passed_over(tmp_path, content, cloned_from):
    python = environment(tmp_path, colab=True, without=["ipywidgets"])
    said = setup_cell(python, content, BITSTACK_REPOSITORY=cloned_from, PIP_NO_INDEX="1")
    assert "ImportError: these packages are missing: ipywidgets." in said
    assert "found in" not in said


def test_a_repository_that_is_not_there_is_named(tmp_path, content):
    python = environment(tmp_path, colab=True)
    said = setup_cell(python, content, BITSTACK_REPOSITORY=(tmp_path / "nowhere").as_uri())
    assert str(tmp_path / "nowhere") in said
    assert "ModuleNotFoundError" in said
    assert list(content.iterdir()) == []


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"], ids=["root", "notebooks"])
def test_elsewhere_the_checkout_is_used(tmp_path, folder):
    """Whatever else is installed under our name."""
    python = environment(tmp_path, colab=False)
    (site_packages(python) / "bitstack_nb").mkdir()
    (site_packages(python) / "bitstack_nb" / "__init__.py").touch()
    before = sorted(folder.iterdir())
    said = setup_cell(python, folder, BITSTACK_REPOSITORY="file:///not/cloned")
    assert f"found in {ROOT / 'bitstack_nb'}" in said, said
    assert sorted(folder.iterdir()) == before
