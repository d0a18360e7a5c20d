"""The estimate of a run's time: proportional to what is left, and no trace of the measuring."""

import random
import time
from dataclasses import replace

import pytest
import torch

from bitstack_nb import Protocol, run
from bitstack_nb.benchmark import runner as benchmark
from bitstack_nb.benchmark.estimates import estimate

SMALL = Protocol(tasks=("imdb", "ag_news"), train_size=160, test_size=56, max_length=24, epochs=1)


def test_it_is_of_the_order_of_the_run_itself(tmp_path):
    protocol = replace(SMALL, epochs=8)
    expected = estimate([protocol], output=tmp_path)
    start = time.perf_counter()
    run(protocol, output=tmp_path)
    # A shared machine may pause for either of the two; a wrong count of batches is off by more.
    assert expected / 5 < time.perf_counter() - start < 10 * expected


def test_more_work_takes_longer_and_finished_work_none(tmp_path):
    one = estimate([SMALL], output=tmp_path)
    many = estimate([replace(SMALL, seed=seed) for seed in range(20)], output=tmp_path)
    assert many > 5 * one > 0
    run(SMALL, output=tmp_path)
    assert estimate([SMALL], output=tmp_path) == 0


@pytest.mark.parametrize("strategy", ["bitstack", "recall", "ewc"])
def test_what_a_strategy_does_besides_training_counts(tmp_path, strategy):
    few, many = (SMALL.with_strategy(strategy, n_batches=n) for n in (1, 1000))
    assert estimate([many], output=tmp_path) > 5 * estimate([few], output=tmp_path)


def test_stages_that_a_broken_run_saved_do_not_count(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    assert benchmark.finished_stages(SMALL, tmp_path) == 0
    monkeypatch.setattr(benchmark.Result, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, output=tmp_path)
    assert benchmark.finished_stages(SMALL, tmp_path) == 2
    assert estimate([SMALL], output=tmp_path) == 0


def test_measuring_leaves_the_random_state_and_the_folder_alone(tmp_path):
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    estimate([SMALL.with_strategy("bitstack")], output=tmp_path / "none")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert list(tmp_path.iterdir()) == []
