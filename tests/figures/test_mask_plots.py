"""Figures of what masks share and weigh: they show the numbers of the run they are given."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import toy_results

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.benchmark.curves import CurveRecorder, LockCurves
from bitstack_nb.figures.masks import mask_weight, owned_entries, ownership, task_overlap
from bitstack_nb.figures.style import png
from bitstack_nb.results.result import ResultError


@pytest.fixture(scope="module")
def result():
    stack = BitStack(tiny.gpt2(), 0.12)
    recorder = CurveRecorder(stack.masks)
    stats = []
    for seed in range(len(toy_results.TASKS)):
        stats.append(stack.update(tiny.batches(2, seed=seed), observe=recorder.add))
    made = toy_results.run()
    return replace(made, importance=recorder.curves().to_record(), lock_stats=stats)


def test_overlap_is_that_of_the_curves_at_each_sparsity(result):
    figure = task_overlap(result, sparsities=(0.05, 0.3))
    curves = LockCurves.from_record(result.importance)
    for ax, sparsity in zip(figure.axes, (0.05, 0.3), strict=False):
        shown = np.reshape([int(text.get_text()) for text in ax.texts], (3, 3))
        assert np.abs(shown - 100 * curves.overlap(sparsity)).max() <= 0.5 + 1e-9
        assert f"{sparsity:.0%}" in ax.get_title()
        assert [label.get_text() for label in ax.get_xticklabels()] == list(toy_results.TASKS)
    assert png(figure) == png(task_overlap(result, sparsities=(0.05, 0.3)))


def test_weights_are_a_bit_an_entry_and_four_bytes_a_value(result):
    stats = result.lock_stats[-1]
    (ax,) = mask_weight(result).axes
    shown = [2**20 * bar.get_width() for bar in ax.patches]
    mask, copy = (stats["eligible"] + 7) // 8, 4 * stats["total"]
    # The record is off by at most 0.1 points of the eligible entries.
    assert shown[2] == pytest.approx(4 * stats["locked"], abs=4 * 0.001 * stats["eligible"])
    assert shown[:2] + shown[3:] == pytest.approx([mask, 3 * mask, copy, 3 * copy])


@pytest.fixture(scope="module")
def recalled():
    """Four tasks."""
    stack = ExactRecall(tiny.gpt2(), 0.2, importance="gradient")
    for seed in range(4):
        stack.begin(str(seed), loader=tiny.batches(2, seed=seed), head_steps=0)
        stack.close()
    return stack


def test_ownership_adds_up_to_what_is_owned(recalled):
    table = recalled.layer_table()
    figure = ownership(table)
    layers, modules = figure.axes
    for ax, column in ((layers, "layer"), (modules, "module")):
        for row, (_, own) in enumerate(table.groupby(column, sort=False, dropna=False)):
            bars = [bar for bar in ax.patches if round(bar.get_y() + bar.get_height() / 2) == row]
            expected = own.groupby("task")[["added", "eligible"]].sum()
            shares = 100 * expected["added"] / expected["eligible"]
            assert [bar.get_width() for bar in bars] == pytest.approx(shares.tolist())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"task {number}" for number in range(1, 5)
    ]
    assert png(figure) == png(ownership(table))


def test_owned_entries_are_the_owners(recalled):
    name = "transformer.h.0.attn.c_attn.weight"
    figure = owned_entries(recalled, name, size=12)
    (image,) = figure.axes[0].images
    owners = sum((task + 1) * recalled.mask(str(task))[name].int() for task in range(4))
    assert np.array_equal(image.get_array(), owners[:12, :12])
    assert name in figure.get_suptitle()
    with pytest.raises(ValueError, match=r"bias has shape .*two dimensions"):
        owned_entries(recalled, name.replace("weight", "bias"))


def test_runs_without_recorded_importance_are_refused():
    for draw in (task_overlap, mask_weight):
        with pytest.raises(ResultError, match="no recorded importance"):
            draw(toy_results.run("finetune"))
