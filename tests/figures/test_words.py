"""The comparison in brief: five columns, and sentences that the numbers decide."""

from __future__ import annotations

import pytest
from toy_figures import run, runs

from bitstack_nb.figures import brief, conclusions
from bitstack_nb.results.result import Result

METHODS = ("probe", "finetune", "bitstack", "recall", "single")


def of(strategy: str, seed: int = 0, *, accuracy: float, forgetting: float = 0.0) -> Result:
    """A run with these numbers."""
    result = run(strategy, seed)
    result.metrics |= {"average_accuracy": accuracy, "forgetting": forgetting}
    return result


def test_the_table_has_five_columns():
    found = brief([result for name in METHODS for result in runs(name)])
    shown = [name for name in found if not name.endswith("_interval")]
    assert shown[:3] == ["method", "average_accuracy", "forgetting"]
    assert shown[3:] == ["storage_per_task", "minus_separate_models"]


@pytest.mark.parametrize(
    ("accuracy", "forgetting", "said"),
    [
        (62.0, 3.0, "forgets 7.0 points less than fine-tuning and ends 2.0 points above"),
        (57.5, 12.0, "forgets 2.0 points more than fine-tuning and ends 2.5 points below"),
        (60.0, 10.0, "forgets as much as fine-tuning and ends level with"),
    ],
)
def test_a_sentence_says_what_one_seed_found_whatever_its_sign(accuracy, forgetting, said):
    found = conclusions(
        [
            of("finetune", accuracy=60.0, forgetting=10.0),
            of("bitstack", accuracy=accuracy, forgetting=forgetting),
        ]
    )
    assert found == [f"On seed 0 alone, BitStack {said} fine-tuning."]


def test_exact_recall_is_set_between_its_bounds():
    results = [of("probe", accuracy=50.0), of("single", accuracy=80.0), of("recall", accuracy=78.5)]
    (found,) = conclusions(results)
    assert found == (
        "On seed 0 alone, exact recall forgets nothing, ends 1.5 points below separate models "
        "and 28.5 points above the linear probe."
    )
    worse = [*results[:2], of("recall", accuracy=49.0, forgetting=0.5)]
    assert "forgets 0.5 points, ends" in conclusions(worse)[0]
    assert "and 1.0 points below the linear probe" in conclusions(worse)[0]


def test_seeds_give_an_interval_and_say_what_it_leaves_open():
    plain = [of("finetune", seed, accuracy=60.0, forgetting=10.0) for seed in range(3)]
    accuracies, forgotten = (61.0, 60.0, 59.5), (3.0, 2.5, 3.5)
    locked = [
        of("bitstack", seed, accuracy=a, forgetting=f)
        for seed, (a, f) in enumerate(zip(accuracies, forgotten, strict=True))
    ]
    (found,) = conclusions([*plain, *locked])
    assert found.startswith("Over 3 seeds, BitStack forgets 7.0 ± 1.2 points less than fine-tuning")
    assert found.endswith("ends 0.2 ± 1.9 points above fine-tuning (not settled).")


def test_seeds_that_a_method_lacks_are_left_out():
    results = [of("finetune", seed, accuracy=60.0, forgetting=10.0) for seed in range(2)]
    (found,) = conclusions([*results, of("bitstack", 1, accuracy=61.0, forgetting=9.0)])
    assert found.startswith("On seed 1 alone, BitStack forgets 1.0 points less than fine-tuning")


def test_methods_without_a_partner_or_with_several_settings_are_left_out():
    assert conclusions([of("bitstack", accuracy=1.0), of("probe", accuracy=1.0)]) == []
    two = [run("bitstack", sparsity=share) for share in (0.1, 0.2)]
    assert conclusions([*two, run("finetune")]) == []
