"""The explorer: its picture and numbers, and the run that its button starts. No page is needed."""

import io
import os
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
from matplotlib import pyplot
from PIL import Image

from bitstack_nb import BitStack, Result, load_results, run
from bitstack_nb.benchmark.protocol import PRESETS
from bitstack_nb.figures.style import Figure
from bitstack_nb.notebook import explorer as module
from bitstack_nb.notebook.explorer import LockPicture, explore
from bitstack_nb.notebook.lock_view import TOGETHER, LockView
from bitstack_nb.notebook.retrain import stop_running

LOADERS = [tiny.batches(2, seed=seed) for seed in range(3)]
TASKS = ("reviews", "news", "<b>")
SMALL = replace(
    PRESETS["smoke"], tasks=("imdb", "ag_news"), train_size=96, test_size=28, max_length=16
)


def view_of(stack: BitStack) -> LockView:
    curves = tiny.record_curves(stack, LOADERS).curves()
    return LockView(curves, TASKS, stack.stats()["total"], "tiny", 0.12, "union")


@pytest.fixture(scope="module")
def view():
    return view_of(BitStack(tiny.gpt2(), 0.12))


@pytest.fixture
def explorer(view):
    return explore(view)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# Picture and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["union", "fresh"])
@pytest.mark.parametrize("sparsity", [0, 0.12, 0.4])
def test_numbers_and_shares_are_those_of_a_stack_at_that_sparsity(view, sparsity, budget):
    stack = BitStack(tiny.gpt2(), sparsity, budget=budget)
    for loader in LOADERS:
        stack.update(loader)
    table, numbers = stack.layer_table(), view.numbers(sparsity, budget=budget)
    sums = table.groupby("task")[["selected", "added", "locked"]].sum()
    assert numbers[sums.columns].to_numpy().tolist() == sums.to_numpy().tolist()
    stats = stack.stats()
    assert (view.eligible, view.total) == (stats["eligible"], stats["total"])
    for number in (TOGETHER, 1, 2, 3):
        own = table[table["task"] == (number or 3)].set_index(["layer", "module"])
        expected = 100 * own["locked" if number == TOGETHER else "selected"] / own["eligible"]
        shares = view.shares(sparsity, budget=budget, task=number)
        assert shares.to_numpy().ravel() == pytest.approx(expected.to_numpy())


def test_the_slider_redraws_picture_and_numbers(explorer, view):
    assert explorer.sparsity.value == 0.12
    before = explorer.image.value, explorer.numbers.value
    explorer.sparsity.value = 0.4
    assert explorer.image.value != before[0]
    locked = 100 * view.numbers(0.4, budget="union")["locked"].iloc[-1]
    assert f"{locked / view.eligible:.1f} % of the eligible weights" in explorer.numbers.value
    assert f"{locked / view.total:.1f} % of all" in explorer.numbers.value
    explorer.sparsity.value = 0.12
    assert (explorer.image.value, explorer.numbers.value) == before
    for step in range(51):
        explorer.sparsity.value = 0.01 * step  # with the rounding errors of a page's arithmetic


def test_every_task_and_budget_has_a_picture_of_its_own(explorer):
    seen = set()
    for budget in explorer.budget.options:
        for _, task in explorer.task.options:
            explorer.budget.value, explorer.task.value = budget, task
            seen.add(explorer.image.value)
    assert len(seen) == 2 * (len(TASKS) + 1)
    assert pyplot.get_fignums() == []


def test_numbers_are_text_in_the_colours_of_the_page(explorer):
    assert "&lt;b&gt;" in explorer.numbers.value and "<b>" not in explorer.numbers.value
    assert "reviews" in explorer.numbers.value
    assert not any(word in explorer.numbers.value for word in ("color", "background"))


def test_a_picture_shows_each_share_in_its_place_and_nothing_of_the_one_before(view):
    shares = view.shares(0, budget="union", task=TOGETHER)
    picture = LockPicture(shares)
    light = pixels(picture.png(shares, title="")).sum(2)
    places = []
    for cell in np.ndindex(shares.shape):
        shown = shares.copy()
        shown.iloc[cell] = 100
        png = picture.png(shown, title="")
        places.append(np.argwhere(pixels(png).sum(2) < light - 300).mean(0))
    assert png == LockPicture(shares).png(shown, title="")
    rows, columns = (np.reshape(of, shares.shape) for of in zip(*places, strict=True))
    assert (np.diff(rows, axis=0) > 10).all() and (np.ptp(rows, axis=1) < 5).all()
    assert (np.diff(columns, axis=1) > 10).all() and (np.ptp(columns, axis=0) < 5).all()


def test_a_redraw_draws_cells_and_never_the_whole_figure(explorer, monkeypatch):
    """Measured, that takes a third of the time: 35 instead of 100 ms for 12 layers."""
    before, drawn = explorer.image.value, []
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: drawn.append(figure))
    explorer.sparsity.value = 0.4
    assert explorer.image.value != before and not drawn


# A recorded run, and a live stack ---------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    protocol = SMALL.with_strategy("bitstack", budget="fresh")
    return run(protocol, output=tmp_path_factory.mktemp("runs"))


def test_a_recorded_run_opens_at_what_it_locked(recorded):
    explorer = explore(recorded)
    assert (explorer.sparsity.value, explorer.budget.value) == (0.12, "fresh")
    stats, view = recorded.lock_stats[-1], LockView.of_result(recorded)
    locked = view.numbers(0.12, budget="fresh")["locked"].iloc[-1]
    assert 100 * locked / view.eligible == pytest.approx(stats["frozen_pct"], abs=0.1)
    assert f"{stats['locked_pct']:.1f} % of all" in explorer.numbers.value
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
    after = twin.update(LOADERS[1])
    assert f"{after['frozen_pct']:.1f} % of the eligible weights" in explorer.numbers.value
    assert "before" in explorer.numbers.value
    assert explorer.retraining is None


def test_unusable_sources_say_what_to_do(recorded):
    with pytest.raises(ValueError, match=r"explore\(stack, loader\)"):
        explore(BitStack(tiny.plain()))
    with pytest.raises(ValueError, match="no recorded importance"):
        explore(replace(recorded, importance={}))


# Retraining -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "SMOKE", SMALL)
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


def text_of(result: Result) -> str:
    explorer = explore(result)
    explorer.sparsity.value, explorer.budget.value = 0.3, "union"
    return explorer.numbers.value


def test_retraining_is_stopped_and_goes_on_to_the_result_of_an_unbroken_run(recorded, tmp_path):
    explorer = explore(recorded, output=tmp_path / "runs")
    panel = explorer.retraining
    explorer.sparsity.value, explorer.budget.value = 0.3, "union"
    panel.start.click()
    assert panel.start.disabled and not panel.stop.disabled
    wait_for(lambda: list(tmp_path.glob("runs/*.state/stage-1")))
    assert panel.progress.value > 0 and "batches" in panel.message.value
    panel.stop.click()
    assert panel.run.wait(30)
    assert "stopped" in panel.message.value and not panel.start.disabled
    assert not list(tmp_path.glob("runs/*.json"))
    panel.start.click()
    assert panel.run.wait(120)
    (result,) = load_results(tmp_path / "runs")
    assert f"{result.metrics['average_accuracy']:.1f} %" in panel.message.value
    assert "forgetting" in panel.message.value
    assert explorer.numbers.value == text_of(result)
    unbroken = SMALL.with_strategy("bitstack", sparsity=0.3)
    assert run(unbroken, output=tmp_path / "unbroken").matrix == result.matrix


def test_an_explorer_made_again_stops_the_run_of_the_first(recorded, tmp_path):
    first = explore(recorded, output=tmp_path)
    first.retraining.start.click()
    explore(recorded, output=tmp_path)
    assert first.retraining.run.wait(30)
    assert "stopped" in first.retraining.message.value


def test_a_run_that_fails_says_why(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "SMOKE", replace(SMALL, train_size=100_000))
    panel = explore(recorded, output=tmp_path).retraining
    panel.start.click()
    assert panel.run.wait(120)
    assert "100000" in panel.message.value and not panel.start.disabled


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_no_process_is_left_when_the_kernel_is_killed(tmp_path):
    code = (
        "import sys, time\n"
        "from bitstack_nb.benchmark.protocol import PRESETS\n"
        "from bitstack_nb.notebook.retrain import Retraining\n"
        "seen = lambda *progress: None\n"
        "run = Retraining(PRESETS['smoke'], output=sys.argv[1], on_progress=seen, on_end=seen)\n"
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
