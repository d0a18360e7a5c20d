"""Tests of contrasts against published values: Student's t, Holm, equivalence, McNemar."""

from __future__ import annotations

import numpy as np
import pytest
from toy_results import run

from bitstack_nb.results import ResultError, contrasts, readable
from bitstack_nb.results.metrics import mean_interval, student_quantile, student_tail
from bitstack_nb.results.significance import holm, mcnemar_p, paired_p, tost

# Hours of sleep gained by ten patients on two drugs (Student 1908), the data set "sleep" of R.
SLEEP = [-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4]


def test_the_paired_t_test_of_students_own_data():
    assert paired_p(SLEEP) == pytest.approx(0.002833, abs=5e-7)  # R: t.test(paired = TRUE)
    assert paired_p([1.0, -1.0]) == 1 and paired_p([0.0, 0.0]) == 1 and paired_p([2.0, 2.0]) == 0


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30])
def test_tails_agree_with_quantiles_and_add_up(degrees):
    for confidence in (0.5, 0.9, 0.95, 0.999):
        t = student_quantile(degrees, confidence)
        assert student_tail(t, degrees) == pytest.approx((1 - confidence) / 2, abs=1e-9)
        assert student_tail(-t, degrees) == pytest.approx((1 + confidence) / 2, abs=1e-9)
    assert student_tail(0.0, degrees) == 0.5 and 0 <= student_tail(1e9, degrees) < 1e-9


def test_holm_as_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([0.02]) == [0.02]


def test_equivalence_is_a_90_percent_interval_within_the_margins():
    for seed in range(50):
        sample = np.random.default_rng(seed).normal(0.5, 1, 5).tolist()
        mean, half = mean_interval(sample)
        half *= student_quantile(4, 0.90) / student_quantile(4, 0.95)
        assert (tost(sample, 1.5) < 0.05) == (abs(mean) + half < 1.5)
    assert tost([0.0, 0.0], 1.0) == 0 and tost([1.0, 1.0], 1.0) == 0.5


def test_mcnemars_mid_p_of_fagerland_and_others():
    assert mcnemar_p(1, 7) == pytest.approx(0.0391, abs=5e-5)  # 0.0703 by the exact test
    assert mcnemar_p(7, 1) == mcnemar_p(1, 7)
    assert mcnemar_p(0, 0) == mcnemar_p(5, 5) == 1 and mcnemar_p(0, 1) == 0.5
    assert 0 < mcnemar_p(900, 1200) < 1e-9


def compared(points: list[float], strategy: str = "bitstack", **settings) -> list:
    """A run and its partner per seed, whose average accuracies differ by so many points."""
    found = []
    for seed, more in enumerate(points):
        pair = run(strategy, seed, **settings), run("single", seed)
        pair[0].metrics["average_accuracy"] = pair[1].metrics["average_accuracy"] + more
        found += pair
    return found


def test_contrasts_are_one_family():
    less, same = [-5.0, -6.0, -4.0, -5.5], [0.1, -0.2, 0.2, -0.1]
    results = compared(less) + compared(same, "recall", sparsity=0.05)
    results += compared(less, "recall", sparsity=0.01)
    named = {
        "BitStack": ("bitstack", "single"),
        "5 %": ({"strategy": "recall", "sparsity": 0.05}, "single"),
        "1 % less 5 %": (
            {"strategy": "recall", "sparsity": 0.01},
            {"strategy": "recall", "sparsity": 0.05},
        ),
    }
    table = contrasts(results, named, margin=1.5)
    assert list(table["contrast"]) == [*named] and set(table["seeds"]) == {4}
    means = [mean_interval(less), mean_interval(same)]
    assert list(table[["difference", "difference_interval"]].iloc[0]) == pytest.approx(means[0])
    assert list(table[["difference", "difference_interval"]].iloc[1]) == pytest.approx(means[1])
    assert list(table["p_holm"]) == holm(table["p"])
    assert list(table["different"]) == [True, False, True]
    assert list(table["p_equivalence_holm"]) == holm([tost(less, 1.5), tost(same, 1.5), 1.0])
    assert list(table["equivalent"]) == [False, True, False]
    shown = readable(table).iloc[1]
    assert shown["difference"] == "0.0 ± 0.3" and shown["p"] == "1.0000"
    assert (shown["different"], shown["equivalent"]) == ("False", "True")
    assert "equivalent" not in contrasts(results, named)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("bitstack", "lora"), "'lora' chooses 0 configurations: no run"),
        (("recall", "single"), "'recall' chooses 2 configurations: name one of .*sparsity"),
        (("bitstack", "finetune"), r"differ in \['epochs'\]: name these"),
        (("bitstack", "ewc"), "have no seed .* in common"),
        (("bitstack", "replay"), "has 1 pair: it needs two"),
    ],
)
def test_a_contrast_that_compares_nothing_is_refused(pair, words):
    results = [
        *(run("bitstack", seed) for seed in range(3)),
        *(run("recall", 0, sparsity=sparsity) for sparsity in (0.01, 0.05)),
        run("single", 0),
        run("finetune", 0, epochs=2),
        run("ewc", 9),
        run("replay", 1),
    ]
    with pytest.raises(ResultError, match=words):
        contrasts(results, {"named": pair})
    with pytest.raises(ValueError, match="margin"):
        contrasts(results, {}, margin=0)
