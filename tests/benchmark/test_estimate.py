"""The estimate of a run's time: what it counts, and that the measuring leaves no trace."""

import random
from dataclasses import replace

import pytest
import torch

from bitstack_nb import Protocol, Result, run
from bitstack_nb.benchmark import estimates, runner
from bitstack_nb.benchmark.estimates import estimate
from bitstack_nb.benchmark.sequence import TaskSequence

SMALL = Protocol(
    tasks=("imdb", "ag_news"), train_size=160, test_size=56, max_length=24, epochs=1, batch_size=16
)
COSTS = ("step", "batch", "stage")


def counted(protocol, folder, monkeypatch) -> dict[str, float]:
    """How often an estimate counts each cost."""
    found = {}
    for cost in COSTS:
        seconds = {name: float(name == cost) for name in COSTS}
        with monkeypatch.context() as patch:
            patch.setattr(estimates, "_costs", lambda sequence, own=seconds: own)
            low, found[cost] = estimate([protocol], output=folder)
            assert low == found[cost]
    return found


def test_it_counts_steps_batches_and_stages(tmp_path, monkeypatch):
    found = counted(replace(SMALL, epochs=2), tmp_path, monkeypatch)
    batches = 1 + 2 + 5  # after each task, and for five groups' drift; 56 texts are one batch
    assert found == {"step": 40, "batch": batches, "stage": 2}


@pytest.mark.parametrize("strategy", ["bitstack", "recall", "ewc", "lora", "joint", "probe"])
def test_every_cost_is_timed(tmp_path, monkeypatch, strategy):
    """And nothing is left of it: neither in the random state nor in the folder."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    seen, real = [], estimates._costs
    monkeypatch.setattr(
        estimates, "_costs", lambda sequence: seen.append(real(sequence)) or seen[-1]
    )
    settings = {"n_batches": 2} if strategy in ("bitstack", "ewc") else {}
    low, high = estimate([SMALL.with_strategy(strategy, **settings)], output=tmp_path / "none")
    assert 0 < low <= high
    assert seen[0].keys() == set(COSTS)
    for name, cost in seen[0].items():
        assert 0 < cost[0] <= cost[1] or (strategy, name) == ("probe", "step"), seen
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_written_where_the_run_writes_it(tmp_path, monkeypatch):
    """While the hooks of a first task's locks are on; and nothing is left there."""
    seen, real = [], TaskSequence.save_stage

    def note(sequence: TaskSequence, number: int) -> None:
        real(sequence, number)
        locked = sum(int(mask.sum()) for mask in sequence.strategy.masks().values())
        seen.append((number, sequence.state.is_relative_to(tmp_path), locked > 0))

    monkeypatch.setattr(TaskSequence, "save_stage", note)
    estimate([SMALL.with_strategy("bitstack", n_batches=2)], output=tmp_path)
    assert seen == [(1, True, True), (2, True, True)]
    assert list(tmp_path.iterdir()) == []


def test_finished_stages_do_not_count(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    assert runner.stages_left(SMALL, tmp_path) == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Result, "save", broken)
        run(SMALL, output=tmp_path)
    assert runner.stages_left(SMALL, tmp_path) == 0
    assert estimate([SMALL], output=tmp_path) == (0, 0)
    run(SMALL, output=tmp_path)
    assert estimate([SMALL], output=tmp_path) == (0, 0)
