"""Figures of what masks share and weigh: they show the numbers of the run they are given."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import toy_results

from bitstack_nb import BitStack
from bitstack_nb.curves import CurveRecorder, LockCurves
from bitstack_nb.mask_plots import mask_weight, task_overlap
from bitstack_nb.plot_style import png
from bitstack_nb.results import ResultError


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


def test_runs_without_recorded_importance_are_refused():
    for draw in (task_overlap, mask_weight):
        with pytest.raises(ResultError, match="no recorded importance"):
            draw(toy_results.run("finetune"))
