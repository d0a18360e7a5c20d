"""Pairs: the same seed under two strategies, their differences, and what they settle."""

import re

import pytest
from toy_results import TASKS, published, run

from bitstack_nb.results.frames import frame
from bitstack_nb.results.metrics import forward_transfer, mean_interval
from bitstack_nb.results.pairs import (
    METRICS,
    forward_transfers,
    paired_table,
    paired_tasks,
    pairs,
    verdict,
)
from bitstack_nb.results.result import ResultError

SEEDS = range(4)
RESULTS = [run(strategy, seed) for seed in SEEDS for strategy in ("finetune", "bitstack")]


def shifted(points: list[float]) -> list:
    """Pairs whose BitStack run forgets ``points`` more than its fine-tuning partner."""
    pairs = []
    for seed, more in enumerate(points):
        pair = run("finetune", seed), run("bitstack", seed)
        pair[1].metrics["forgetting"] = pair[0].metrics["forgetting"] + more
        pairs += pair
    return pairs


def partner(result, others, strategy="finetune"):
    """The run of a strategy that a result is compared with, or None."""
    paired = pairs(frame([result, *others]), strategy)
    mine = paired[[own is result for own in paired["result"]]]
    return mine["result_other"].item() if len(mine) else None


def test_a_partner_agrees_in_all_that_both_say():
    own = run(seed=1, learning_rate=1e-4)
    others = [
        run("joint", 1, learning_rate=1e-4),
        run("finetune", 2, learning_rate=1e-4),
        run("finetune", 1, learning_rate=2e-4),
        run("finetune", 1, learning_rate=1e-4, tasks=TASKS[::-1]),
        published("finetune", 14.5),
    ]
    assert partner(own, others) is None
    match = run("finetune", 1, learning_rate=1e-4)
    assert partner(own, [*others, match]) is match


def test_a_baseline_tuned_by_itself_is_paired_across_rates():
    """Only where it was run at one rate, whatever the seed: else nobody says which was tuned."""
    own = run("recall", 1, learning_rate=1e-3, head_learning_rate=1e-2)
    tuned = [run("finetune", seed, learning_rate=5e-5) for seed in SEEDS]
    assert partner(own, tuned) is tuned[1]
    several = [*tuned, run("finetune", 2, learning_rate=1e-3)]
    assert partner(own, several) is None
    equal = run("finetune", 1, learning_rate=1e-3, head_learning_rate=1e-2)
    assert partner(own, [*several, equal]) is equal
    other = run("finetune", 3, learning_rate=1e-3, data="elsewhere")  # no run on these data
    assert partner(own, [*tuned, other]) is tuned[1]


def test_a_baseline_at_one_warm_up_is_paired_across_warm_ups():
    """Where it was run at several, at the equal one; rates are then compared among those."""
    own = run("recall", 1, learning_rate=1e-3, warmup_steps=6)
    tuned = [run("finetune", seed, learning_rate=5e-5, warmup_steps=20) for seed in SEEDS]
    assert partner(own, tuned) is tuned[1]
    several = [*tuned, run("finetune", 2, learning_rate=5e-5, warmup_steps=10)]
    assert partner(own, several) is None
    equal = run("finetune", 1, learning_rate=2e-4, warmup_steps=6)
    assert partner(own, [*several, equal]) is equal


@pytest.mark.parametrize(
    "settings", [{"epochs": 2}, {"data": "x"}, {"model": "x"}, {"train_size": 5}, {"head_steps": 4}]
)
def test_a_partner_has_the_same_budget_data_and_model(settings):
    assert partner(run(), [run("finetune", **settings)]) is None
    assert partner(run(**settings), [run("finetune")]) is None


def test_settings_that_only_one_of_two_strategies_has_are_no_difference():
    lora = run("lora", rank=8)
    assert partner(run("ewc", strength=10), [lora], "lora") is lora
    assert partner(lora, [locked := run("bitstack")], "bitstack") is locked
    same = {"sparsity": 0.12, "budget": "union"}
    assert partner(run("random-mask", **same), [locked], "bitstack") is locked
    fresh = {**same, "budget": "fresh"}
    assert partner(run("random-mask", **fresh), [locked], "bitstack") is None
    chosen = {"sparsity": 0.05, "importance": "random"}  # exact recall fits heads by itself
    fitted = run("single", head_steps=32)
    assert partner(run("recall", **chosen), [fitted], "single") is fitted


def test_tables_hold_the_means_of_the_differences():
    row = paired_table([*RESULTS, published("bitstack", 3.8)]).iloc[0]
    assert row["seeds"] == len(SEEDS)
    by_seed = [*zip(RESULTS[::2], RESULTS[1::2], strict=True)]
    for column in METRICS:
        values = [locked.metrics[column] - plain.metrics[column] for plain, locked in by_seed]
        found = row[column], row[f"{column}_interval"]
        assert found == pytest.approx(mean_interval(values))
    tasks = paired_tasks(RESULTS, "finetune")
    for at, task in enumerate(TASKS):
        values = [locked.matrix[-1][at] - plain.matrix[-1][at] for plain, locked in by_seed]
        assert tasks[task].item() == pytest.approx(mean_interval(values)[0])


def test_forward_transfer_is_paired_with_separate_models():
    results = [*RESULTS, *(run("single", seed) for seed in SEEDS)]
    table = forward_transfers([*results, run("bitstack", 9), run("joint", 0)])
    assert list(table["strategy"]) == ["bitstack", "finetune"]
    both = [(run("bitstack", seed).matrix, run("single", seed).matrix) for seed in SEEDS]
    values = [forward_transfer(*matrices) for matrices in both]
    found = table.loc[0, ["seeds", "forward_transfer", "forward_transfer_interval"]]
    assert list(found) == pytest.approx([len(SEEDS), *mean_interval(values)])
    with pytest.raises(ResultError, match="nothing to pair"):
        forward_transfers(RESULTS)


def test_order_does_not_matter_and_runs_without_partner_do_not_count():
    frame = paired_table([*reversed(RESULTS), run("bitstack", 9), run("finetune", 8)])
    assert frame.equals(paired_table(RESULTS))


@pytest.mark.parametrize(
    ("points", "better", "settled", "words"),
    [
        ([-5.0, -6.0, -5.5], True, True, "-5.5 ± .* over 3 paired seeds .*excludes zero"),
        ([5.0, 6.0, 5.5], False, True, r"\+5.5 ± .*excludes zero"),
        ([-9.0, 1.0, -2.0], True, False, "-3.3 ± .*not settled.*includes zero"),
        ([-9.0], True, False, "-9.0 points over 1 paired seed .*one seed has no interval"),
        ([0.0, 0.0], False, False, "includes zero"),
    ],
)
def test_a_verdict_says_which_way_and_whether_it_is_settled(points, better, settled, words):
    found = verdict(shifted(points))
    assert (found.better, found.settled) == (better, settled)
    assert re.search(words, str(found)), str(found)


def test_more_accuracy_is_better():
    results = shifted([0.0, 0.0])
    for plain, locked in zip(results[::2], results[1::2], strict=True):
        locked.metrics["average_accuracy"] = plain.metrics["average_accuracy"] + 3
    assert verdict(results, "average_accuracy").better


def test_what_cannot_be_judged_is_said():
    with pytest.raises(ResultError, match="nothing to pair"):
        paired_table([run("bitstack", 0), run("finetune", 1)])
    with pytest.raises(ResultError, match="2: choose"):
        verdict([*RESULTS, run("bitstack", 0, budget="fresh")])
