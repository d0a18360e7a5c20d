"""What is recorded in ``results/``: it says what was run, and keeps what it claims."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bitstack_nb import Protocol, load_results
from bitstack_nb.benchmark.banks import accuracy_table
from bitstack_nb.data.tasks import SEQUENCES
from bitstack_nb.figures import summary
from bitstack_nb.results import contrasts, format_table, frame, readable
from bitstack_nb.results.packed import RUNS
from bitstack_nb.results.significance import holm
from bitstack_nb.results.tables import markdown

RESULTS = Path(__file__).resolve().parents[2] / "results"
HERE = Path(__file__).parent
FOLDERS = sorted(file.parent for file in RESULTS.rglob(RUNS))


@pytest.fixture(scope="module")
def recorded():
    return {folder: load_results(folder) for folder in FOLDERS}


def test_each_run_says_what_was_run(recorded):
    assert sum(map(len, recorded.values())) >= 679
    for folder, results in recorded.items():
        names = [json.loads(line)["name"] for line in (folder / RUNS).open()]
        assert len({*names}) == len(names)
        for name, result in zip(names, results, strict=True):
            assert Protocol.from_dict(result.protocol).name == name
            origin = result.provenance
            assert origin["git"]["dirty"] is False, name
            assert "python -m bitstack_nb run" in origin["command"], name
            samples = [data["sample"] for data in origin["data"].values()]
            assert all(len(digest) == 64 for own in samples for digest in own.values()), name


def test_exact_recall_has_forgotten_nothing(recorded):
    results = [result for found in recorded.values() for result in found]
    recalled = [result for result in results if result.protocol["strategy"] == "recall"]
    assert len(recalled) > 200
    for result in recalled:
        for task in range(len(result.matrix)):
            assert len({row[task] for row in result.matrix[task:]}) == 1


def test_held_out_texts_and_test_texts_lie_in_different_folders(recorded):
    for folder, results in recorded.items():
        split = {result.protocol["evaluate_on"] for result in results}
        tuning = folder.parent.name == "tuning" and folder.name != "other-rates"
        assert split == ({"heldout"} if tuning else {"test"}), folder


@pytest.mark.parametrize("file", sorted(HERE.glob("*.json")), ids=lambda file: file.name)
def test_packed_runs_equal_the_json_they_were_made_of(file):
    """Two of the 679 runs whose own JSON is kept, one with locks and recorded importance."""
    (folder,) = [f for f in FOLDERS if f'"name": "{file.stem}"' in (f / RUNS).read_text()]
    names = [json.loads(line)["name"] for line in (folder / RUNS).open()]
    packed = load_results(folder)[names.index(file.stem)]
    (own,) = load_results(file)
    for name, value in asdict(own).items():
        assert json.dumps(getattr(packed, name)) == json.dumps(value), name


def test_the_page_shows_the_comparisons_and_counts_the_runs_as_recorded(recorded):
    page = (RESULTS / "README.md").read_text()
    for folder in ("mixed", "five-small"):
        assert format_table(summary(recorded[RESULTS / folder])) in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    for folder, results in recorded.items():
        name = f"`{folder.relative_to(RESULTS)}`"
        (row,) = [row for row in rows if row and name in row[0].split(", ")]
        assert int(row[2].split(", ")[row[0].split(", ").index(name)]) == len(results)


def test_mixed_holds_the_four_tasks_that_need_a_trained_backbone_most(recorded):
    runs = frame(recorded[RESULTS / "tuning" / "mixed-tasks"])
    runs["task"] = [result.protocol["tasks"][0]["name"] for result in runs["result"]]
    means = runs.pivot_table("average_accuracy", "task", "strategy")
    means["gap"] = means["single"] - means["probe"]
    chosen = means[means["gap"] >= 3].nlargest(4, "gap").index
    assert {task.name for task in SEQUENCES["mixed"]} == {*chosen}
    page = (RESULTS / "README.md").read_text()
    for task, row in means.iterrows():
        assert f"| {task} | {row['probe']:.1f} | {row['single']:.1f} | {row['gap']:.1f} |" in page


def test_the_page_has_the_tests_that_were_named_beforehand(recorded):
    page, runs = (RESULTS / "README.md").read_text(), recorded[RESULTS / "mixed"]
    bitstack, fresh = ({"strategy": "bitstack", "budget": name} for name in ("union", "fresh"))
    own = {share: {"strategy": "recall", "sparsity": share / 100} for share in (0.1, 1, 5)}
    rivals = {"LoRA": "lora", "SHiRA": "shira", "linear probe": "probe", "replay": "replay"}
    rivals |= {"BitDelta": "bitdelta"}
    locking = {
        "BitStack − fine-tuning": (bitstack, "finetune"),
        "BitStack − random mask": (bitstack, "random-mask"),
    }
    accuracy = locking | {"`fresh` − `union`": (fresh, bitstack)}
    accuracy |= {f"exact recall, 1 % − {name}": (own[1], other) for name, other in rivals.items()}
    same = {f"exact recall, {share:g} %": (which, "single") for share, which in own.items()}
    same |= {name: (rivals[name], "single") for name in ("LoRA", "SHiRA", "BitDelta")}
    for table in (
        contrasts(runs, accuracy),
        contrasts(runs, locking, column="forgetting"),
        contrasts(runs, same, margin=1.5),
    ):
        assert markdown(readable(table)) in page
    assert f"p-value is {table['p_equivalence_holm'][1]:.3f}" in " ".join(page.split())


def test_a_random_mask_of_mixed_has_exactly_bitstacks_size(recorded):
    runs = [run for run in recorded[RESULTS / "mixed"] if run.protocol.get("budget") == "union"]
    locked = {}
    for run in runs:
        sizes = [stats["locked"] for stats in run.lock_stats]
        locked.setdefault(run.protocol["seed"], {})[run.protocol["strategy"]] = sizes
    assert len(locked) == 5
    assert all(sizes["random-mask"] == sizes["bitstack"] for sizes in locked.values())


def test_the_pages_say_how_banks_choose_tasks_as_measured():
    banks = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("bank/*.json"))]
    table = accuracy_table(banks)
    assert format_table(table) in (RESULTS / "README.md").read_text()
    average = readable(table).iloc[-1]
    readme = (RESULTS.parent / "README.md").read_text()
    for page in (readme, (RESULTS.parent / "docs" / "bank.md").read_text()):
        assert all(average[column] in page for column in ("known", "chosen", "routed"))


def test_the_page_says_which_contrasts_stand_after_holm(recorded):
    small, twenty = recorded[RESULTS / "five-small"], recorded[RESULTS / "twenty" / "all-tests"]
    one, five = (
        {"strategy": "recall", "sparsity": share, "importance": "random"} for share in (0.01, 0.05)
    )
    compared = ("replay", "lora", one, five, "finetune", "bitstack")
    separate = {str(at): (method, "single") for at, method in enumerate(compared)}
    plain, mask = {"a": ("bitstack", "finetune")}, {"b": ("bitstack", "random-mask")}
    tables = [
        contrasts(small, separate | plain | mask, margin=1.5),
        contrasts(small, plain | mask, column="forgetting"),
        contrasts(small, plain | mask, column="learning_accuracy"),
        contrasts(twenty, {"twenty": ("recall", "single")}),
    ]
    p = holm(value for table in tables for value in table["p"])
    assert len(p) == 13 and sum(value < 0.05 for value in p) == 4
    page = " ".join((RESULTS / "README.md").read_text().split())
    assert f"Fine-tuning ({p[4]:.4f}) and BitStack ({p[5]:.3f}) end below" in page
    assert f"forgets more ({p[8]:.3f}) and learns more ({p[10]:.3f}) than fine-tuning" in page
    same = holm(tables[0]["p_equivalence"][:4])
    assert f"with 1 % own weights ({same[2]:.3f})" in page and same[2] < 0.05
    assert f"for replay ({same[0]:.3f} each) and for LoRA ({same[1]:.2f})" in page
    assert f"{same[3]:.3f}" == f"{same[0]:.3f}"


def test_published_numbers_name_their_source():
    for result in load_results(RESULTS / "published"):
        assert result.provenance["published"]
