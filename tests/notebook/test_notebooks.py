"""The notebook files have the same frame and no leftovers; the first cells' functions work."""

import ast
import os
import re
import tomllib
from pathlib import Path

import pytest
import torch
import toy_results
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert import ScriptExporter
from notebook_files import FOLDER, NOTEBOOKS, SOLUTIONS, WIDGET, code_cells, metadata, read

from bitstack_nb.benchmark import PRESETS, default_preset
from bitstack_nb.notebook import (
    describe,
    duration,
    first_cell,
    nearest_runs,
    output_folder,
    report,
    several,
    to_install,
)

PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LARGEST = 1_000_000  # bytes; GitHub shows no notebook that is much larger
# A path of the machine that ran it, or the address of an object.
ACCIDENT = r"(?:/(?:home|root|tmp|work|content|Users)/|[A-Z]:\\)\S*|0x[0-9a-fA-F]{6,}"

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
each_file = pytest.mark.parametrize("file", NOTEBOOKS + SOLUTIONS, ids=lambda file: file.stem)


def test_they_are_numbered_and_share_the_first_code_cell():
    numbers = [file.stem.partition("_")[0] for file in NOTEBOOKS]
    assert numbers == [f"{number:02}" for number in range(1, len(NOTEBOOKS) + 1)]
    (first,) = {code_cells(read(file))[0].source for file in NOTEBOOKS + SOLUTIONS}
    assert re.findall(r"https://[^\"]+", first) == [REPOSITORY]


@each_file
def test_title_and_badge_open_this_file_in_the_projects_repository(file):
    owner = REPOSITORY.removeprefix("https://github.com/")
    path = file.relative_to(FOLDER.parent).as_posix()
    address = f"https://colab.research.google.com/github/{owner}/blob/main/{path}"
    title = read(file).cells[0]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert f"[![Open in Colab]({BADGE})]({address})" in title.source


@each_notebook
def test_a_notebook_links_to_its_solution(file):
    """A notebook without exercises has none."""
    text = "".join(cell.source for cell in read(file).cells if cell.cell_type == "markdown")
    solution = FOLDER / "solutions" / f"{file.stem.partition('_')[0]}_solution.ipynb"
    link = f"](solutions/{solution.name})"
    assert ("\n## Exercises\n" in text) == (link in text) == (solution in SOLUTIONS)


@each_file
def test_cells_have_stable_ids(file):
    ids = [cell.id for cell in read(file).cells]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z]{3,}(-[a-z0-9]+)*", name)] == []


@each_notebook
def test_the_second_code_cell_holds_the_parameters(file):
    tags = [cell.metadata.get("tags", []) for cell in code_cells(read(file))]
    assert [number for number, found in enumerate(tags) if "parameters" in found] == [1]


@each_file
def test_metadata_is_ours_alone(file):
    """No widget state (GitHub refuses it), no timings, no skipped cells, no other kernel."""
    notebook = read(file)
    assert notebook.metadata == metadata(file)
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert set(cell.metadata.get("tags", [])) <= {"parameters", "nbval-check-output"}
    assert file.stat().st_size < LARGEST


@each_file
def test_all_cells_are_run_in_order_without_errors_or_leftovers(file):
    cells = code_cells(read(file))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert output.get("name") != "stderr"
        data = output.get("data", {})
        assert WIDGET not in data
        shown = [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
        assert re.findall(ACCIDENT, "\n".join(shown)) == []


@each_file
def test_cells_define_no_helpers(file):
    """Helpers belong into the package, and nbval is configured by tags."""
    helpers = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for cell in code_cells(read(file)):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        assert not [node.name for node in ast.walk(tree) if isinstance(node, helpers)], cell.id
        assert "NBVAL_" not in cell.source, cell.id


@each_file
def test_nbconvert_makes_a_script_of_it(file):
    source, about = ScriptExporter().from_filename(file)
    assert about["output_extension"] == ".py"
    compile(source, file.stem, "exec")


# Parameters ------------------------------------------------------------------------------------


def test_a_parameter_may_be_one_value_or_several():
    for one in ("distilbert-base-uncased", 0, 0.12):
        assert several(one) == [one]
    assert several((0, 1)) == several(range(2)) == [0, 1]
    assert several(None, [42]) == several([], [42]) == [42]


def test_any_sparsity_shows_the_nearest_recorded_one_and_says_so(caplog):
    results = [toy_results.run("finetune")] + [
        toy_results.run(sparsity=sparsity, budget=budget)
        for sparsity in (0.05, 0.12)
        for budget in ("fresh", "union")
    ]
    for asked, shown in ((0.12, 0.12), (0.0, 0.05), (0.3, 0.12)):
        caplog.clear()
        first, runs = nearest_runs(results, asked, "union")
        assert (first.protocol["sparsity"], first.protocol["budget"]) == (shown, "union")
        assert [run.protocol["sparsity"] for run in runs] == [shown] * 2
        said = f"no run was recorded at sparsity {asked:g} (but 0.05, 0.12)"
        assert (said in caplog.text) == (asked != shown)
    with pytest.raises(ValueError, match=r"sparsity is 12, expected a share from 0 to 1"):
        nearest_runs(results, 12, "union")
    with pytest.raises(ValueError, match="no run of BitStack with budget 'union'"):
        nearest_runs(results[:2], 0.12, "union")


# Functions of the first cells ------------------------------------------------------------------


def test_preset_is_chosen_by_the_environment(monkeypatch):
    for name in PRESETS:
        monkeypatch.setenv("BITSTACK_PRESET", name)
        assert default_preset() == name
        assert f"preset    {name} " in describe()
    monkeypatch.delenv("BITSTACK_PRESET")
    assert default_preset() == ("published" if torch.cuda.is_available() else "smoke")
    monkeypatch.setenv("BITSTACK_PRESET", "fast")
    with pytest.raises(ValueError, match=f"'fast', expected one of {', '.join(PRESETS)}"):
        default_preset()


def test_a_missing_package_is_named(monkeypatch):
    assert to_install() == ""
    monkeypatch.setattr(first_cell, "find_spec", lambda name: name != "peft")
    assert to_install().split()[:2] == ["peft", f"torch=={torch.__version__}"]
    with pytest.raises(ImportError, match=r"missing: peft\. Install"):
        describe()


def test_a_report_passes_only_if_every_check_does():
    assert report({"one": True, "two": True}).endswith("\nPASS: all checks passed")
    assert "FAIL  two" in (failed := report({"one": True, "two": False}))
    assert failed.endswith("\nFAIL: 1 of 2 checks failed")


def test_durations_are_in_words():
    said = [duration(seconds) for seconds in (0.4, 42, 185, 4800, 3 * 3600 + 60)]
    assert said == ["0 s", "42 s", "3 min", "80 min", "3 h 1 min"]


def test_a_folder_on_drive_is_mounted_first(tmp_path, monkeypatch):
    """Off Colab that fails, and no folder is made in its place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("~/new/runs") == tmp_path / "new" / "runs"
    assert (tmp_path / "new" / "runs").is_dir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drive").symlink_to("/content/drive")
    whole = "/content/drive/MyDrive/bitstack"
    for path in (whole, os.path.relpath(whole), "drive/MyDrive/bitstack"):
        with pytest.raises(ImportError):
            output_folder(path)
    assert not Path("/content/drive").exists()
