"""Figures of locked and own weights show the numbers of the run or the stack."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import toy_figures as toy
from safetensors import safe_open
from toy_figures import BITSTACK, FINETUNE, FRESH, PAPER, TASKS, UNION, runs

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.benchmark.curves import LockCurves
from bitstack_nb.figures.locks import (
    ablation,
    capacity,
    lock_heatmaps,
    mask_bytes,
    mask_weight,
    own_weights,
    task_overlap,
)
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.result import ResultError


def test_ablation_draws_a_line_per_budget_from_fine_tuning_on():
    figure = ablation(toy.SWEEP)
    metrics = ("forgetting", "learning_accuracy", "average_accuracy")
    values = [lambda r, name=name: r.metrics[name] for name in metrics]
    values.append(lambda r: r.lock_stats[-1]["frozen_pct"] if r.lock_stats else 0)
    values.append(mask_bytes)
    points = {"BitStack, union": {0: FINETUNE, **UNION}, "BitStack, fresh": {0: FINETUNE, **FRESH}}
    for ax, value in zip(figure.axes, values, strict=False):
        assert len(ax.lines) == 2 and len({line.get_color() for line in ax.lines}) == 1
        assert len({line.get_linestyle() for line in ax.lines}) == 2
        for line, band in zip(ax.lines, ax.collections, strict=True):
            own = points[line.get_label().partition(", n")[0]]
            assert list(line.get_xdata()) == sorted(own)
            expected = [mean_interval([value(r) for r in runs]) for _, runs in sorted(own.items())]
            assert list(line.get_ydata()) == pytest.approx([mean for mean, _ in expected])
            ends = band.get_paths()[0].vertices[:, 1]
            assert ends.max() == pytest.approx(max(mean + half for mean, half in expected))
    zero = runs(sparsity=0)
    line = ablation([*BITSTACK, *UNION[0.4], *zero, *FINETUNE]).axes[0].lines[0]
    assert line.get_ydata()[0] == pytest.approx(np.mean([r.metrics["forgetting"] for r in zero]))


def test_masks_take_the_bytes_that_their_file_holds(tmp_path):
    stack = BitStack(tiny.plain(), 0.3)
    stack.update(tiny.batches(2, seed=0))
    stack.save(tmp_path / "masks.safetensors")
    with safe_open(tmp_path / "masks.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key not in ("selected", "added")]  # noqa: SIM118
        held = sum(file.get_tensor(key).nbytes for key in keys)
    result = toy.run()
    result.lock_stats = [stack.stats()]
    assert 0 <= held - mask_bytes(result) < len(stack.masks)  # less than a byte per parameter
    assert mask_bytes(FINETUNE[0]) == 0 and mask_bytes(PAPER[0]) is None
    stats = BITSTACK[0].lock_stats[-1]
    mask, copy = (stats["eligible"] + 7) // 8, 4 * stats["total"]
    drawn = [dot.get_xdata()[0] for dot in mask_weight(BITSTACK[0]).axes[0].lines]
    assert drawn == pytest.approx([mask, 3 * mask, 4 * stats["locked"], copy, 3 * copy])


def test_lock_heatmaps_show_each_tasks_choice_and_all_locks():
    result = BITSTACK[0]
    *panels, bar = lock_heatmaps(result).axes
    assert len(panels) == len(TASKS) + 1 and "%" in bar.get_xlabel()
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["0", "1", "other"]
    modules = ["attn.query", "mlp.dense", "pooler.dense"]
    names = [text.get_text() for text in panels[-1].get_xticklabels()]
    assert names == ["query", "mlp.dense", "pooler.dense"]
    for number, ax in enumerate(panels, start=1):
        task, what = (number, "selected") if number <= len(TASKS) else (len(TASKS), "locked")
        expected = np.full((3, 3), np.nan)
        for r in (r for r in result.locks if r["task"] == task):
            layer = 2 if r["layer"] is None else r["layer"]
            expected[layer, modules.index(r["module"])] = 100 * r[what] / r["eligible"]
        np.testing.assert_allclose(toy.shares(ax), expected)
        numbers = [f"{share:.0f}" for share in expected[np.isfinite(expected)]]
        assert [text.get_text() for text in ax.texts] == numbers
    assert f"{result.lock_stats[-1]['frozen_pct']:.1f} % locked" in panels[-1].get_title()


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.bert, tiny.plain])
def test_a_live_stack_is_drawn_from_its_table(build):
    stack = BitStack(build(), 0.2)
    with pytest.raises(ResultError, match=r"no locks in this table.*update"):
        lock_heatmaps(stack.layer_table())
    for seed in range(2):
        stack.update(tiny.batches(2, seed=seed))
    table = stack.layer_table()
    *panels, _ = lock_heatmaps(table).axes
    assert len(panels) == 3 and panels[0].get_title().startswith("task 1 ")
    drawn = toy.shares(panels[-1])
    expected = sorted(100 * table[table["task"] == 2]["lock_fraction"])
    assert sorted(drawn[np.isfinite(drawn)]) == pytest.approx(expected)
    bars = capacity(table).axes[0].patches
    assert bars[1].get_x() + bars[1].get_width() == pytest.approx(stack.stats()["frozen_pct"])


def test_capacity_adds_up_task_by_task_to_what_is_left():
    figure = capacity([*BITSTACK, *FINETUNE])
    ax = figure.axes[0]
    after = np.mean([[s["frozen_pct"] for s in r.lock_stats] for r in BITSTACK], axis=0)
    assert [bar.get_x() + bar.get_width() for bar in ax.patches] == pytest.approx([*after, 100])
    assert [bar.get_x() for bar in ax.patches] == pytest.approx([0, *after])
    mean, half = mean_interval([r.lock_stats[-1]["frozen_pct"] for r in BITSTACK])
    notes = [text.get_text() for child in ax.child_axes for text in child.get_yticklabels()]
    assert notes == [f"{mean:.1f} ± {half:.1f} % locked\n{100 - mean:.1f} % left"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(f"locked by {task}" for task in TASKS), "left"]


def test_overlap_is_that_of_the_curves_at_each_sparsity():
    figure = task_overlap(BITSTACK[0], sparsities=(0.05, 0.3))
    curves = LockCurves.from_record(BITSTACK[0].importance)
    for ax, sparsity in zip(figure.axes, (0.05, 0.3), strict=False):
        np.testing.assert_allclose(toy.shares(ax), 100 * curves.overlap(sparsity))
        assert ax.get_title().startswith(f"sparsity {100 * sparsity:g} %")
        assert [label.get_text() for label in ax.get_xticklabels()] == list(TASKS)


@pytest.fixture(scope="module")
def recall():
    made = ExactRecall(tiny.gpt2(), 0.2, importance="gradient")
    for seed in range(4):
        made.begin(f"t{seed}", loader=tiny.batches(2, seed=seed), head_steps=0)
        made.close()
    return made


def test_own_weights_are_the_masks_of_the_tasks(recall):
    name = "transformer.h.0.attn.c_attn.weight"
    (image,) = own_weights(recall, name, size=40).axes[0].images
    shown = image.get_array()
    masks = [recall.mask(task)[name][:40, :40].numpy() for task in recall.names]
    assert np.array_equal(shown > 0, np.any(masks, axis=0))
    several = np.sum(masks, axis=0) > 1
    assert several.any() and np.array_equal(shown == 5, several)
    for number, mask in enumerate(masks, start=1):
        assert np.array_equal(shown == number, mask & ~several)
    with pytest.raises(ValueError, match=r"bias has shape .*two dimensions"):
        own_weights(recall, name.replace("weight", "bias"))
