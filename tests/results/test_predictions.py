"""Confusion, macro F1 and McNemar's test of recorded predictions, worked by hand."""

from __future__ import annotations

import pytest
from toy_results import run

from bitstack_nb.results import ResultError, confusion, macro_f1, mcnemar
from bitstack_nb.results.significance import mcnemar_p


def made(strategy: str, seed: int, final: str, labels: str = "0 0 1 1 2 2"):
    """A run of two tasks with given predictions of the first."""
    result = run(strategy, seed, tasks=("imdb", "yelp"))
    result.predictions[0] |= {"labels": labels, "final": final, "learnt": None}
    return result


def test_confusion_and_macro_f1():
    result = made("single", 0, "0 1 1 1 1 2")
    assert confusion(result, "imdb").tolist() == [[1, 1, 0], [0, 2, 0], [0, 1, 1]]
    # Precision and recall by class: 1, 1/2; 1/2, 1; 1, 1/2.
    assert macro_f1(result, "imdb") == pytest.approx(100 * 2 / 3)
    result.protocol["tasks"][0]["num_labels"] = 4
    assert confusion(result, "imdb").shape == (4, 4)
    assert macro_f1(result, "imdb") == pytest.approx(100 * 2 / 3)  # no text has the fourth


def test_mcnemar_counts_the_texts_of_paired_seeds():
    results = [
        made("single", 0, "0 0 1 1 2 2"),
        made("lora", 0, "0 0 0 0 0 0"),
        made("single", 1, "1 0 1 1 2 2"),
        made("lora", 1, "0 0 1 1 0 2"),
        made("lora", 2, "0 0 0 0 0 0"),  # no partner
    ]
    table = mcnemar(results, "single", "lora")
    assert list(table["task"]) == ["imdb", "yelp"]
    row = table.iloc[0]
    counts = row["texts"], row["both"], row["only_first"], row["only_second"], row["neither"]
    assert counts == (12, 6, 5, 1, 0)
    assert row["p"] == mcnemar_p(5, 1) and row["p_holm"] >= row["p"]


def test_runs_that_cannot_be_compared_are_named():
    other = [made("single", 0, "0 0 1 1 2 2"), made("lora", 0, "0 0 0 0 0 0", "1 1 0 0 2 2")]
    with pytest.raises(ResultError, match="single and lora have different test texts of 'imdb'"):
        mcnemar(other, "single", "lora")
    with pytest.raises(ResultError, match="no learnt predictions of 'imdb'"):
        macro_f1(other[0], "imdb", when="learnt")
    with pytest.raises(ValueError, match="expected 'final' or 'learnt'"):
        macro_f1(other[0], "imdb", when="end")
    earlier = run("single")
    earlier.predictions = []
    with pytest.raises(ResultError, match="no final predictions of 'imdb'"):
        confusion(earlier, "imdb")
