"""The pages tell the truth: commands, code, tables, findings, names of tests, links."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from bitstack_nb.cli import parser
from bitstack_nb.cost import CostReport, bank_table, cost_table
from bitstack_nb.data.backbones import load_backbone
from bitstack_nb.figures import mechanism
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.result import load_results
from bitstack_nb.results.tables import format_table, markdown

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("results/README.md")]
RESULTS = (ROOT / "results" / "README.md").read_text()
EVIDENCE, EASY = "mixed", "five-small"
OTHER_RATES = "tuning/other-rates"
TWENTY = "twenty/all-tests"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```sh\n(pip install .*unittest.*)\n```", README)
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page):
    for target in re.findall(r'(?:\]\(|src=")([^)"#]+)', page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_command_line_understands_every_command_of_a_page(page):
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            _, _, arguments = line.partition("python -m bitstack_nb ")
            words = shlex.split(arguments, comments=True)
            if words and "--help" not in words:
                parser().parse_args(words)


def test_every_test_named_for_a_fault_is_there():
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and "---" not in line]
    named = [re.search(r"<br>`([\w/]+\.py)::(\w+)` \|$", row) for row in rows]
    found = [match for match in named if match]
    assert len(found) == len(rows) - sum(row.startswith("| fault") for row in rows) >= 22
    for match in found:
        text = (ROOT / "tests" / match[1]).read_text()
        assert re.search(rf"def {match[2]}\(|^{match[2]}\b.* = ", text, re.M), match[0]


# Numbers ------------------------------------------------------------------------------------------


recorded = cache(lambda folder: load_results(ROOT / "results" / folder))


def runs(folder: str, strategy: str, **settings) -> dict[int, object]:
    """Recorded runs of one configuration, by seed."""
    wanted = {"strategy": strategy, **settings}.items()
    return {
        run.protocol["seed"]: run
        for run in recorded(folder)
        if all(run.protocol.get(name) == value for name, value in wanted)
    }


def shown(values) -> str:
    mean, half = mean_interval(list(values))
    return f"{mean:.1f} ± {half:.1f}"


def differences(own, others, metric="average_accuracy") -> list[float]:
    assert own.keys() == others.keys()
    return [run.metrics[metric] - others[seed].metrics[metric] for seed, run in own.items()]


METHODS = {
    "linear probe": ("probe", {}),
    "fine-tuning": ("finetune", {}),
    "replay": ("replay", {}),
    "BitStack, 12 %": ("bitstack", {"sparsity": 0.12, "budget": "union"}),
    "LoRA, rank 8": ("lora", {"rank": 8}),
    "SHiRA, 1 %": ("shira", {"sparsity": 0.01}),
    "exact recall, 1 %": ("recall", {"sparsity": 0.01}),
    "BitDelta": ("bitdelta", {}),
    "separate models": ("single", {}),
}


def test_the_lead_table_is_what_was_recorded():
    lines = re.findall(r"^\| (.*) \|$", README.split("## Notebooks")[0], re.M)[2:]
    separate, expected = runs(EVIDENCE, "single"), []
    for label, (strategy, settings) in METHODS.items():
        own = runs(EVIDENCE, strategy, **settings)
        assert len(own) == 5
        accuracy = shown(run.metrics["average_accuracy"] for run in own.values())
        forgotten = shown(run.metrics["forgetting"] for run in own.values())
        minus = "–" if strategy == "single" else shown(differences(own, separate))
        expected.append([label, accuracy, forgotten, kept(own[0]), minus])
    assert [[cell.strip() for cell in line.split("|")] for line in lines] == expected


def kept(run) -> str:
    size = run.storage["bytes"] / len(run.protocol["tasks"])
    return f"{size / 1e6:.2g} MB" if size > 1e5 else f"{size / 1e3:.0f} kB" if size else "nothing"


BIT = METHODS["BitStack, 12 %"]
ONE, FIVE = (("recall", {"sparsity": share}) for share in (0.01, 0.05))
SINGLE, PLAIN, MASK = ((name, {}) for name in ("single", "finetune", "random-mask"))
FINDINGS = [
    ("forgets {} points less than fine-tuning", EVIDENCE, PLAIN, BIT, "forgetting"),
    ("and {} less than a random mask", EVIDENCE, MASK, BIT, "forgetting"),
    ("ends {} above fine-tuning", EVIDENCE, BIT, PLAIN, "average_accuracy"),
    ("and {} above the random mask", EVIDENCE, BIT, MASK, "average_accuracy"),
    ("per task) it ends {} above separate", EVIDENCE, FIVE, SINGLE, "average_accuracy"),
    ("With 1 % it ends {} below", EVIDENCE, SINGLE, ONE, "average_accuracy"),
    ("with 1 % ends {} below SHiRA", EVIDENCE, ("shira", {}), ONE, "average_accuracy"),
    ("ends {} above LoRA", EVIDENCE, ONE, ("lora", {}), "average_accuracy"),
    ("and {} above replay", EVIDENCE, ONE, ("replay", {}), "average_accuracy"),
    ("ends {} points above separate", EASY, ("probe", {}), SINGLE, "average_accuracy"),
    ("ends {} above twenty", TWENTY, FIVE, SINGLE, "average_accuracy"),
]


def test_at_bitstacks_rate_fine_tuning_is_behind_and_forgets_more():
    plain = runs(OTHER_RATES, "finetune", learning_rate=3e-5)
    ahead = shown(differences(runs(EASY, "bitstack"), plain))
    less = shown(differences(plain, runs(EASY, "bitstack"), "forgetting"))
    text = " ".join(RESULTS.split())
    assert f"BitStack is then {ahead} points ahead" in text
    assert f"forgets {less} points less" in text


def test_the_readme_says_how_much_forgetting_falls():
    plain, ours = (
        shown(run.metrics["forgetting"] for run in runs(EVIDENCE, name, **settings).values())
        for name, settings in (PLAIN, BIT)
    )
    assert f"falls from {plain} to {ours} points" in " ".join(README.split())


@pytest.mark.parametrize(("sentence", "folder", "one", "other", "metric"), FINDINGS)
def test_a_finding_is_what_was_recorded(sentence, folder, one, other, metric):
    own, others = (runs(folder, name, **settings) for name, settings in (one, other))
    text = " ".join(README.split())
    assert sentence.format(shown(differences(own, others, metric))) in text


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/cost/*.json")), ids=lambda f: f.name)
def test_the_costs_are_shown_as_they_were_recorded(file):
    report = CostReport.load(file)
    assert {*report.provenance} - {"recall", "bank"} == {"costs", "growth"}
    for origin in report.provenance.values():
        assert origin["git"]["dirty"] is False
        assert "python -m bitstack_nb cost" in origin["command"]
    page = (ROOT / "docs" / "cost.md").read_text()
    assert format_table(cost_table(report).round(3)) in page
    if report.bank:
        assert markdown(bank_table(report)) in page
    ratio = f"takes {report.costs['training step']['value']:.2f} times"
    assert ratio.removeprefix("takes ") in README


BESIDE_PEFT = [
    "weights of a task without head, thousands",
    "file of a task with head, kB",
    "pass of one text / plain pass",
    "3 texts of 3 tasks / plain pass",
    "switch to a task, ms",
    "old answers after other tasks: same bits",
    "loads heads of 2, 4 and 14 labels by itself",
]


def test_the_table_beside_peft_is_what_was_recorded():
    table = bank_table(CostReport.load(ROOT / "results" / "cost" / "cpu.json"))
    assert markdown(table[table[""].isin(BESIDE_PEFT)]) in README


def test_the_picture_shows_both_methods():
    titles = [ax.get_title(loc="left") for ax in mechanism().axes]
    assert [titles[0].split(":")[0], titles[3].split(":")[0]] == ["BitStack", "Exact recall"]


# Code ---------------------------------------------------------------------------------------------


def code(page: str, heading: str) -> str:
    """The Python code below a heading of a page."""
    text = (ROOT / page).read_text().split(f"## {heading}")[1]
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


USERS = [
    ("README.md", "For a student"),
    ("README.md", "For an engineer"),
    ("README.md", "For a researcher"),
    ("README.md", "The guarantee"),
    ("docs/bank.md", "With your own training loop"),
    ("docs/bank.md", "A classifier that is already fine-tuned"),
]


@pytest.mark.parametrize(("page", "user"), USERS)
def test_the_code_of_a_page_runs(page, user, given, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    exec(code(page, user).replace("distilbert-base-uncased", given["backbone"]), given)


def test_a_task_of_ones_own_makes_a_protocol():
    scope = {}
    exec(code("docs/benchmark.md", "From Python").split("result =")[0], scope)  # run needs the Hub
    assert scope["protocol"].tasks[-1].name == "mine"


@pytest.fixture
def given(folders, tmp_path) -> dict:
    """The names that the README's examples take as given; the datasets keep their text column."""
    backbone = load_backbone(str(folders["bert"]), max_length=16, seed=0)
    texts = {
        "reviews": (["red sun", "blue moon"] * 8, [0, 1] * 8),
        "news": (["rain", "snow", "wind"] * 8, [0, 1, 2] * 8),
    }
    tokenize = lambda row: backbone.tokenizer(row["text"])  # noqa: E731
    data = {
        name: Dataset.from_dict({"text": text, "label": labels}).map(tokenize)
        for name, (text, labels) in texts.items()
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    make_batch = DataCollatorWithPadding(backbone.tokenizer)
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(tmp_path / "my-classifier")
    rows = data["reviews"].remove_columns("text")
    return {
        "backbone": str(folders["bert"]),
        "Trainer": Trainer,
        "torch": torch,
        "model": backbone.model,
        "base_model": load_backbone(str(folders["bert"]), max_length=16, seed=0).model,
        "args": arguments,
        "collate": make_batch,
        "batch": make_batch(rows.to_list()),
        "held_out": data["reviews"],
        "texts": data["reviews"]["text"],
        "train": data["news"],
        **data,
    }
