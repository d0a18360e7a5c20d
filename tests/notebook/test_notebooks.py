"""The notebook files have the same frame and no leftovers; the first cells' functions work."""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import toy_results
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert import ScriptExporter
from notebook_files import (
    FOLDER,
    HIDDEN,
    NOTEBOOKS,
    ROOT,
    SOLUTIONS,
    WIDGET,
    code_cells,
    metadata,
    read,
    repository,
    set_repository,
)

from bitstack_nb.benchmark import PRESETS, default_preset
from bitstack_nb.notebook import (
    describe,
    duration,
    first_cell,
    nearest_runs,
    output_folder,
    plan,
    planning,
    report,
    several,
    three_texts,
    to_install,
)

REPOSITORY = repository()
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
MOST_WORDS, MOST_COLUMNS = 700, 8
LARGEST = 1_000_000  # bytes; GitHub shows no notebook that is much larger
# A path of the machine that ran it, or the address of an object.
ACCIDENT = r"(?:/(?:home|root|tmp|work|content|Users)/|[A-Z]:\\)\S*|0x[0-9a-fA-F]{6,}"

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
each_file = pytest.mark.parametrize("file", NOTEBOOKS + SOLUTIONS, ids=lambda file: file.stem)


def test_they_are_numbered_and_share_the_first_code_cell():
    numbers = [file.stem.partition("_")[0] for file in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)  # 02b goes with 02
    main = [number for number in numbers if number.isdecimal()]
    assert main == [f"{number:02}" for number in range(1, len(main) + 1)]
    (first,) = {code_cells(read(file))[0].source for file in NOTEBOOKS + SOLUTIONS}
    assert first.startswith("# @title ") and "git clone --quiet --depth 1 " in first
    assert re.findall(r"https://[^\"]+", first) == [REPOSITORY]


def test_one_command_points_all_badges_to_another_repository(tmp_path):
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "notebooks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    set_repository("me/mine.2", tmp_path)
    assert repository(tmp_path) == "https://github.com/me/mine.2"
    owner = REPOSITORY.removeprefix("https://github.com/")
    for file in (file for file in tmp_path.rglob("*.*") if file.is_file()):
        text = file.read_text()
        assert owner not in text and ("github" not in text or "me/mine.2" in text), file
    with pytest.raises(SystemExit, match="'mine', expected OWNER/REPO"):
        set_repository("mine", tmp_path)


@each_file
def test_title_and_badge_open_this_file_in_the_projects_repository(file):
    owner = REPOSITORY.removeprefix("https://github.com/")
    path = file.relative_to(FOLDER.parent).as_posix()
    address = f"https://colab.research.google.com/github/{owner}/blob/main/{path}"
    title = read(file).cells[0]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert f"[![Open in Colab]({BADGE})]({address})" in title.source


@each_notebook
def test_a_lesson_says_in_short_what_it_shows_and_ends_with_exercises(file):
    cells = read(file).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert sum(len(text.split()) for text in prose) <= MOST_WORDS
    bullets = re.findall(r"^- \*\*(.*?)\*\*", prose[0].partition("\n**In short**\n")[2], re.M)
    assert bullets == ["You will see", "It means", "It costs"]
    assert "](../docs/glossary.md)" in prose[0]
    exercises = "\n".join(["", *prose]).partition("\n## Exercises\n")[2]
    assert "predict, then run" in exercises.lower() and "\n1. " in exercises
    solution = FOLDER / "solutions" / f"{file.stem.partition('_')[0]}_solution.ipynb"
    assert f"](solutions/{solution.name})" in exercises and solution in SOLUTIONS


@each_notebook
def test_tables_fit(file):
    for output in (output for cell in code_cells(read(file)) for output in cell.outputs):
        for table in output.get("data", {}).get("text/html", "").split("<table")[1:]:
            head = table.partition("</tr>")[0]
            assert head.count("<th>") <= 1 + MOST_COLUMNS  # one for the rows' names


@each_file
def test_cells_have_stable_ids(file):
    ids = [cell.id for cell in read(file).cells]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z]{3,}(-[a-z0-9]+)*", name)] == []


@each_notebook
def test_the_second_code_cell_holds_the_parameters(file):
    tags = [cell.metadata.get("tags", []) for cell in code_cells(read(file))]
    assert [number for number, found in enumerate(tags) if "parameters" in found] == [1]


@each_notebook
def test_no_parameter_is_made_of_another_one(file):
    """papermill replaces one parameter, and what was made of it would stay as it was."""
    nodes = ast.walk(ast.parse(code_cells(read(file))[1].source))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    given = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    assert given & {name.id for name in names if isinstance(name.ctx, ast.Load)} == set()


@each_file
def test_metadata_is_ours_alone(file):
    """No widget state (GitHub refuses it), no timings, no skipped cells, no other kernel."""
    notebook = read(file)
    assert notebook.metadata == metadata(file)
    setup = code_cells(notebook)[0]
    assert setup.metadata == HIDDEN
    for cell in (cell for cell in notebook.cells if cell is not setup):
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
    monkeypatch.delenv("BITSTACK_PRESET")
    assert default_preset() == ("quick" if torch.cuda.is_available() else "smoke")
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
    assert report({"one": True, "two": True}).endswith("\n\nPASS: all checks passed")
    left_open = report({"one": True, "two": None})
    assert "OPEN  two" in left_open
    assert left_open.endswith("\nOPEN: no check failed, and 1 of 2 could not be decided")
    failed = report({"one": None, "two": False})
    assert "FAIL  two" in failed and failed.endswith("\nFAIL: 1 of 2 checks failed")


def test_the_three_texts_are_forgotten_ones_with_all_answers():
    truth = ["good", "bad", "good"]
    said = {
        "first": {"at first": truth, "later": ["good", "good", "good"]},
        "second": {"at first": ["good", "bad", "bad"], "later": ["bad", "bad", "bad"]},
    }
    lines = three_texts(["one", "the second", "three"], truth, said).splitlines()
    assert [line.split() for line in lines] == [
        ["the", "second"],
        ["the", "label", "is", "bad"],
        ["first", "at", "first:", "bad", "later:", "good", "(wrong)"],
        ["second", "at", "first:", "bad", "later:", "bad"],
        [],
        ["right", "answers", "to", "all", "3", "texts"],
        ["first", "at", "first:", "100%", "later:", "67%"],
        ["second", "at", "first:", "67%", "later:", "33%"],
    ]
    said["first"]["later"] = truth  # nothing is forgotten
    assert three_texts(["one", "the second", "three"], truth, said).startswith("one\n")


def test_durations_are_in_words():
    said = [duration(seconds) for seconds in (0.4, 42, 185, 4800, 3 * 3600 + 60)]
    assert said == ["0 s", "42 s", "3 min", "80 min", "3 h 1 min"]
    ranges = [(42, 42.3), (42, 44), (60, 185), (185, 300), (6000, 9000)]
    said = [duration(*both) for both in ranges]
    assert said == ["42 s", "42 to 44 s", "60 s to 3 min", "3 to 5 min", "1 h 40 min to 2 h 30 min"]


def test_half_an_hour_of_runs_has_to_be_confirmed(tmp_path, monkeypatch):
    protocols = [PRESETS["ci"]]
    monkeypatch.setattr(planning, "estimate", lambda *_, **__: (1500, 1700))
    assert plan(protocols, output=tmp_path) == "1 run, 25 to 28 min from here (estimated)"
    monkeypatch.setattr(planning, "estimate", lambda *_, **__: (1500, 1900))
    said = "2 runs, 25 to 32 min from here (estimated)"
    with pytest.raises(RuntimeError, match=r"RUN = True to start them\.$") as found:
        plan(protocols * 2, output=tmp_path)
    assert str(found.value).startswith(said)
    assert plan(protocols * 2, output=tmp_path, confirmed=True) == said
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    with pytest.raises(RuntimeError, match='Set OUTPUT = "/content/drive/MyDrive/bitstack", too'):
        plan(protocols, output=tmp_path)
    with pytest.raises(RuntimeError, match=r"to start them\.$"):
        plan(protocols, output=planning.DRIVE)


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
