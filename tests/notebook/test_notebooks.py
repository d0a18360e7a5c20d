"""The notebook files: what is the same in all, and nothing in them that a run left by accident."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from notebook_files import FOLDER, WIDGET, code_cells, metadata, read

from bitstack_nb.benchmark.protocol import PRESETS, default_preset
from bitstack_nb.notebook.first_cell import describe, duration, output_folder, report, to_install

PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FILES = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000  # bytes; GitHub shows no notebook that is much larger

each_notebook = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def python(cell) -> str:
    """The cell's source with %magics and !commands turned into the calls they stand for."""
    return TransformerManager().transform_cell(cell.source)


def texts(cell) -> str:
    """All that a reader of the cell's outputs sees as text."""
    shown = [output.get("text", "") for output in cell.outputs]
    for output in cell.outputs:
        shown += [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(shown)


def test_they_are_there_in_reading_order():
    numbers = [file.stem.partition("_")[0] for file in FILES]
    assert numbers == [f"{number:02}" for number in range(1, len(FILES) + 1)]
    assert len(FILES) >= 5


@each_notebook
def test_title_and_badge_open_this_file_in_the_projects_repository(file):
    owner = REPOSITORY.removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{file.name}"
    title = read(file).cells[0]
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert f"[![Open in Colab]({BADGE})]({address})" in title.source


def test_first_code_cell_is_the_same_in_all_and_names_the_projects_repository():
    sources = {code_cells(read(file))[0].source for file in FILES}
    assert len(sources) == 1
    assert re.findall(r"https://[^\"]+", sources.pop()) == [REPOSITORY]


@each_notebook
def test_second_code_cell_alone_is_tagged_for_papermill(file):
    tags = [cell.metadata.get("tags", []) for cell in code_cells(read(file))]
    assert [number for number, found in enumerate(tags) if "parameters" in found] == [1]


@each_notebook
def test_cell_ids_are_words_and_each_once(file):
    ids = [cell.id for cell in read(file).cells]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z]{3,}(-[a-z0-9]+)*", name)] == []


@each_notebook
def test_metadata_is_ours_alone(file):
    """No widget state (GitHub refuses it), no timings, no skipped cells, no kernel of someone's."""
    notebook = read(file)
    assert notebook.metadata == metadata(file)
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert set(cell.metadata.get("tags", [])) <= {"parameters", "nbval-check-output"}


@each_notebook
def test_all_cells_are_run_in_order_without_errors_or_leftovers(file):
    cells = code_cells(read(file))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = {output.output_type for output in cell.outputs}
        assert kinds <= {"stream", "display_data", "execute_result"}
        assert "stderr" not in {output.get("name") for output in cell.outputs}
        assert not any(WIDGET in output.get("data", {}) for output in cell.outputs)
        paths = re.findall(r"(?:/(?:home|root|tmp|work|content|Users)/|[A-Z]:\\)\S*", texts(cell))
        assert paths == []
        assert re.findall(r"0x[0-9a-fA-F]{6,}", texts(cell)) == []


@each_notebook
def test_cells_hold_a_story_and_no_helpers(file):
    for cell in code_cells(read(file)):
        helpers = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        found = [
            node.name for node in ast.walk(ast.parse(python(cell))) if isinstance(node, helpers)
        ]
        assert found == [], f"{cell.id}: belongs into the package"
        assert "NBVAL_" not in cell.source, f"{cell.id}: nbval is told what to do by tags"


@each_notebook
def test_files_stay_small(file):
    assert file.stat().st_size < LARGEST


# What the first two cells ask the package ------------------------------------------------------


def test_preset_is_chosen_by_the_environment(monkeypatch):
    for name in PRESETS:
        monkeypatch.setenv("BITSTACK_PRESET", name)
        assert default_preset() == name
        assert f"preset    {name} " in describe()


def test_without_a_choice_the_preset_is_what_the_machine_can_do(monkeypatch):
    monkeypatch.delenv("BITSTACK_PRESET", raising=False)
    expected = {True: "published", False: "smoke"}
    assert default_preset() == expected[torch.cuda.is_available()]


def test_unknown_preset_names_the_known_ones(monkeypatch):
    monkeypatch.setenv("BITSTACK_PRESET", "fast")
    with pytest.raises(ValueError, match="'fast', expected one of smoke, quick, published"):
        default_preset()


def test_nothing_is_missing_here():
    assert to_install() == ""


def test_a_report_passes_only_if_every_check_does():
    assert report({"one": True, "two": True}).endswith("\nPASS: all checks passed")
    failed = report({"one": True, "two": False})
    assert "FAIL  two" in failed
    assert failed.endswith("\nFAIL: 1 of 2 checks failed")


def test_durations_are_as_people_say_them():
    said = [duration(seconds) for seconds in (0.4, 42, 185, 4800)]
    assert said == ["0 s", "42 s", "3 min", "80 min"]
    assert duration(3 * 3600 + 60) == "3 h 1 min"


def test_a_folder_on_drive_is_mounted_first(tmp_path):
    """Off Colab that fails, and nothing is made in its place."""
    assert output_folder(str(tmp_path / "new" / "runs")).is_dir()
    with pytest.raises(ImportError):
        output_folder("/content/drive/MyDrive/bitstack")
    assert not Path("/content/drive").exists()
