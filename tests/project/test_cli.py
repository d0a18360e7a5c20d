"""The command line: runs from options, what a user sees, and one line for each mistake.

Elsewhere: ``--help`` in test_imports, ``sweep`` in test_sweep, ``figures`` in test_plots.
"""

import os
import subprocess
import sys

import pytest
from toy_results import run

from bitstack_nb import Protocol, load_results
from bitstack_nb.cli import main, parser, protocols
from bitstack_nb.cost import CostReport

FAST = ["--tasks", "imdb,ag_news", "--train-size", "32", "--test-size", "28", "--max-length", "16"]


def asked(*arguments: str) -> list[Protocol]:
    """The protocols that a command line asks for."""
    return protocols(parser().parse_args(arguments))


def settings(found: list[Protocol], *names: str) -> list[tuple]:
    return [tuple(getattr(protocol, name) for name in names) for protocol in found]


def test_the_main_job_in_its_own_process(tmp_path):
    """As in the README, but smaller: five methods, progress, a table, two sentences, the files."""
    done = subprocess.run(
        [sys.executable, "-m", "bitstack_nb", "run", *FAST, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert "synthetic" in done.stdout
    files = sorted(tmp_path.glob("*.json"))
    strategies = ["bitstack", "finetune", "probe", "recall", "single"]
    assert [file.name.partition("-")[0] for file in files] == strategies
    for file in files:
        assert str(file) in done.stdout
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {5}
    shown = ["linear probe", "fine-tuning", "BitStack", "exact recall", "separate models"]
    assert [row[0].strip() for row in rows[2:]] == shown
    assert done.stdout.count("On seed 0 alone, ") == 2


def test_seeds_train_in_their_own_order_and_give_an_interval(tmp_path, capsys):
    options = ["--tasks", "imdb,ag_news,yelp", "--seeds", "0,1,2", "--shuffle-tasks", "--quiet"]
    options += ["--strategy", "bitstack", "--n-batches", "2", "--warmup-steps", "3"]
    assert main(["run", *FAST[2:], *options, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| BitStack") == 1 and "±" in printed
    done = {result.protocol["seed"]: result for result in load_results(tmp_path)}
    orders = {seed: [t["name"] for t in r.protocol["tasks"]] for seed, r in done.items()}
    assert orders[0] == ["imdb", "ag_news", "yelp"]
    assert len(set(map(tuple, orders.values()))) > 1
    again = {seed: Protocol(seed=seed, tasks=orders[0]).shuffled().tasks for seed in orders}
    assert orders == {seed: [task.name for task in tasks] for seed, tasks in again.items()}
    assert {result.protocol["warmup_steps"] for result in done.values()} == {3}


def test_lists_of_values_make_a_run_for_each_combination():
    found = asked("ablation", "--sparsity", "0,0.3", "--budget", "union,fresh", "--epochs", "1,2")
    assert settings(found, "strategy", "epochs", "sparsity", "budget") == [
        ("bitstack", epochs, sparsity, budget)
        for epochs in (1, 2)
        for sparsity in (0, 0.3)
        for budget in ("union", "fresh")
    ]
    assert len(asked("ablation")) == 6


def test_a_setting_of_some_strategies_makes_no_runs_of_the_others():
    found = asked("run", "--strategy", "lora,frozen", "--rank", "1,3", "--sparsity", "0.1,0.2")
    assert settings(found, "strategy", "rank") == [("lora", 1), ("lora", 3), ("frozen", None)]
    found = asked("run", "--strategy", "recall", "--importance", "gradient,random")
    assert settings(found, "importance", "n_batches") == [(None, 32), ("random", None)]


def test_settings_that_are_not_given_are_as_in_the_preset():
    (quick,) = asked("run", "--preset", "quick", "--strategy", "finetune", "--train-size", "0.5")
    assert (quick.model, quick.train_size, quick.test_size) == ("distilbert-base-uncased", 0.5, 300)
    stronger = asked("stronger", "--model", "a,b")
    assert settings(stronger, "model", "strategy") == [
        (model, strategy) for model in ("a", "b") for strategy in ("finetune", "bitstack")
    ]
    assert {tuple(task.name for task in p.tasks) for p in stronger} == {("ag_news", "dbpedia")}
    code = asked("run", "--preset", "published-code", "--strategy", "bitstack,finetune,recall")
    names = ("model", "sampling", "budget", "importance_mode")
    rest = ("gpt2", "head", None, None)
    assert settings(code, *names) == [("gpt2", "head", "fresh", "train"), rest, rest]
    (twenty,) = asked("run", "--tasks", "twenty", "--strategy", "finetune")
    assert len(twenty.tasks) == 20


def test_each_strategy_has_its_own_rate_unless_one_is_given():
    rates = ("learning_rate", "head_learning_rate")
    both = ("run", "--strategy", "finetune,recall")
    fine, recall = settings(asked(*both), *rates)
    assert recall[0] > 4 * fine[0] and recall[1] is not None and fine[1] is None
    given = settings(asked(*both, "--learning-rate", str(fine[0])), *rates)
    assert given == [fine, (fine[0], recall[1])]
    real = settings(asked(*both, "--model", "folder", "--data", "folder"), *rates)
    assert real == [fine, (8e-3, 1e-2)]


def test_costs_are_added_to_those_that_are_there(tmp_path, capsys, monkeypatch):
    there = CostReport(device="cpu", costs={"update": {"value": 1.0}})
    there.save(tmp_path / "cpu.json")
    growth = {"what": "update", "parameters": 10, "tasks": 5, "ratio": 1.0}
    monkeypatch.setattr(
        "bitstack_nb.cost.report.measure_growth",
        lambda report, rounds, progress: report.growth.append(growth | {"ratio": rounds}),
    )
    options = ["--device", "cpu", "--output", str(tmp_path), "--rounds", "3", "--quiet"]
    assert main(["cost", "growth", *options]) == 0
    now = CostReport.load(tmp_path / "cpu.json")
    assert (now.costs, now.growth) == (there.costs, [growth | {"ratio": 3}])
    assert "forward and backward of its batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data /nowhere --model /nowhere", "nowhere"),
        ("--data hub --model tiny-gpt2", "pretrained model"),
        ("--model ./no-such-folder", "no-such-folder"),
        ("--device cuda", "use auto or cpu"),
        ("--train-size 100000", "100000"),
        ("--learning-rate -1", "learning_rate"),
        ("--strategy magic", "expected one of"),
        ("--strategy bitstack --budget half", "expected one of union, fresh"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, arguments, message):
    command = ["run", *arguments.split(), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("run --tasks imbd", "use one of imdb"), ("run --seeds x", "'x'"), ("walk", "ablation")],
)
def test_options_that_cannot_be_read_get_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped: the same command continues"),
        (OSError("no space\nleft"), 2, "error: no space left"),
        (ModuleNotFoundError("No module named 'peft'"), 2, "error: No module named 'peft'"),
        (type("OutOfMemoryError", (RuntimeError,), {})(), 2, "error: out of GPU memory"),
    ],
)
def test_what_stops_a_run_is_told_in_one_line(monkeypatch, capsys, raised, status, message):
    def stop(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("bitstack_nb.benchmark.runner.run", stop)
    assert main(["run", "--quiet"]) == status
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def figures(tmp_path, **how) -> subprocess.CompletedProcess:
    """The command ``figures`` on one result, in its own process."""
    run().save(tmp_path / "runs" / "a.json")
    command = [sys.executable, "-m", "bitstack_nb", "figures", "runs", "--output=~/drawn"]
    environment = {**os.environ, "HOME": str(tmp_path), **how.pop("env", {})}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, check=False, **how
    )


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = figures(tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_signs_that_a_terminal_cannot_show_are_replaced(tmp_path):
    env = {"PYTHONIOENCODING": "ascii"}
    done = figures(tmp_path / "d\u00e9j\u00e0", stdout=subprocess.PIPE, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"d?j?/drawn" in done.stdout
