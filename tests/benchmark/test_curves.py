"""Lock curves: at every sparsity what a stack would lock, counted exactly."""

import json

import numpy as np
import pytest
import tiny
import torch

from bitstack_nb import BitStack
from bitstack_nb.benchmark.curves import SPARSITIES, CurveRecorder, LockCurves

COUNTS = ["layer", "module", "task", "eligible", "selected", "added", "locked"]
LOADERS = [tiny.batches(2, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def curves():
    """Of three tasks; the weights stay as they are, so every sparsity has the same importance."""
    return tiny.record_curves(BitStack(tiny.gpt2(), 0.12), LOADERS).curves()


@pytest.mark.parametrize("budget", ["union", "fresh"])
@pytest.mark.parametrize("sparsity", [0, 0.01, 0.12, 0.2, 0.4, 0.5])
def test_the_table_is_that_of_a_stack_at_that_sparsity(curves, sparsity, budget):
    stack = BitStack(tiny.gpt2(), sparsity, budget=budget)
    for loader in LOADERS:
        stack.update(loader)
    found, expected = curves.layer_table(sparsity, budget), stack.layer_table()
    for column in COUNTS:
        assert found[column].tolist() == expected[column].tolist(), column
    assert np.allclose(found["lock_fraction"], expected["lock_fraction"], atol=1e-12)
    assert found.dtypes.to_dict() == expected.dtypes.to_dict()


@pytest.mark.parametrize("budget", ["union", "fresh"])
def test_the_record_is_within_a_tenth_of_a_point(curves, budget):
    read = LockCurves.from_record(json.loads(json.dumps(curves.to_record())))
    assert read.cells == curves.cells
    for sparsity in SPARSITIES:
        exact, rounded = (c.layer_table(sparsity, budget) for c in (curves, read))
        assert (exact["lock_fraction"] - rounded["lock_fraction"]).abs().max() <= 0.0005 + 1e-12
        totals = [
            t.groupby("task")["locked"].sum() / t["eligible"].sum() * 3 for t in (exact, rounded)
        ]
        assert (totals[0] - totals[1]).abs().max() <= 0.001
        assert np.allclose(read.overlap(sparsity), curves.overlap(sparsity), atol=1e-12)


def test_overlap_is_the_jaccard_index_of_what_tasks_chose(curves):
    stacks = [BitStack(tiny.gpt2(), 0.12) for _ in LOADERS]
    chosen = []
    for stack, loader in zip(stacks, LOADERS, strict=True):
        stack.update(loader)
        chosen.append(torch.cat([mask.flatten() for mask in stack.masks.values()]))
    overlap = curves.overlap(0.12)
    for i, first in enumerate(chosen):
        for j, second in enumerate(chosen):
            expected = float((first & second).sum() / (first | second).sum())
            assert overlap[i, j] == pytest.approx(expected, abs=1e-6)
    assert curves.overlap(0).max() == 0


def test_what_was_locked_before_counts_as_locked_at_every_sparsity():
    """A live stack's next task, on top of what it holds."""
    stack = BitStack(tiny.gpt2(), 0.3, budget="fresh")
    stack.update(LOADERS[0])
    before = stack.layer_table()
    recorder = tiny.record_curves(stack, LOADERS[1:2])
    curves = recorder.curves()
    for budget in ("union", "fresh"):
        assert curves.layer_table(0, budget)["locked"].tolist() == before["locked"].tolist()
    found, after = curves.layer_table(0.3, "fresh"), stack.layer_table()
    after = after[after["task"] == 2]
    assert found["locked"].tolist() == after["locked"].tolist()
    assert found["added"].tolist() == after["added"].tolist()


def test_a_recorder_goes_on_from_its_state():
    stack = BitStack(tiny.plain(), 0.1)
    unbroken = tiny.record_curves(stack, LOADERS)
    first = tiny.record_curves(BitStack(tiny.plain(), 0.1), LOADERS[:1])
    second = CurveRecorder(BitStack(tiny.plain(), 0.1).masks)
    second.load_state_dict(first.state_dict())
    other = BitStack(tiny.plain(), 0.1)
    for loader in LOADERS[1:]:
        other.update(loader, observe=second.add)
    assert second.curves().to_record() == unbroken.curves().to_record()


def test_observing_changes_nothing():
    watched, alone = (
        BitStack(tiny.gpt2(), 0.12, budget="fresh"),
        BitStack(tiny.gpt2(), 0.12, budget="fresh"),
    )
    tiny.record_curves(watched, LOADERS)
    for loader in LOADERS:
        alone.update(loader)
    assert all(torch.equal(mask, alone.masks[name]) for name, mask in watched.masks.items())


def test_unusable_requests_name_what_is_there(curves):
    with pytest.raises(ValueError, match=r"0\.123.*nearest is 0\.12"):
        curves.layer_table(0.123, "union")
    with pytest.raises(ValueError, match="no recorded importance"):
        LockCurves.from_record({})
