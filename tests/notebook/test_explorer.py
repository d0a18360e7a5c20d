"""The explorer: the numbers of its page, and the runs that its panel starts, without a browser."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from toy_figures import FINETUNE, FRESH, SWEEP, runs

from bitstack_nb import BitStack, ExactRecall, load_results, run
from bitstack_nb.benchmark.protocol import PRESETS
from bitstack_nb.cli import main
from bitstack_nb.notebook import explore, panel
from bitstack_nb.notebook.explorer import Explorer
from bitstack_nb.notebook.lock_view import LockView, own_bytes
from bitstack_nb.notebook.measured import measured
from bitstack_nb.notebook.retrain import stop_running
from bitstack_nb.results.metrics import mean_interval

ROOT = Path(__file__).resolve().parents[2]
LOADERS = [tiny.batches(2, seed=seed) for seed in range(3)]
TASKS = ("reviews", "news", "</script>")
SMALL = replace(
    PRESETS["smoke"], tasks=("imdb", "ag_news"), train_size=96, test_size=28, max_length=16
)


@pytest.fixture(scope="module")
def view():
    stack = BitStack(tiny.gpt2(), 0.12)
    curves = tiny.record_curves(stack, LOADERS).curves()
    return LockView(curves, TASKS, stack.stats()["total"], "tiny", 0.12, "union")


def data_of(explorer: Explorer) -> dict:
    """The numbers that the page holds."""
    found = re.findall(r'id="data">(.*?)</script>', explorer.to_html(), re.S)
    assert len(found) == 1  # a task's name cannot end the script
    return json.loads(found[0])


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["union", "fresh"])
@pytest.mark.parametrize("level", [0, 12, 40])
def test_the_page_holds_the_numbers_of_a_stack_at_each_sparsity(view, level, budget):
    stack = BitStack(tiny.gpt2(), level / 100, budget=budget)
    for loader in LOADERS:
        stack.update(loader)
    data, table, stats = data_of(explore(view)), stack.layer_table(), stack.stats()
    sums = table.groupby("task")[["selected", "added", "locked"]].sum()
    assert data["sums"][budget][level] == sums.T.to_numpy().tolist()
    assert (data["eligible"], data["total"]) == (stats["eligible"], stats["total"])
    assert data["tasks"] == list(TASKS)
    for task, curves in enumerate(data["curves"][budget], start=1):
        own = table[table["task"] == task].fillna({"layer": -1})
        expected = own.set_index(["layer", "module"])["lock_fraction"].to_dict()
        shown = {
            (-1 if cell["layer"] is None else cell["layer"], cell["module"]): sum(
                map(int, steps.split()[: level + 1])
            )
            / 1000
            for cell, steps in zip(data["cells"], curves, strict=True)
        }
        assert shown == pytest.approx(expected, abs=6e-4)


def test_a_tasks_own_weights_take_the_bytes_that_exact_recall_counts():
    for sparsity in (0.01, 0.2):
        tasks = ExactRecall(tiny.gpt2(), sparsity)
        tasks.begin("one")
        tasks.close()
        stats = tasks.stats()
        expected = own_bytes(stats["locked"], stats["eligible"])
        assert tasks.own_bytes() == pytest.approx(expected, abs=1)


def test_the_curves_are_means_of_the_runs_from_fine_tuning_on():
    by_mode = {line["mode"]: line for line in measured(SWEEP)["lock"]["lines"]}
    assert [point["sparsity"] for point in by_mode["fresh"]["points"]] == [0, 0.05, 0.4]
    for point, own in zip(by_mode["fresh"]["points"], (FINETUNE, *FRESH.values()), strict=True):
        for name, metric in (("accuracy", "average_accuracy"), ("forgetting", "forgetting")):
            expected = mean_interval([result.metrics[metric] for result in own])
            assert (point[name], point[f"{name}_half"]) == pytest.approx(expected, abs=1e-3)
    assert measured([]) == {} and measured(FINETUNE) == {}


def test_exact_recall_is_drawn_over_its_rates_beside_separate_models():
    rates = {0.01: 8e-3, 0.05: 2e-3, 0.2: 1e-3}
    recall = [
        result
        for sparsity, rate in rates.items()
        for result in runs("recall", sparsity=sparsity, learning_rate=rate, importance="random")
    ]
    single = runs("single", learning_rate=3e-5)
    family = measured([*recall, *single])["recall"]
    (line,) = family["lines"]
    assert [point["sparsity"] for point in line["points"]] == list(rates)
    expected = np.mean([result.metrics["average_accuracy"] for result in single])
    assert family["reference"]["accuracy"] == pytest.approx(expected, abs=1e-3)


# A recorded run, and a live stack ---------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    protocol = SMALL.with_strategy("bitstack", budget="fresh")
    return run(protocol, output=tmp_path_factory.mktemp("runs"))


def test_a_recorded_run_opens_at_what_it_locked(recorded):
    data = data_of(explore(recorded))
    assert data["start"] == {"level": 12, "mode": "fresh"}
    stats = recorded.lock_stats[-1]
    locked = data["sums"]["fresh"][12][2][-1]
    assert 100 * locked / data["eligible"] == pytest.approx(stats["frozen_pct"], abs=0.1)
    assert data["tasks"] == ["imdb", "ag_news"] and "synthetic" in data["source"]
    assert data["measured"] == {}


def test_the_committed_page_is_what_the_command_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["figures", "--explorer", "--output", str(tmp_path)]) == 0
    page = tmp_path / "explorer.html"
    assert capsys.readouterr().out.split() == [str(page)]
    assert page.read_bytes() == (ROOT / "docs" / "explorer.html").read_bytes()
    assert page.stat().st_size < 500_000
    for result in FINETUNE:
        result.save(tmp_path / "runs" / f"{result.protocol['seed']}.json")
    assert main(["figures", "--explorer", str(tmp_path / "runs")]) == 2
    assert "no run of BitStack" in capsys.readouterr().err


def test_a_live_stack_shows_its_next_update_and_stays_as_it_is():
    model = tiny.gpt2()
    stack, twin = BitStack(model, 0.2, budget="fresh"), BitStack(tiny.gpt2(), 0.2, budget="fresh")
    for each in (stack, twin):
        each.update(LOADERS[0])
    before, weights, state = stack.state_dict(), tiny.snapshot(model), torch.get_rng_state()
    data = data_of(explore(stack, LOADERS[1]))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(c.any() for c in tiny.changed(model, weights).values())
    assert stack.state_dict()["tasks"] == before["tasks"]
    assert all(torch.equal(b, before["bits"][n]) for n, b in stack.state_dict()["bits"].items())
    (chosen,), (added,), (locked,) = data["sums"]["fresh"][20]
    assert twin.update(LOADERS[1])["locked"] == locked
    assert chosen == added and locked - added == stack.stats()["locked"]
    assert data["live"] and data["start"] == {"level": 20, "mode": "fresh"}


def test_unusable_sources_say_what_to_do(recorded):
    with pytest.raises(ValueError, match=r"explore\(stack, loader\)"):
        explore(BitStack(tiny.plain()))
    with pytest.raises(ValueError, match="no recorded importance"):
        explore(replace(recorded, importance={}))


# Retraining -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(panel, "SMOKE", SMALL)
    yield
    stop_running()


def wait_for(condition, seconds=120):
    """Patience for busy machines; the event takes seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Whether a process is gone; one that waits for its parent to notice has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_retraining_is_stopped_and_goes_on_to_the_result_of_an_unbroken_run(recorded, tmp_path):
    first = explore(recorded)
    made = first.retraining(tmp_path / "runs")
    assert made.page.value == "" and made.shown.layout.display == "none"
    made.sparsity.value, made.budget.value = 0.3, "union"
    made.start.click()
    assert made.start.disabled and not made.stop.disabled
    wait_for(lambda: list(tmp_path.glob("runs/*bitstack*.state/stage-1")))
    assert made.progress.value > 0 and "BitStack" in made.message.value
    made.stop.click()
    assert made.run.wait(30)
    assert "stopped" in made.message.value and not made.start.disabled
    made.start.click()
    assert made.run.wait(120)
    fine_tuned, result = sorted(
        load_results(tmp_path / "runs"), key=lambda r: r.protocol["strategy"] == "bitstack"
    )
    for one in (fine_tuned, result):
        assert f">{one.metrics['average_accuracy']:.1f}<" in made.history.value
    assert made.history.value.index("fine-tuning") < made.history.value.index("BitStack")
    assert made.page.value == explore(result, results=[fine_tuned, result]).frame()
    made.shown.value = made.shown.options[0]
    assert made.page.value == first.frame()
    unbroken = SMALL.with_strategy("bitstack", sparsity=0.3)
    assert run(unbroken, output=tmp_path / "unbroken").matrix == result.matrix


def test_a_panel_made_again_stops_the_run_of_the_first(recorded, tmp_path):
    first = explore(recorded).retraining(tmp_path)
    first.start.click()
    explore(recorded).retraining(tmp_path)
    assert first.run.wait(30)
    assert "stopped" in first.message.value


def test_a_run_that_fails_says_why(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(panel, "SMOKE", replace(SMALL, train_size=100_000))
    made = explore(recorded).retraining(tmp_path)
    made.start.click()
    assert made.run.wait(120)
    assert "100000" in made.message.value and not made.start.disabled


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_no_process_is_left_when_the_kernel_is_killed(tmp_path):
    code = (
        "import sys, time\n"
        "from bitstack_nb.benchmark.protocol import PRESETS\n"
        "from bitstack_nb.notebook.retrain import Retraining\n"
        "seen = lambda *progress: None\n"
        "smoke = [PRESETS['smoke']]\n"
        "run = Retraining(smoke, output=sys.argv[1], on_progress=seen, on_end=seen)\n"
        "print(run.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    pid = int(kernel.stdout.readline())
    assert not ended(pid)
    os.kill(kernel.pid, signal.SIGKILL)
    kernel.communicate()
    wait_for(lambda: ended(pid))
    assert not list(tmp_path.glob("*.json"))
