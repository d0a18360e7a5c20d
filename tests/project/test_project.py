"""What holds the project together: README, CI, recorded results, and a light import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from bitstack_nb import BitStack
from bitstack_nb.cost.report import CostReport, cost_table
from bitstack_nb.data.backbones import collate, encode, load_backbone
from bitstack_nb.figures.reports import summary
from bitstack_nb.results.result import load_results
from bitstack_nb.results.tables import format_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```sh\n(pip install .*unittest.*)\n```", README)
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text()


def test_every_test_that_the_readmes_faults_name_is_there():
    named = re.findall(r"^\|.*\| `(test_\w+\.py)::(\w+)` \|$", README, re.M)
    rows = README.split("## What it survives")[1].split("## Limits")[0].count("\n|") - 2
    assert len(named) == rows > 0
    for file, name in named:
        text = (ROOT / "tests" / file).read_text()
        assert re.search(rf"def {name}\(|^{name}\b.* = ", text, re.M), (file, name)


def test_the_readmes_ten_lines_work(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(from bitstack_nb import BitStack\n.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if line]) <= 12
    scope = readme_scope(folders, tmp_path)
    exec(code, scope)
    assert scope["stack"].stats()["locked"] > 0
    assert scope["stack"].verify() == 0
    assert BitStack.load("masks.safetensors", scope["model"]).stats() == scope["stack"].stats()


def test_the_readmes_recall_works(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n([^`]*mode=\"recall\".*?)```", README, re.S)[1]
    scope = readme_scope(folders, tmp_path)
    exec(code, scope)
    stack, plain = scope["stack"], type(scope["model"]).from_pretrained("task-0")
    assert stack.verify() == 0
    with stack.recall(0) as model:
        for name, value in model.state_dict().items():
            assert torch.equal(plain.state_dict()[name], value)


def readme_scope(folders, tmp_path) -> dict:
    """What the README's examples take as given."""
    backbone = load_backbone(str(folders["bert"]), max_length=16, seed=0)
    tasks = {
        f"task_{number}": encode(Dataset.from_dict({"text": texts, "label": labels}), backbone)
        for number, (texts, labels) in enumerate(
            [
                (["red sun", "blue moon"] * 8, [0, 1] * 8),
                (["rain", "snow", "wind"] * 8, [0, 1, 2] * 8),
            ],
            start=1,
        )
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    make_batch = collate(backbone)
    batches = list(DataLoader(tasks["task_1"], batch_size=8, collate_fn=make_batch))
    return {
        "BitStack": BitStack,
        "DataLoader": DataLoader,
        "Trainer": Trainer,
        "torch": torch,
        "model": backbone.model,
        "base_model": load_backbone(str(folders["bert"]), max_length=16, seed=0).model,
        "args": arguments,
        "collate": make_batch,
        "loader_1": batches,
        "batch": batches[0],
        **tasks,
    }


COSTS = sorted(ROOT.glob("results/cost/*.json"))


@pytest.mark.parametrize("file", COSTS, ids=lambda f: f.name)
def test_the_readme_shows_the_costs_as_they_were_recorded(file):
    report = CostReport.load(file)
    assert {*report.provenance} == {"costs", "growth"}
    for origin in report.provenance.values():
        assert origin["git"]["dirty"] is False
        assert "python -m bitstack_nb cost" in origin["command"]
    assert format_table(cost_table(report).round(3)) in README


COMPARED = ["evidence", "twenty/all-tests", "twenty/200-tests"]


@pytest.mark.parametrize("folder", COMPARED)
def test_the_readme_shows_the_comparison_as_it_was_recorded(folder):
    results = load_results(ROOT / "results" / folder)
    assert format_table(summary(results)) in README


@pytest.mark.parametrize("module", ["bitstack_nb", "bitstack_nb.results.tables"])
def test_method_and_tables_import_neither_transformers_nor_data_libraries(module):
    code = (
        f"import sys, bitstack_nb, {module}; bitstack_nb.BitStack\n"
        "print([m for m in ('transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
