"""Metrics of matrices worked by hand, numbers that cannot be computed, and Student intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitstack_nb.results import metrics

# Task 1 rises before it falls, so the two definitions of forgetting differ.
RISING = [[80.0, None, None], [90.0, 70.0, None], [60.0, 65.0, 75.0]]


def test_values_of_a_matrix_worked_by_hand():
    assert metrics.summarize(RISING) == pytest.approx(
        {
            "average_accuracy": (60 + 65 + 75) / 3,
            "learning_accuracy": (80 + 70 + 75) / 3,
            "forgetting": (20 + 5) / 2,
            "forgetting_chaudhry": (30 + 5) / 2,
            "backward_transfer": -(20 + 5) / 2,
            "first_task_after_last": 60,
        }
    )
    assert metrics.forgetting_per_task(RISING).tolist() == [20, 5]


def test_forward_transfer_is_what_is_learnt_beyond_separate_models():
    separate = [[70.0, None, None], [70.0, 74.0, None], [70.0, 74.0, 69.0]]
    assert metrics.forward_transfer(RISING, separate) == (-4 + 6) / 2  # not of the first task
    assert math.isnan(metrics.forward_transfer([[75.0]], [[75.0]]))
    with pytest.raises(ValueError, match="3 tasks cannot be compared with 1"):
        metrics.forward_transfer(RISING, [[75.0]])


def test_relations_that_hold_for_every_matrix():
    generator = np.random.default_rng(0)
    for tasks in range(2, 8):
        matrix = generator.uniform(0, 100, (tasks, tasks))
        full = metrics.summarize(matrix)
        assert full["forgetting_chaudhry"] >= full["forgetting"]
        assert full["backward_transfer"] == pytest.approx(-full["forgetting"])
        lost = full["learning_accuracy"] - full["average_accuracy"]
        assert lost == pytest.approx(full["forgetting"] * (tasks - 1) / tasks)
        # A value above the diagonal is no accuracy of a trained task.
        matrix[np.triu_indices(tasks, 1)] = np.nan
        assert metrics.summarize(matrix) == full


@pytest.mark.filterwarnings("error")
def test_what_was_not_measured_gives_none_and_no_forgetting_plain_zero():
    found = metrics.summarize([[50, math.nan], [50, 60]])
    assert str(found["backward_transfer"]) == str(found["forgetting"]) == "0.0"
    joint = metrics.summarize([[None, None], [70, 90]])
    assert joint["average_accuracy"] == 80 and joint["first_task_after_last"] == 70
    others = ("learning_accuracy", "forgetting", "forgetting_chaudhry", "backward_transfer")
    assert all(joint[name] is None for name in others)
    single = metrics.summarize([[75.0]])
    assert single["average_accuracy"] == single["learning_accuracy"] == 75
    assert single["forgetting"] is single["forgetting_chaudhry"] is None
    # A maximum over a row that is missing would be too low: unknown, not wrong.
    gap = [[80, None, None], [None, 70, None], [60, 65, 75]]
    assert metrics.summarize(gap)["forgetting_chaudhry"] is None


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[None, None], [None, None], [70.0, 90.0]], r"\(3, 2\)"),
        ([], r"\(0,\)"),
        ([[1, 2], [3]], "equal length"),
        ([["high"]], "numbers or None"),
        ([[100.5]], "100.5"),
        ([[-1]], "-1"),
    ],
)
def test_bad_matrices_are_named(matrix, words):
    with pytest.raises(ValueError, match=words):
        metrics.average_accuracy(matrix)


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [  # printed tables of Student's t, two-sided; the last is the normal distribution's
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 4, 2.7764),
        (0.95, 9, 2.2622),
        (0.95, 120, 1.9799),
        (0.99, 2, 9.9248),
        (0.90, 5, 2.0150),
        (0.95, 100_001, 1.95999),
    ],
)
def test_student_quantile(confidence, degrees, expected):
    assert metrics.student_quantile(degrees, confidence) == pytest.approx(expected, abs=6e-5)


def test_mean_interval():
    mean, half = metrics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3))
    assert metrics.mean_interval([5.0]) == (5.0, None)
    assert metrics.mean_interval([4.0, 4.0]) == (4.0, 0.0)


def test_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(10, 3, (2000, 3))
    intervals = [metrics.mean_interval(sample) for sample in samples]
    covered = np.mean([abs(mean - 10) <= half for mean, half in intervals])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [None, 2.0], [[1.0], [2.0]]])
def test_an_interval_needs_finite_numbers(values):
    with pytest.raises(ValueError, match="finite numbers"):
        metrics.mean_interval(values)
