"""The explorer: what it shows, how fast, and the run that its button starts. No page is needed."""

import io
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from matplotlib import pyplot
from PIL import Image
from transformers import GPT2Config, GPT2ForSequenceClassification

from bitstack_nb import BitStack, Result, load_results, run
from bitstack_nb.benchmark.protocol import PRESETS
from bitstack_nb.figures.lock_picture import LockPicture
from bitstack_nb.figures.lock_view import TOGETHER, LockView
from bitstack_nb.notebook import retrain
from bitstack_nb.notebook.explorer import explore

LOADERS = [tiny.batches(2, seed=seed) for seed in range(3)]
TASKS = ("reviews", "news", "<b>")
SMALL = {"tasks": ("imdb", "ag_news"), "train_size": 96, "test_size": 28, "max_length": 16}
OPTIONS = ("--tasks", "imdb,ag_news", "--train-size", "96", "--test-size", "28")


@pytest.fixture(scope="module")
def view():
    stack = BitStack(tiny.gpt2(), 0.12)
    return LockView(
        tiny.record_curves(stack, LOADERS).curves(),
        TASKS,
        stack.stats()["total"],
        "tiny",
        0.12,
        "union",
    )


@pytest.fixture
def explorer(view):
    return explore(view)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# What it shows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["union", "fresh"])
@pytest.mark.parametrize("sparsity", [0, 0.12, 0.4])
def test_numbers_and_shares_are_those_of_a_stack_at_that_sparsity(view, sparsity, budget):
    stack = BitStack(tiny.gpt2(), sparsity, budget=budget)
    for loader in LOADERS:
        stack.update(loader)
    table, numbers = stack.layer_table(), view.numbers(sparsity, budget=budget)
    sums = table.groupby("task")[["selected", "added", "locked"]].sum()
    for name in sums:
        assert list(getattr(numbers, name)) == sums[name].tolist(), name
    stats = stack.stats()
    assert (numbers.eligible, numbers.total) == (stats["eligible"], stats["total"])
    for number in (TOGETHER, 1, 2, 3):
        column = "locked" if number == TOGETHER else "selected"
        own = table[table["task"] == (number or 3)]
        shares = view.shares(sparsity, budget=budget, task=number)
        assert np.allclose(shares, own[column] / own["eligible"])


def test_the_slider_redraws_picture_and_numbers(explorer, view):
    assert explorer.sparsity.value == 0.12
    before = explorer.image.value, explorer.numbers.value
    explorer.sparsity.value = 0.4
    assert explorer.image.value != before[0]
    numbers = view.numbers(0.4, budget="union")
    assert f"{100 * numbers.locked[-1] / numbers.eligible:.1f}% of the eligible entries" in (
        explorer.numbers.value
    )
    assert f"{100 * numbers.locked[-1] / numbers.total:.1f}% of all" in explorer.numbers.value
    explorer.sparsity.value = 0.12
    assert (explorer.image.value, explorer.numbers.value) == before


def test_every_task_and_budget_has_a_picture_of_its_own(explorer):
    seen = set()
    for budget in explorer.budget.options:
        for _, task in explorer.task.options:
            explorer.budget.value, explorer.task.value = budget, task
            seen.add(explorer.image.value)
    assert len(seen) == 2 * (len(TASKS) + 1)
    assert pyplot.get_fignums() == []


def test_every_step_of_the_slider_can_be_shown(explorer):
    for step in range(51):
        explorer.sparsity.value = 0.01 * step  # with the rounding errors of a page's arithmetic


def test_task_names_are_text_not_html(explorer):
    assert "&lt;b&gt;" in explorer.numbers.value
    assert "reviews" in explorer.numbers.value


def test_numbers_take_their_colours_from_the_page(explorer):
    assert "color" not in explorer.numbers.value
    assert "background" not in explorer.numbers.value


def test_a_picture_shows_each_share_in_its_place_and_nothing_of_the_one_before(view):
    cells = view.curves.cells
    picture = LockPicture(cells)
    ones = np.ones(len(cells))
    dark = pixels(picture.png(0 * ones, title="")).sum(2)
    centres = []
    for cell in range(len(cells)):
        png = picture.png(np.eye(len(cells))[cell], title="")
        darker = np.argwhere(pixels(png).sum(2) < dark - 300)
        centres.append(darker.mean(0).round())
    assert png == LockPicture(cells).png(np.eye(len(cells))[-1], title="")
    rows, columns = np.array(centres).T
    layers = np.array([layer for layer, *_ in cells])
    assert len(set(rows)) == len(set(layers))
    assert (np.diff(rows)[np.diff(layers) > 0] > 0).all()
    assert (np.diff(columns)[np.diff(layers) == 0] > 0).all()


def test_models_with_modules_outside_the_blocks_and_many_layers_are_drawn():
    cells = [(layer, "attn", 10) for layer in range(60)] + [(None, "pooler.dense", 5)]
    png = LockPicture(cells).png(np.linspace(0, 1, len(cells)), title="all")
    assert pixels(png).shape[0] < 1100


def test_redraw_of_gpt2_takes_at_most_50_ms():
    """Processor time, because a busy machine makes everything wait: median of 50."""
    config = GPT2Config(n_layer=12, n_embd=12, n_head=2, vocab_size=40, num_labels=3)
    model = tiny.seeded(lambda: GPT2ForSequenceClassification(config), 0)
    model.config.pad_token_id = 0
    assert len(list(model.transformer.parameters())) == 148
    stack = BitStack(model, 0.12)
    view = LockView(
        tiny.record_curves(stack, LOADERS).curves(), TASKS, stack.stats()["total"], "GPT-2"
    )
    explorer, times = explore(view), []
    for step in range(1, 51):
        start = time.process_time()
        explorer.sparsity.value = step / 100
        times.append(time.process_time() - start)
    assert statistics.median(times) <= 0.050, f"{1000 * statistics.median(times):.0f} ms"


# A recorded run, and a live stack ---------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    protocol = replace(PRESETS["smoke"].with_strategy("bitstack", budget="fresh"), **SMALL)
    return run(protocol, output=tmp_path_factory.mktemp("runs"))


def test_a_recorded_run_opens_at_what_it_locked(recorded):
    explorer = explore(recorded)
    assert (explorer.sparsity.value, explorer.budget.value) == (0.12, "fresh")
    stats = recorded.lock_stats[-1]
    shown = LockView.of_result(recorded).numbers(0.12, budget="fresh")
    assert 100 * shown.locked[-1] / shown.eligible == pytest.approx(stats["frozen_pct"], abs=0.1)
    assert f"{stats['locked_pct']:.1f}% of all" in explorer.numbers.value
    assert [label for label, _ in explorer.task.options[1:]] == ["imdb", "ag_news"]
    assert "synthetic" in explorer.numbers.value


def test_a_live_stack_shows_its_next_update_and_stays_as_it_is():
    model = tiny.gpt2()
    stack, twin = BitStack(model, 0.2, budget="fresh"), BitStack(tiny.gpt2(), 0.2, budget="fresh")
    for each in (stack, twin):
        each.update(LOADERS[0])
    before, weights, state = stack.state_dict(), tiny.snapshot(model), torch.get_rng_state()
    explorer = explore(stack, LOADERS[1])
    explorer.sparsity.value = 0.3
    explorer.sparsity.value = 0.2
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(c.any() for c in tiny.changed(model, weights).values())
    assert stack.state_dict()["tasks"] == before["tasks"]
    assert all(torch.equal(b, before["bits"][n]) for n, b in stack.state_dict()["bits"].items())
    assert model.training is True or all(p.grad is None for p in model.parameters())
    after = twin.update(LOADERS[1])
    assert f"{after['frozen_pct']:.1f}% of the eligible entries" in explorer.numbers.value
    assert explorer.retraining is None


def test_unusable_sources_say_what_to_do(recorded):
    with pytest.raises(ValueError, match=r"explore\(stack, loader\)"):
        explore(BitStack(tiny.plain()))
    with pytest.raises(ValueError, match="no recorded importance"):
        explore(replace(recorded, importance={}))


# Retraining -------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(retrain, "SETTINGS", (*retrain.SETTINGS, *OPTIONS, "--max-length", "16"))
    yield
    retrain.stop_running()


def wait_for(condition, seconds=120):
    """Patience for busy machines; what is waited for takes seconds."""
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


def test_retraining_is_stopped_and_goes_on_to_the_result_of_an_unbroken_run(
    recorded, small, tmp_path
):
    explorer = explore(recorded, output=tmp_path / "runs")
    panel = explorer.retraining
    explorer.sparsity.value, explorer.budget.value = 0.3, "union"
    panel.start.click()
    assert panel.start.disabled
    assert not panel.stop.disabled
    wait_for(lambda: list(tmp_path.glob("runs/*.state/stage-1")))
    assert panel.progress.value > 0
    panel.stop.click()
    assert panel.run.wait(30)
    assert "stopped" in panel.message.value
    assert not panel.start.disabled
    assert not list(tmp_path.glob("runs/*.json"))
    panel.start.click()
    assert panel.run.wait(120)
    (result,) = load_results(tmp_path / "runs")
    accuracy = f"{result.metrics['average_accuracy']:.1f}%"
    assert accuracy in panel.message.value
    assert "forgetting" in panel.message.value
    expected = view_text(result)
    assert explorer.numbers.value == expected
    unbroken = replace(PRESETS["smoke"].with_strategy("bitstack", sparsity=0.3), **SMALL)
    assert run(unbroken, output=tmp_path / "unbroken").matrix == result.matrix


def view_text(result: Result) -> str:
    return LockView.of_result(result).html(0.3, budget="union", task=TOGETHER)


def test_an_explorer_made_again_stops_the_run_of_the_first(recorded, small, tmp_path):
    first = explore(recorded, output=tmp_path)
    first.retraining.start.click()
    explore(recorded, output=tmp_path)
    assert first.retraining.run.wait(30)
    assert "stopped" in first.retraining.message.value


def test_a_run_that_fails_says_why(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(retrain, "SETTINGS", ("--preset", "smoke", "--train-size", "100000"))
    panel = explore(recorded, output=tmp_path).retraining
    panel.start.click()
    assert panel.run.wait(120)
    assert "100000" in panel.message.value
    assert "error:" not in panel.message.value
    assert not panel.start.disabled


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_no_process_is_left_when_the_kernel_is_killed(tmp_path):
    code = (
        "import sys, time\n"
        "from bitstack_nb.notebook.retrain import Retraining\n"
        "seen = lambda *progress: None\n"
        "run = Retraining(0.12, 'union', output=sys.argv[1], on_progress=seen, on_end=seen)\n"
        "print(run._process.pid, flush=True)\n"
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
