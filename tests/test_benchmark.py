"""The task sequence end to end on the embedded tasks: matrix, locks, resuming, provenance."""

import json
import random
from dataclasses import replace

import numpy
import pytest
import torch

from bitstack_nb import Protocol, Result, Task, benchmark, load_results, run
from bitstack_nb.training import accuracy

# Small enough for seconds, large enough that every stage trains and locks something.
SMALL = Protocol(
    tasks=("imdb", "ag_news", "dbpedia"), train_size=64, test_size=56, max_length=24, epochs=1
)
STRATEGIES = {
    "finetune": SMALL,
    "bitstack": SMALL.with_strategy("bitstack", budget="fresh"),
    "joint": SMALL.with_strategy("joint"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(protocol, output=folder) for name, protocol in STRATEGIES.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matrix_is_measured_where_it_can_be(results, strategy):
    rows = (2,) if strategy == "joint" else (0, 1, 2)
    matrix = results[strategy].matrix
    for trained in range(3):
        for task in range(3):
            measured = trained in rows and task <= trained
            assert (matrix[trained][task] is not None) == measured
    assert all(0 <= a <= 100 for row in matrix for a in row if a is not None)


def test_joint_learns_every_task_under_its_own_head(results):
    # Untrained heads would sit at chance, which is 50, 25 and 7 percent here.
    final = results["joint"].matrix[-1]
    assert results["joint"].metrics["average_accuracy"] == pytest.approx(sum(final) / 3)
    assert results["joint"].metrics["forgetting"] is None
    longer = replace(SMALL.with_strategy("joint"), tasks=SMALL.tasks[:2], train_size=256, epochs=4)
    assert longer.name != STRATEGIES["joint"].name


def test_locks_follow_the_budget(results):
    stats = results["bitstack"].lock_stats
    eligible = stats[0]["eligible"]
    assert [s["locked"] for s in stats] == sorted(s["locked"] for s in stats)
    # fresh: every task locks its own share, ties aside.
    assert stats[-1]["locked"] == pytest.approx(3 * 0.12 * eligible, rel=0.01)
    last = [row for row in results["bitstack"].locks if row["task"] == 3]
    assert sum(row["locked"] for row in last) == stats[-1]["locked"]
    assert results["finetune"].lock_stats == results["finetune"].locks == []


def test_result_says_where_it_comes_from(results):
    result = results["bitstack"]
    assert Protocol.from_dict(result.protocol) == STRATEGIES["bitstack"]
    origin = result.provenance
    assert origin["packages"]["torch"] == torch.__version__
    assert origin["model"]["source"] == "built"
    assert {"imdb", "ag_news", "dbpedia"} == origin["data"].keys()
    assert all(data["synthetic"] for data in origin["data"].values())
    assert len(result.times["train"]) == len(result.times["update"]) == 3


def test_finished_runs_are_not_repeated(tmp_path):
    protocol = replace(SMALL, tasks=SMALL.tasks[:1], train_size=16)
    first = run(protocol, output=tmp_path)
    path = tmp_path / f"{protocol.name}.json"
    written = path.stat().st_mtime_ns
    assert run(protocol, output=tmp_path) == first == load_results(tmp_path)[0]
    assert path.stat().st_mtime_ns == written
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_killed_run_ends_like_an_unbroken_one(results, tmp_path, monkeypatch, strategy, where):
    protocol = STRATEGIES[strategy]
    calls = {"training": 0, "evaluation": 0}

    def dying(what, real, last):
        def call(*args, **kwargs):
            calls[what] += 1
            if where == what and calls[what] == last:
                raise Killed
            return real(*args, **kwargs)

        return call

    # Joint training has one stage only: there it dies in the last evaluation.
    last = {"training": 1 if strategy == "joint" else 3, "evaluation": 3}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(benchmark, "train", dying("training", benchmark.train, last["training"]))
        patch.setattr(benchmark, "accuracy", dying("evaluation", accuracy, last["evaluation"]))
        run(protocol, output=tmp_path)
    assert not list(tmp_path.glob("*.json"))
    torch.manual_seed(12345)  # the new process starts from another state
    resumed = run(protocol, output=tmp_path)
    assert resumed.matrix == results[strategy].matrix
    assert resumed.locks == results[strategy].locks
    assert [item.name for item in tmp_path.iterdir()] == [f"{protocol.name}.json"]


def test_half_written_checkpoint_is_passed_over(results, tmp_path, monkeypatch):
    real = benchmark.save_file

    def cut_short(tensors, path, *args):
        real(tensors, path, *args)
        if "stage-2" in str(path):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(benchmark, "save_file", cut_short)
        run(SMALL, output=tmp_path)
    assert run(SMALL, output=tmp_path).matrix == results["finetune"].matrix


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    expected = torch.rand(1), numpy.random.rand(), random.random()
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    run(replace(SMALL, tasks=SMALL.tasks[:1], train_size=16), output=tmp_path)
    assert (torch.rand(1), numpy.random.rand(), random.random()) == expected


def test_own_task_and_order_of_seeds(tmp_path):
    own = Task(
        name="own", dataset="me/imdb", text=("text",), label="label", num_labels=2, relabel=(1, 0)
    )
    protocol = replace(SMALL, tasks=(own,), train_size=16, model="tiny-gpt2")
    with pytest.raises(ValueError, match="embedded"):
        run(protocol, output=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_names_depend_on_what_matters():
    assert SMALL.name == replace(SMALL, sparsity=0.5, budget="fresh").name
    union, fresh = (SMALL.with_strategy("bitstack", budget=b) for b in ("union", "fresh"))
    names = {
        p.name for p in (SMALL, union, fresh, replace(union, seed=1), replace(union, epochs=3))
    }
    assert len(names) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "magic"}, "magic.*finetune"),
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("imdb", "imdb")}, "imdb"),
        ({"tasks": ("imbd",)}, "imbd.*ag_news"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"data": "hub"}, "tiny-gpt2.*pretrained"),
    ],
)
def test_bad_protocols_say_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_no_gpu_where_one_is_asked_for(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU"):
        run(SMALL, output=tmp_path, device="cuda")


def test_results_round_trip(results, tmp_path):
    path = tmp_path / "result.json"
    results["bitstack"].save(path)
    assert Result.load(path) == results["bitstack"]
    json.loads(path.read_text())
