"""Imports point one way, notebooks import faces only, and what is light stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from notebook_files import FOLDER, NOTEBOOKS, SOLUTIONS, code_cells, read

ROOT = FOLDER.parent
PACKAGE = ROOT / "bitstack_nb"
# The rooms that each room may import; the method, bitstack_nb/*.py, is the room "".
MAY_IMPORT = {
    "": [],
    "results": [""],
    "data": [""],
    "benchmark": ["", "data", "results"],
    "figures": ["", "data", "results", "benchmark"],
    "notebook": ["", "data", "results", "benchmark", "figures"],
    "cost": ["", "data", "results", "benchmark", "figures"],
    "cli": ["", "data", "results", "benchmark", "figures", "notebook", "cost"],
}
# pyproject's dependencies.
BASE = {"torch", "numpy", "safetensors", "transformers", "accelerate", "huggingface_hub"}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def imported(tree: ast.AST) -> Iterator[str]:
    """All modules, and names of modules, that the code imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_once(file: Path) -> set[str]:
    """Modules that are imported with the file: not in a function, nor for type checkers."""
    body = ast.parse(file.read_text()).body
    statements = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {*imported(ast.Module(statements, []))}


def room(module: str) -> str:
    name = [*module.split("."), ""][1]
    return "cli" if name in ("__main__", "cli_bank") else name if name in MAY_IMPORT else ""


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name):
    allowed = {name, *MAY_IMPORT[name]}
    for module, file in MODULES.items():
        if room(module) == name:
            found = {m for m in imported(ast.parse(file.read_text())) if m.startswith(PACKAGE.name)}
            assert [m for m in sorted(found) if room(m) not in allowed] == [], file


def test_no_modules_import_each_other():
    graph = {module: imported_at_once(file) & {*MODULES} for module, file in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_the_method_needs_the_base_dependencies_and_results_not_even_torch():
    for module, file in MODULES.items():
        everywhere = {m.split(".")[0] for m in imported(ast.parse(file.read_text()))}
        if room(module) == "":  # pandas: layer_table alone; triton comes with torch for GPUs
            known = {*sys.stdlib_module_names, *BASE, PACKAGE.name, "pandas", "triton"}
            assert everywhere <= known, file
        if room(module) == "results":
            at_once = {m.split(".")[0] for m in imported_at_once(file)}
            assert not at_once & {"torch", "transformers", "datasets"}, file


@pytest.mark.parametrize("file", NOTEBOOKS + SOLUTIONS, ids=lambda file: file.stem)
def test_notebooks_import_faces_only(file):
    for cell in code_cells(read(file)):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE.name):
                face = import_module(node.module)
                assert Path(face.__file__).name == "__init__.py", node.module
                names = [alias.name for alias in node.names if alias.name not in MAY_IMPORT]
                assert [name for name in names if name not in face.__all__] == [], node.module
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith(PACKAGE.name) for alias in node.names)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from bitstack_nb.cli import main\n"
        "for arguments in (['--help'], ['run', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pandas', 'matplotlib', 'joblib'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    said = python(code)
    assert "--learning-rate" in said
    assert said.splitlines()[-1] == "[]"


def test_the_method_works_without_the_notebooks_packages():
    """And without transformers; layer_table and the benchmark say which package to install."""
    code = (
        "import sys\n"
        "for name in ('pandas', 'datasets', 'matplotlib', 'joblib', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "import torch, bitstack_nb\n"
        "stack = bitstack_nb.BitStack(torch.nn.Linear(2, 2), 0.5, exclude=[])\n"
        "print('transformers' in sys.modules)\n"
        "for use in (stack.layer_table, lambda: bitstack_nb.run):\n"
        "    try: use()\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    transformers, table, run = python(code).splitlines()
    assert transformers == "False"
    assert table == "layer_table needs pandas: pip install pandas"
    assert run.startswith("bitstack_nb.run needs the package") and "[notebooks]" in run
