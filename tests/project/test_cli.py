"""The command line: what a user types, sees, and is told when something is wrong."""

import os
import re
import subprocess
import sys
import time

import pytest

from bitstack_nb.__main__ import main
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.results.result import load_results

FAST = ["--tasks", "imdb,ag_news", "--train-size", "32", "--test-size", "28", "--max-length", "16"]


def test_main_job_in_a_process_of_its_own(tmp_path):
    """As in the README, but smaller: runs, shows progress, compares, says where the JSON lies."""
    done = subprocess.run(
        [sys.executable, "-m", "bitstack_nb", "run", *FAST, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    for strategy in ("finetune", "bitstack"):
        assert f"| {strategy} " in done.stdout
    assert "synthetic" in done.stdout
    files = list(tmp_path.glob("*.json"))
    assert len(files) == 2
    assert all(str(file) in done.stdout for file in files)


def test_no_network_is_one_line_with_a_way_out(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bitstack_nb", "stronger", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*--data (embedded|hub|FOLDER).*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["bitstack", "recall"])
def test_a_killed_process_is_resumed_with_the_same_matrix(tmp_path, capsys, strategy):
    options = [*FAST, "--strategy", strategy, "--quiet"]
    assert main(["run", *options, "--output", str(tmp_path / "unbroken")]) == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "bitstack_nb", "run", *options, "--output", str(broken)]
    )
    while not list(broken.glob("*.state/stage-1/numbers.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not list(broken.glob("*.json"))
    assert main(["run", *options, "--output", str(broken)]) == 0
    first, second = load_results(tmp_path)
    assert first.matrix == second.matrix
    assert first.locks == second.locks
    capsys.readouterr()


def test_ablation_runs_every_sparsity_and_budget(tmp_path, capsys):
    arguments = ["--sparsity", "0,0.3", "--budget", "union,fresh", "--output", str(tmp_path)]
    assert main(["ablation", *FAST, *arguments, "--quiet"]) == 0
    runs = {(r.protocol["sparsity"], r.protocol["budget"]) for r in load_results(tmp_path)}
    assert runs == {(s, b) for s in (0.0, 0.3) for b in ("union", "fresh")}
    assert "| bitstack" in capsys.readouterr().out


def test_recall_at_every_sparsity_and_importance(tmp_path, capsys):
    """Budgets are none of its settings."""
    options = ["--strategy", "recall", "--sparsity", "0.1,0.5", "--budget", "union,fresh"]
    options += ["--importance", "gradient,fisher,random", "--head-learning-rate", "0.01", "--quiet"]
    assert main(["run", *FAST, *options, "--output", str(tmp_path)]) == 0
    done = load_results(tmp_path)
    runs = {(r.protocol["sparsity"], r.protocol.get("importance")) for r in done}
    assert runs == {(s, i) for s in (0.1, 0.5) for i in (None, "fisher", "random")}
    assert len(done) == 6
    for result in done:
        assert result.protocol["head_learning_rate"] == 0.01
        assert result.metrics["forgetting"] == 0
    assert "| recall" in capsys.readouterr().out


def test_a_rival_at_every_value_of_its_own_setting(tmp_path, capsys):
    options = ["--strategy", "lora,frozen", "--rank", "1,3", "--output", str(tmp_path), "--quiet"]
    assert main(["run", *FAST, *options]) == 0
    runs = [(r.protocol["strategy"], r.protocol.get("rank")) for r in load_results(tmp_path)]
    assert sorted(runs, key=str) == [("frozen", None), ("lora", 1), ("lora", 3)]
    assert "kB per task" in capsys.readouterr().out


def test_stronger_is_two_tasks_on_the_model_named(tmp_path, capsys):
    options = ["--model", "tiny-gpt2", "--data", "embedded", "--output", str(tmp_path), "--quiet"]
    assert main(["stronger", *FAST[2:], *options]) == 0
    for result in load_results(tmp_path):
        tasks = {task["name"]: task["num_labels"] for task in result.protocol["tasks"]}
        assert tasks == {"imdb": 2, "ag_news_binary": 2}
    capsys.readouterr()


def test_seeds_give_an_interval(tmp_path, capsys):
    options = ["--strategy", "finetune", "--seeds", "0,1", "--output", str(tmp_path), "--quiet"]
    assert main(["run", *FAST, *options]) == 0
    assert "±" in capsys.readouterr().out


def test_seeds_in_an_order_of_their_own(tmp_path, capsys):
    """A seed's order is always the same one, and one configuration in a table."""
    options = ["--tasks", "imdb,ag_news,yelp", "--seeds", "0,1,2", "--shuffle-tasks", "--quiet"]
    options += ["--strategy", "bitstack", "--n-batches", "2", "--warmup-steps", "3"]
    assert main(["run", *FAST[2:], *options, "--output", str(tmp_path)]) == 0
    done = {result.protocol["seed"]: result for result in load_results(tmp_path)}
    orders = {seed: [t["name"] for t in r.protocol["tasks"]] for seed, r in done.items()}
    assert orders[0] == ["imdb", "ag_news", "yelp"]
    assert len(set(map(tuple, orders.values()))) > 1
    assert {tuple(sorted(order)) for order in orders.values()} == {("ag_news", "imdb", "yelp")}
    again = {seed: Protocol(seed=seed, tasks=orders[0]).shuffled().tasks for seed in orders}
    assert orders == {seed: [task.name for task in tasks] for seed, tasks in again.items()}
    for result in done.values():
        assert (result.protocol["n_batches"], result.protocol["warmup_steps"]) == (2, 3)
    assert capsys.readouterr().out.count("| bitstack") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere", "--model", "/nowhere"], "nowhere"),
        (["--data", "hub", "--model", "tiny-gpt2"], "pretrained model"),
        (["--model", "./no-such-folder"], "no-such-folder"),
        (["--device", "cuda"], "use auto or cpu"),
        (["--train-size", "100000"], "100000"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--strategy", "recall", "--sparsity", "0.3"], "up to 0.2"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, arguments, message):
    assert main(["run", *arguments, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--strategy", "magic"], ["--tasks", "imbd"], ["--seeds", "x"]]
)
def test_unknown_words_name_the_known_ones(capsys, options):
    with pytest.raises(SystemExit) as stopped:
        main(["run", *options])
    assert stopped.value.code == 2
    assert "imdb" in capsys.readouterr().err or options[0] != "--tasks"
