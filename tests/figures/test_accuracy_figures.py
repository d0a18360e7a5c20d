"""Figures of accuracy show the numbers of the results, under the names of the methods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import toy_figures as toy
from toy_figures import BITSTACK, FINETUNE, JOINT, PAPER, SINGLE, TASKS, row, run, runs, titles

from bitstack_nb.figures.accuracy import (
    accuracy_for_storage,
    accuracy_matrices,
    comparison,
    drift_attribution,
    forgetting_per_task,
    paired_differences,
    task_differences,
)
from bitstack_nb.figures.methods import grouped, method
from bitstack_nb.results import frame
from bitstack_nb.results.metrics import forgetting_per_task as points_lost
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.result import ResultError

METRICS = ("average_accuracy", "learning_accuracy", "forgetting")


def test_methods_have_one_name_one_colour_and_one_order():
    names = ("single", "recall", "bitstack", "random-mask", "finetune")
    groups = grouped(frame(run(name) for name in names))
    assert [group.label for group in groups] == [method(name).label for name in names[::-1]]
    assert [group.label for group in groups][-2:] == ["exact recall", "separate models"]
    assert [group.colour for group in groups] == [method(name).colour for name in names[::-1]]
    assert len({group.colour for group in groups}) == len(names)
    own = runs("recall", sparsity=0.05, learning_rate=5e-4)
    more = [*runs("recall", sparsity=0.05, importance="random"), *runs("recall", sparsity=0.01)]
    groups = grouped(frame([*own, *more, *FINETUNE, *PAPER]))
    assert [group.label for group in groups] == [
        "fine-tuning",
        "exact recall, 1 % own weights, by gradient",
        "exact recall, 5 % own weights, by gradient",
        "exact recall, 5 % own weights, random",
        "fine-tuning, published (gpt2)",
        "BitStack, published (gpt2)",
    ]
    assert [group.marker for group in groups] == ["o", "o", "o", "s", "D", "D"]
    assert len({group.colour for group in groups[1:4]}) == 1


def test_settings_are_named_where_they_tell_configurations_apart():
    rates = [*runs(learning_rate=5e-5), *runs(learning_rate=1e-4), *FINETUNE]
    assert toy.row_names(comparison(rates)) == [
        "fine-tuning, n = 3",
        "BitStack, learning rate 5e-05, n = 3",
        "BitStack, learning rate 0.0001, n = 3",
    ]
    names = toy.row_names(comparison(toy.SWEEP))
    assert "BitStack, sparsity 40 %, union, n = 3" in names and "fine-tuning, n = 3" in names


def test_accuracy_matrices_are_means_over_seeds_on_one_scale():
    figure = accuracy_matrices([*BITSTACK, *JOINT, *PAPER])
    *panels, bar = figure.axes
    assert [" ".join(title.split()) for title in titles(figure)] == [
        "BitStack, n = 3",
        "joint training, n = 3",
    ]
    for ax, results in zip(panels, (BITSTACK, JOINT), strict=True):
        mean = np.mean([np.array(r.matrix, dtype=float) for r in results], axis=0)
        np.testing.assert_allclose(toy.shares(ax), mean)
        assert [t.get_text() for t in ax.texts] == [f"{v:.0f}" for v in mean[np.isfinite(mean)]]
        assert ax.collections[0].get_clim() == (0, 100)
        assert [text.get_text() for text in ax.get_xticklabels()] == list(TASKS)
    assert bar.get_ylabel() == "accuracy (%)"
    turned = accuracy_matrices([run(), run(seed=1, tasks=TASKS[::-1])])
    names = [text.get_text() for text in turned.axes[0].get_xticklabels()]
    assert names == ["task 1", "task 2", "task 3"]


def test_comparison_shows_metrics_and_marks_what_was_published():
    figure = comparison([*BITSTACK, *FINETUNE, *PAPER])
    assert [ax.get_xlabel().split()[0] for ax in figure.axes] == ["%", "%", "points"]
    for ax, name in zip(figure.axes, METRICS, strict=True):
        values = [r.metrics[name] for r in BITSTACK]
        mean, half, seeds = row(ax, "BitStack, n")
        assert (mean, half) == pytest.approx(mean_interval(values))
        assert seeds == pytest.approx(values)
    assert row(figure.axes[2], "fine-tuning, published")[0] == 14.5
    exact = [replace(r, metrics=r.metrics | {"forgetting": 0.0}) for r in FINETUNE]
    assert comparison(exact).axes[2].get_xlim() == (-1, 1)  # and not the scale of rounding errors


def test_forgetting_follows_a_task_through_the_orders():
    figure = forgetting_per_task([*BITSTACK, *FINETUNE, *JOINT])
    assert titles(figure) == list(TASKS[:-1])
    for at, ax in enumerate(figure.axes):
        assert len(ax.containers) == 2  # joint training has no row
        lost = [points_lost(r.matrix)[at] for r in BITSTACK]
        mean, half, seeds = row(ax, "BitStack")
        assert (mean, half) == pytest.approx(mean_interval(lost))
        assert seeds == pytest.approx(lost)
    turned = run(seed=1, tasks=TASKS[::-1])
    figure = forgetting_per_task([run(), turned])
    drawn = dict(zip(titles(figure), figure.axes, strict=True))
    assert row(drawn["dbpedia"], "BitStack")[0] == pytest.approx(points_lost(turned.matrix)[0])
    assert toy.row_names(figure) == ["BitStack, n = 1 to 2"]


def test_differences_pair_the_seeds_with_the_same_settings():
    slow = [*runs(learning_rate=5e-5), *runs("finetune", learning_rate=5e-5)]
    fast = [*runs(learning_rate=1e-4), *runs("finetune", learning_rate=1e-4)[1:]]
    alone = runs("joint", learning_rate=1)
    figure = paired_differences([*slow, *fast, *alone, *PAPER])
    assert "fine-tuning" in figure.get_suptitle()
    for ax, name in zip(figure.axes, METRICS, strict=True):
        ours, base = ([r.metrics[name] for r in own] for own in (slow[:3], slow[3:]))
        mean, half, seeds = row(ax, "BitStack, learning rate 5e-05")
        assert (mean, half) == pytest.approx(mean_interval(np.subtract(ours, base)))
        assert seeds == pytest.approx(np.subtract(ours, base))
        ours, base = ([r.metrics[name] for r in own] for own in (fast[1:3], fast[3:]))
        mean, half, seeds = row(ax, "BitStack, learning rate 0.0001")
        assert seeds == pytest.approx(np.subtract(ours, base))
        assert mean == pytest.approx(np.mean(seeds)) and half is None  # of two seeds
    assert row(figure.axes[2], "BitStack, published")[0] == pytest.approx(3.8 - 14.5)
    assert not any("joint" in name for name in toy.row_names(figure))
    other = paired_differences([*slow, *runs("joint", learning_rate=5e-5)], baseline="joint")
    assert "joint training" in other.get_suptitle() and len(toy.row_names(other)) == 2


def test_differences_on_a_task_are_those_of_its_pairs_whatever_its_place():
    orders = (TASKS, TASKS[::-1])  # seed 1 begins with the task that seed 0 ends with
    pairs = [(run(seed=s, tasks=t), run("single", s, tasks=t)) for s, t in enumerate(orders)]
    figure = task_differences(result for pair in pairs for result in pair)
    assert titles(figure) == list(TASKS)
    own, base = ([r.matrix[-1] for r in column] for column in zip(*pairs, strict=True))
    expected = [own[0][2] - base[0][2], own[1][0] - base[1][0]]
    assert row(figure.axes[2], "BitStack")[2] == pytest.approx(expected)


def test_storage_is_drawn_where_it_is():
    (ax,) = accuracy_for_storage([*BITSTACK, *FINETUNE]).axes
    drawn = {tuple(c.lines[0].get_xydata()[0]) for c in ax.containers}
    stored = np.mean([r.storage["bytes"] / len(TASKS) for r in BITSTACK])
    # Fine-tuning keeps nothing, which has no place of its own on a logarithmic scale.
    expected = [
        (place, np.mean([r.metrics["average_accuracy"] for r in results]))
        for place, results in {stored: BITSTACK, stored / 10: FINETUNE}.items()
    ]
    np.testing.assert_allclose(sorted(drawn), sorted(expected))
    assert ax.get_xticks()[0] == pytest.approx(stored / 10)
    assert ax.get_xticklabels()[0].get_text() == "no storage"
    assert {text.get_text() for text in ax.get_xticklabels()[1:]} <= {"10 kB", "100 kB"}
    figure = accuracy_for_storage([*BITSTACK, *toy.UNION[0.4], *FINETUNE])
    assert [text.get_text() for text in figure.axes[0].texts] == ["12 %", "40 %"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["fine-tuning", "BitStack"]


def test_storage_in_its_smallest_form():
    """Ranks stand at the points of a method as sparsities do; no storage needs no smaller form."""
    ranks = [r for rank in (1, 8) for r in runs("lora", rank=rank)]
    for result in ranks:
        result.storage |= {"bytes": 6000 * result.protocol["rank"]}
    with pytest.raises(ResultError, match="a run of LoRA has not recorded its smallest form"):
        accuracy_for_storage([*ranks, *FINETUNE], best=True)
    for result in ranks:
        result.storage |= {"best_bytes": result.storage["bytes"] // 2}
    (ax,) = accuracy_for_storage([*ranks, *FINETUNE], best=True).axes
    places = sorted(x for c in ax.containers for x in c.lines[0].get_xdata())
    assert places == pytest.approx([100, 1000, 8000])
    assert [text.get_text() for text in ax.texts] == ["rank 1", "rank 8"]
    assert "bf16" in ax.get_xlabel()


def test_drift_is_what_returns_of_what_was_lost():
    figure = drift_attribution([*BITSTACK, *SINGLE])
    assert titles(figure) == ["all weights", "norms", "attention", "MLP", "locked", "free"]
    end = [r.matrix[-1][0] for r in BITSTACK]
    for at, accuracies in {
        0: [r.matrix[0][0] for r in BITSTACK],
        4: [r.drift["locked"]["accuracy"] for r in BITSTACK],
    }.items():
        expected = np.subtract(accuracies, end)
        mean, half, seeds = row(figure.axes[at], "BitStack")
        assert seeds == pytest.approx(expected)
        assert (mean, half) == pytest.approx(mean_interval(expected))
    assert toy.row_names(figure) == ["BitStack, n = 3"]
