"""Figures: what is drawn equals the data, reads well, and depends on nothing but the results."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn as sns
import tiny
from matplotlib.image import imread
from matplotlib.text import Text
from safetensors import safe_open
from toy_results import TASKS, published, run

from bitstack_nb import BitStack
from bitstack_nb.cli import RECORDED, RECORDED_COSTS, main
from bitstack_nb.cost.report import CostReport, cost_table
from bitstack_nb.figures.accuracy import (
    accuracy_matrices,
    comparison,
    forgetting_per_task,
    paired_differences,
)
from bitstack_nb.figures.evidence import accuracy_for_storage, drift_attribution, task_differences
from bitstack_nb.figures.figures import FILE_DPI
from bitstack_nb.figures.locks import ablation, capacity, lock_heatmaps, mask_bytes
from bitstack_nb.figures.style import DPI, Figure, grouped, png
from bitstack_nb.results.metrics import forgetting_per_task as points_lost
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.result import Result, ResultError, load_results
from bitstack_nb.results.tables import format_table, table

SEEDS = range(3)
ORDERS = (TASKS, TASKS[::-1])
PAPER = [published("bitstack", 3.8), published("finetune", 14.5)]


def runs(strategy="bitstack", **settings) -> list[Result]:
    """A run per seed."""
    return [run(strategy, seed, **settings) for seed in SEEDS]


BITSTACK, FINETUNE, JOINT = runs(), runs("finetune"), runs("joint")
FRESH = {sparsity: runs(budget="fresh", sparsity=sparsity) for sparsity in (0.05, 0.4)}
SWEEP = [*BITSTACK, *runs(sparsity=0.4), *FRESH[0.05], *FRESH[0.4], *FINETUNE]
SINGLE = runs("single")
ALL = [*SWEEP, *JOINT, *SINGLE, *PAPER]
OF_RESULTS = (
    accuracy_matrices,
    forgetting_per_task,
    comparison,
    paired_differences,
    ablation,
    capacity,
    task_differences,
    accuracy_for_storage,
    drift_attribution,
)
FIGURES = {draw.__name__: lambda draw=draw: draw(ALL) for draw in OF_RESULTS}
FIGURES["lock_heatmaps"] = lambda: lock_heatmaps(BITSTACK[0])
TWENTY = [f"dbpedia_{number}-{number + 1}" for number in range(20)]
MANY_TASKS = [r for name in ("bitstack", "finetune", "single") for r in runs(name, tasks=TWENTY)]
OF_TASKS = (accuracy_matrices, forgetting_per_task, capacity, task_differences)
FIGURES |= {f"{draw.__name__}, 20 tasks": lambda draw=draw: draw(MANY_TASKS) for draw in OF_TASKS}
FIGURES["lock_heatmaps, 20 tasks"] = lambda: lock_heatmaps(MANY_TASKS[0])
every_figure = pytest.mark.parametrize("name", FIGURES)


@cache
def drawn(name: str) -> tuple[Figure, bytes]:
    """A figure and its picture, made once for the tests that only look at it."""
    figure = FIGURES[name]()
    return figure, png(figure)


def row(ax, label):
    """The mean, half width and single seeds in the row that the label begins."""
    names = [text.get_text() for text in ax.figure.axes[0].get_yticklabels()]
    (at,) = [at for at, name in enumerate(names) if name.startswith(label)]
    (container,) = [c for c in ax.containers if c.lines[0].get_ydata()[0] == at]
    mean = container.lines[0].get_xdata()[0]
    dots = [li for li in ax.lines if li.get_marker() == "o" and 0 < li.get_ydata()[0] - at < 0.5]
    seeds = [float(value) for line in dots for value in line.get_xdata()]
    if not container.has_xerr:
        return mean, None, seeds
    ((low, _), (high, _)) = container.lines[2][0].get_segments()[0]
    return mean, (high - low) / 2, seeds


def shares(ax):
    """The numbers of a heatmap's cells, NaN where it is blank."""
    return ax.collections[0].get_array().filled(np.nan)


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def out_of_view(figure):
    """The labels of ticks beyond an axis's ends, which are there but not drawn."""
    hidden = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks()
        hidden |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    return hidden


# Every figure -------------------------------------------------------------------------------------


@every_figure
def test_a_figure_has_a_title_units_and_nothing_small_or_cut_off(name):
    figure, _ = drawn(name)
    assert isinstance(figure, Figure) and figure.get_suptitle()
    labels = [ax.get_xlabel() + ax.get_ylabel() + ax.get_title() for ax in figure.axes]
    assert any(unit in " ".join(labels) for unit in ("%", "points"))
    width, height = figure.bbox.size
    for text in set(figure.findobj(Text)) - out_of_view(figure):
        if text.get_visible() and text.get_text():
            assert text.get_fontsize() >= 9, text
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, text


@every_figure
def test_labels_of_rows_and_titles_of_panels_do_not_overlap(name):
    figure, _ = drawn(name)
    hidden = out_of_view(figure)
    headings = [ax.title for ax in figure.axes if ax.get_title()]
    for texts in (headings, *(ax.get_yticklabels() for ax in figure.axes)):
        boxes = [text.get_window_extent() for text in texts if text not in hidden]
        for at, box in enumerate(boxes):
            assert not box.count_overlaps(boxes[at + 1 :])


@every_figure
def test_the_background_is_opaque_white(name):
    picture = imread(io.BytesIO(drawn(name)[1]))
    assert (picture[..., 3] == 1).all() and (picture[0, 0, :3] == 1).all()


@every_figure
def test_the_same_input_gives_the_same_picture_whatever_the_user_has_set(name):
    figure, expected = drawn(name)
    with mpl.rc_context():
        sns.set_theme(style="darkgrid", font_scale=2, palette="husl")
        plt.style.use("dark_background")
        mpl.rcParams |= {"savefig.dpi": 30, "font.family": "serif", "savefig.transparent": True}
        before = dict(mpl.rcParams)
        inline = io.BytesIO()  # as pyplot's inline backend draws what a cell returns
        FIGURES[name]().canvas.print_figure(inline, dpi=DPI, metadata={"Software": None})
        assert inline.getvalue() == expected
        assert png(FIGURES[name]()) == figure._repr_png_() == expected
        assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


@pytest.mark.parametrize("draw", OF_RESULTS)
def test_the_order_of_the_results_does_not_matter(draw):
    shuffled = (ALL[at] for at in np.random.default_rng(0).permutation(len(ALL)))
    assert png(draw(shuffled)) == drawn(draw.__name__)[1]


NOTHING = [(draw, [], "no results") for draw in OF_RESULTS] + [
    (accuracy_matrices, PAPER, "no result has an accuracy matrix"),
    (forgetting_per_task, [*JOINT, *PAPER], "no result has .*Forgetting"),
    (forgetting_per_task, runs(tasks=["imdb"]), "no result has .*Forgetting"),
    (comparison, [replace(PAPER[0], metrics={})], "no result has .*Accuracy"),
    (paired_differences, BITSTACK, "nothing to pair: no run of 'finetune'"),
    (ablation, FINETUNE, "no configuration has three sparsities.*bitstack"),
    (capacity, FINETUNE, "no result has locks.*bitstack"),
    (task_differences, FINETUNE, "nothing to pair: no run of 'single'"),
    (accuracy_for_storage, [*JOINT, *PAPER], "no result has recorded what its tasks take"),
    (drift_attribution, SINGLE, "no result has recorded its drift"),
]


@pytest.mark.parametrize(("draw", "results", "message"), NOTHING)
def test_without_anything_to_draw_the_error_says_what_is_missing(draw, results, message):
    with pytest.raises(ResultError, match=message):
        draw(results)


@pytest.mark.parametrize("draw", OF_RESULTS)
def test_synthetic_tasks_are_called_so(draw):
    embedded = [run(name, data="embedded") for name in ("bitstack", "finetune", "single")]
    embedded += [run(data="embedded", sparsity=sparsity) for sparsity in (0.05, 0.4)]
    assert "synthetic" in draw(embedded).get_suptitle()
    assert "synthetic" not in drawn(draw.__name__)[0].get_suptitle()


# Each figure --------------------------------------------------------------------------------------


def test_accuracy_matrices_are_means_over_seeds_on_one_scale():
    figure = accuracy_matrices([*BITSTACK, *JOINT, *PAPER])
    first, second, bar = figure.axes
    assert titles(figure) == ["BitStack union, n = 3", "joint training, n = 3"]
    for ax, results in ((first, BITSTACK), (second, JOINT)):
        mean = np.mean([np.array(r.matrix, dtype=float) for r in results], axis=0)
        np.testing.assert_allclose(shares(ax), mean)
        cells = [text.get_text() for text in ax.texts]
        assert cells == [f"{value:.0f}" for value in mean[np.isfinite(mean)]]
        assert ax.collections[0].get_clim() == (0, 100)
        assert [text.get_text() for text in ax.get_xticklabels()] == list(TASKS)
    assert [text.get_text() for text in first.get_yticklabels()] == list(TASKS)
    assert bar.get_ylabel() == "accuracy (%)"


def test_differences_on_a_task_are_those_of_its_pairs_whatever_its_place():
    """The task that seed 0 ends with is the first one of seed 1."""
    pairs = [(run(seed=s, tasks=t), run("single", s, tasks=t)) for s, t in enumerate(ORDERS)]
    figure = task_differences(result for pair in pairs for result in pair)
    assert titles(figure) == list(TASKS)
    own, base = ([r.matrix[-1] for r in column] for column in zip(*pairs, strict=True))
    expected = [own[0][2] - base[0][2], own[1][0] - base[1][0]]
    mean, half, seeds = row(figure.axes[2], "BitStack")
    np.testing.assert_allclose(seeds, expected)
    assert mean == pytest.approx(np.mean(expected)) and half is None


def test_storage_is_drawn_where_it_is():
    figure = accuracy_for_storage([*BITSTACK, *FINETUNE])
    (ax,) = figure.axes
    drawn = {tuple(c.lines[0].get_xydata()[0]) for c in ax.containers}
    stored = np.mean([r.storage["bytes"] / 1000 / len(TASKS) for r in BITSTACK])
    # Fine-tuning keeps nothing, which has no place of its own on a logarithmic scale.
    places = {stored: BITSTACK, stored / 10: FINETUNE}
    expected = [
        (place, np.mean([r.metrics["average_accuracy"] for r in results]))
        for place, results in places.items()
    ]
    np.testing.assert_allclose(sorted(drawn), sorted(expected))
    assert ax.get_xticks()[0] == pytest.approx(stored / 10)
    assert ax.get_xticklabels()[0].get_text() == "nothing"
    assert {"BitStack union", "fine-tuning"} == {text.get_text() for text in ax.texts}


def test_sparsities_stand_above_the_points_of_a_method():
    (ax,) = accuracy_for_storage([*BITSTACK, *runs(sparsity=0.4), *FINETUNE]).axes
    expected = ["0.12", "0.4", "BitStack union", "fine-tuning"]
    assert sorted(text.get_text() for text in ax.texts) == expected


def test_drift_is_what_returns_of_what_was_lost():
    figure = drift_attribution([*BITSTACK, *SINGLE])
    (ax,) = figure.axes
    expected = [r.drift["locked"]["accuracy"] - r.matrix[-1][0] for r in BITSTACK]
    mean, half, seeds = row(ax, "locked")
    np.testing.assert_allclose(seeds, expected)
    np.testing.assert_allclose([mean, half], mean_interval(expected))
    (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    lost = np.mean([r.matrix[0][0] - r.matrix[-1][0] for r in BITSTACK])
    assert dashed.get_xdata()[0] == pytest.approx(lost)


def test_matrices_over_different_orders_number_the_tasks():
    figure = accuracy_matrices([run(), run(seed=1, tasks=TASKS[::-1])])
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert names == ["task 1", "task 2", "task 3"]


def test_forgetting_per_task_has_the_seeds_and_their_interval():
    figure = forgetting_per_task([*BITSTACK, *FINETUNE, *JOINT])
    assert titles(figure) == list(TASKS[:-1])
    for at, ax in enumerate(figure.axes):
        assert len(ax.containers) == 2  # joint training has no row
        for label, results in (("BitStack", BITSTACK), ("fine-tuning", FINETUNE)):
            lost = [points_lost(r.matrix)[at] for r in results]
            mean, half, seeds = row(ax, label)
            assert (mean, half) == pytest.approx(mean_interval(lost))
            assert seeds == pytest.approx(lost)


def test_forgetting_follows_a_task_through_the_orders():
    turned = run(seed=1, tasks=TASKS[::-1])
    figure = forgetting_per_task([run(), turned])
    drawn = dict(zip(titles(figure), figure.axes, strict=True))
    assert set(drawn) == set(TASKS)
    assert row(drawn["dbpedia"], "BitStack")[0] == pytest.approx(points_lost(turned.matrix)[0])
    assert "n = 1 to 2" in figure.axes[0].get_yticklabels()[0].get_text()


def test_comparison_shows_metrics_and_marks_what_was_published():
    figure = comparison([*BITSTACK, *FINETUNE, *PAPER])
    assert [ax.get_xlabel() for ax in figure.axes] == ["%", "%", "points"]
    for ax, name in zip(
        figure.axes, ("average_accuracy", "learning_accuracy", "forgetting"), strict=True
    ):
        values = [r.metrics[name] for r in BITSTACK]
        mean, half, seeds = row(ax, "BitStack union, n = 3")
        assert (mean, half) == pytest.approx(mean_interval(values))
        assert seeds == pytest.approx(values)
    markers = [container.lines[0].get_marker() for container in figure.axes[2].containers]
    assert markers == ["o", "o", "D", "D"]
    assert row(figure.axes[2], "fine-tuning\npublished (gpt2), n = 1") == (14.5, None, [])


def test_where_nothing_is_forgotten_the_scale_is_points():
    """Before, it was that of rounding errors."""
    exact = [replace(r, metrics=r.metrics | {"forgetting": 0.0}) for r in FINETUNE]
    accuracy, _, forgetting = comparison(exact).axes
    assert forgetting.get_xlim() == (-1, 1)
    assert accuracy.get_xlim()[0] > 0


def test_settings_that_differ_are_in_the_labels():
    slow = runs(learning_rate=5e-5)
    fast = runs(learning_rate=1e-4)
    labels = [text.get_text() for text in comparison(slow + fast).axes[0].get_yticklabels()]
    assert labels == [
        "BitStack union\nlearning rate 5e-05, n = 3",
        "BitStack union\nlearning rate 0.0001, n = 3",
    ]
    labels = [text.get_text() for text in comparison(SWEEP).axes[0].get_yticklabels()]
    assert "BitStack union\nsparsity 0.4, n = 3" in labels and "fine-tuning, n = 3" in labels


def test_importance_other_than_by_gradient_is_part_of_the_method():
    """In the label's first line, with a colour of its own."""
    own = {"sparsity": 0.05, "learning_rate": 5e-4}
    measured = runs("recall", n_batches=8, **own)
    drawn = runs("recall", importance="random", **own)
    labels = [t.get_text() for t in comparison(measured + drawn).axes[0].get_yticklabels()]
    assert labels == ["exact recall, n = 3", "exact recall random, n = 3"]
    assert len({group.colour for group in grouped(measured + drawn)}) == 2


def test_differences_pair_the_seeds_with_the_same_settings():
    slow = [*runs(learning_rate=5e-5), *runs("finetune", learning_rate=5e-5)]
    fast = [*runs(learning_rate=1e-4), *runs("finetune", learning_rate=1e-4)[1:]]
    other = runs("joint", learning_rate=1)  # nothing to pair it with
    figure = paired_differences([*slow, *fast, *other, *PAPER])
    assert "fine-tuning" in figure.get_suptitle()
    for ax, name in zip(
        figure.axes, ("average_accuracy", "learning_accuracy", "forgetting"), strict=True
    ):
        ours, base = ([r.metrics[name] for r in own] for own in (slow[:3], slow[3:]))
        mean, half, seeds = row(ax, "BitStack union\nlearning rate 5e-05, n = 3")
        assert (mean, half) == pytest.approx(mean_interval(np.subtract(ours, base)))
        assert seeds == pytest.approx(np.subtract(ours, base))
        assert any(list(line.get_xdata()) == [0, 0] for line in ax.lines)
        ours, base = ([r.metrics[name] for r in own] for own in (fast[1:3], fast[3:]))
        mean, half, seeds = row(ax, "BitStack union\nlearning rate 0.0001, n = 2")
        assert seeds == pytest.approx(np.subtract(ours, base))
        assert mean == pytest.approx(np.mean(seeds)) and half is None  # of two seeds
    assert row(figure.axes[2], "BitStack union\npublished")[0] == pytest.approx(3.8 - 14.5)
    assert not any("joint" in text.get_text() for text in figure.axes[0].get_yticklabels())
    with_joint = paired_differences([*slow, *runs("joint", learning_rate=5e-5)], baseline="joint")
    assert "joint training" in with_joint.get_suptitle()
    assert len(with_joint.axes[0].get_yticklabels()) == 2


def test_ablation_draws_a_line_per_budget_from_fine_tuning_on():
    figure = ablation(SWEEP)
    kibibytes = [lambda r: mask_bytes(r) / 1024]
    locked = [lambda r: r.lock_stats[-1]["frozen_pct"] if r.lock_stats else 0]
    names = ("forgetting", "learning_accuracy", "average_accuracy")
    values = [lambda r, name=name: r.metrics[name] for name in names] + locked + kibibytes
    assert "KiB" in figure.axes[4].get_title()
    points = {
        "BitStack union": {0: FINETUNE, 0.12: BITSTACK, 0.4: SWEEP[3:6]},
        "BitStack fresh": {0: FINETUNE, **FRESH},
    }
    for ax, value in zip(figure.axes, values, strict=False):
        assert len(ax.lines) == 2
        for line, band in zip(ax.lines, ax.collections, strict=True):
            own = points[line.get_label().split(",")[0]]
            assert list(line.get_xdata()) == sorted(own)
            expected = [mean_interval([value(r) for r in runs]) for _, runs in sorted(own.items())]
            assert list(line.get_ydata()) == pytest.approx([mean for mean, _ in expected])
            ends = band.get_paths()[0].vertices[:, 1]
            assert ends.max() == pytest.approx(max(mean + half for mean, half in expected))
            assert ends.min() == pytest.approx(min(mean - half for mean, half in expected))


def test_an_own_sparsity_of_zero_comes_before_fine_tuning():
    zero = runs(sparsity=0)
    line = ablation([*BITSTACK, *runs(sparsity=0.4), *zero, *FINETUNE]).axes[0].lines[0]
    mean = np.mean([r.metrics["forgetting"] for r in zero])
    assert line.get_ydata()[0] == pytest.approx(mean)


def test_masks_weigh_what_their_file_holds(tmp_path):
    stack = BitStack(tiny.plain(), 0.3)
    stack.update(tiny.batches(2, seed=0))
    stack.save(tmp_path / "masks.safetensors")
    with safe_open(tmp_path / "masks.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key not in ("selected", "added")]  # noqa: SIM118
        held = sum(file.get_tensor(key).nbytes for key in keys)
    result = run()
    result.lock_stats = [stack.stats()]
    filling = held - mask_bytes(result)
    assert 0 <= filling < len(stack.masks)  # less than a byte per parameter
    assert mask_bytes(FINETUNE[0]) == 0 and mask_bytes(PAPER[0]) is None


def test_lock_heatmaps_show_each_tasks_choice_and_all_locks():
    result = BITSTACK[0]
    figure = lock_heatmaps(result)
    assert "synthetic" not in figure.get_suptitle()
    assert "synthetic" in lock_heatmaps(run(data="embedded")).get_suptitle()
    *panels, bar = figure.axes
    assert len(panels) == len(TASKS) + 1 and "%" in bar.get_xlabel()
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["0", "1", "other"]
    names = [text.get_text() for text in panels[-1].get_xticklabels()]
    assert names == ["query", "mlp.dense", "pooler.dense"]
    for number, ax in enumerate(panels, start=1):
        task, what = (number, "selected") if number <= len(TASKS) else (len(TASKS), "locked")
        expected = {
            (r["layer"], r["module"]): 100 * r[what] / r["eligible"]
            for r in result.locks
            if r["task"] == task
        }
        drawn = shares(ax)
        assert drawn.shape == (3, 3) and np.isfinite(drawn).sum() == len(expected) == 5
        for (layer, module), share in expected.items():
            at = (
                2 if layer is None else layer,
                ["attn.query", "mlp.dense", "pooler.dense"].index(module),
            )
            assert drawn[at] == pytest.approx(share)
    assert f"{result.lock_stats[-1]['frozen_pct']:.1f}% locked" in panels[-1].get_title()


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.bert, tiny.plain])
def test_a_live_stack_is_drawn_from_its_table(build):
    stack = BitStack(build(), 0.2)
    for seed in range(2):
        stack.update(tiny.batches(2, seed=seed))
    table = stack.layer_table()
    figure = lock_heatmaps(table)
    *panels, _ = figure.axes
    assert len(panels) == 3 and panels[0].get_title().startswith("task 1 ")
    last = table[table["task"] == 2]
    expected = sorted(100 * last["lock_fraction"])
    drawn = shares(panels[-1])
    assert sorted(drawn[np.isfinite(drawn)]) == pytest.approx(expected)
    bars = capacity(table).axes[0].patches
    assert bars[1].get_x() + bars[1].get_width() == pytest.approx(stack.stats()["frozen_pct"])


def test_locks_that_are_not_there_are_named():
    with pytest.raises(ResultError, match=r"no locks of strategy 'finetune'.*bitstack"):
        lock_heatmaps(FINETUNE[0])
    with pytest.raises(ResultError, match=r"no locks in this table.*update"):
        lock_heatmaps(BitStack(tiny.plain(), 0.2).layer_table())
    stack = BitStack(tiny.plain(), 0.2)
    stack.update(tiny.batches(1, seed=0))
    with pytest.raises(ResultError, match="lacks eligible, selected"):
        lock_heatmaps(stack.layer_table().drop(columns=["selected", "eligible"]))


def test_capacity_adds_up_task_by_task_to_what_is_left():
    figure = capacity([*BITSTACK, *FINETUNE])
    ax = figure.axes[0]
    after = np.mean([[s["frozen_pct"] for s in r.lock_stats] for r in BITSTACK], axis=0)
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == pytest.approx([*after, 100])
    assert [bar.get_x() for bar in ax.patches] == pytest.approx([0, *after])
    note = figure.findobj(lambda a: isinstance(a, Text) and "left\n" not in a.get_text())
    mean, half = mean_interval([r.lock_stats[-1]["frozen_pct"] for r in BITSTACK])
    expected = f"{mean:.1f} ± {half:.1f} % locked\n{100 - mean:.1f} % left"
    assert expected in [text.get_text() for text in note]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(f"locked by {task}" for task in TASKS), "left"]


# Where they are shown and written -----------------------------------------------------------------


def test_a_notebook_shows_a_returned_figure_as_one_png():
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(comparison(BITSTACK))
    assert data["image/png"][:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def recorded(tmp_path):
    for at, result in enumerate([*BITSTACK, *runs(sparsity=0.4), *FINETUNE, *SINGLE]):
        result.save(tmp_path / "recorded" / f"{at}.json")
    return tmp_path / "recorded"


def test_the_command_writes_every_figure_and_says_so(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["figures", str(recorded), "--output", str(out)]) == 0
    files = sorted(out.iterdir())
    assert sorted(capsys.readouterr().out.split()) == [str(file) for file in files]
    of_a_run = {"lock_heatmaps", "mask_weight", "task_overlap"}
    names = {draw.__name__ for draw in OF_RESULTS} | {f"{name}_bitstack_union" for name in of_a_run}
    assert {file.name for file in files} == {f"{name}.png" for name in names} | {"tables.md"}
    expected = png(comparison(load_results(recorded)), dpi=FILE_DPI)
    assert (out / "comparison.png").read_bytes() == expected
    tables = (out / "tables.md").read_text()
    assert format_table(table(load_results(recorded))) in tables
    assert "separate models, task by task" in tables and "random mask" not in tables


def test_the_command_says_what_cannot_be_drawn(tmp_path, capsys):
    for result in PAPER:
        result.save(tmp_path / f"{result.protocol['strategy']}.json")
    assert main(["figures", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "no capacity: no result has locks" in capsys.readouterr().out
    assert not (tmp_path / "out" / "capacity.png").exists()


def test_without_names_all_that_is_recorded_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in RECORDED:
        PAPER[0].save(folder / "one.json")
    point = {"what": "update", "parameters": 10, "tasks": 5, "ratio": 1.0}
    costs = CostReport(device="cpu", costs={"update": {"value": 1.04}}, growth=[point])
    costs.save(RECORDED_COSTS / "cpu.json")
    assert main(["figures"]) == 0
    figures = tmp_path / "results" / "figures"
    drawn = {str(Path("results", f.parent.relative_to(figures))) for f in figures.rglob("*.png")}
    assert drawn == {*map(str, RECORDED), "results/cost-cpu"}
    written = (figures / "cost-cpu" / "tables.md").read_text()
    assert format_table(cost_table(costs)) in written
    said = capsys.readouterr().out
    assert all(f"{folder.name}/comparison.png" in said for folder in RECORDED)


@pytest.mark.parametrize("missing", [["nowhere"], []])  # no folder of that name; none recorded here
def test_without_results_the_command_says_so_in_one_line(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    assert main(["figures", *missing]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read the result") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_results_that_contradict_each_other_are_refused(recorded, tmp_path, capsys):
    again = replace(BITSTACK[0], metrics=BITSTACK[1].metrics)
    again.save(recorded / "again.json")
    assert main(["figures", str(recorded), "--output", str(tmp_path / "out")]) == 2
    assert "two different results" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_figure_that_cannot_be_written_is_named_and_nothing_half_is_left(tmp_path, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    PAPER[0].save(tmp_path / "in.json")
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk would stop it
    try:
        assert main(["figures", str(tmp_path / "in.json"), "--output", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"error: .*cannot write the file.*comparison\.png", capsys.readouterr().err)
    assert not list(out.iterdir())
