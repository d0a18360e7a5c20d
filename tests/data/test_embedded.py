"""The synthetic tasks: shapes, fixed texts, and a grammar that is learnable and not trivial."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache

import numpy as np
import pytest

from bitstack_nb.data.embedded import (
    EMBEDDED_ROWS,
    EMBEDDED_VERSION,
    embedded_split,
    embedded_vocabulary,
)
from bitstack_nb.data.tasks import FIVE_TASKS, Task

# Of all rows, by version.
DIGEST = {"1": "4e9ec0078751314912139cc905657aafe96b2c7c76c768d27c1f0a1220634ff0"}
split_of = cache(embedded_split)


def texts(task: Task, split: str) -> list[str]:
    return [" ".join(row[column] for column in task.text) for row in split_of(task.name, split)]


def words(task: Task, split: str) -> set[str]:
    return set(" ".join(texts(task, split)).split())


@pytest.mark.parametrize("task", FIVE_TASKS, ids=lambda task: task.name)
def test_columns_rows_and_labels_are_like_those_of_the_hub(task):
    for split, size in EMBEDDED_ROWS.items():
        rows = split_of(task.name, split)
        assert {*task.text, task.label} <= set(rows.column_names)
        assert len(rows) == size
        labels = rows[task.label][:]
        counts = Counter(labels)
        assert sorted(counts) == list(range(task.num_labels))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert (labels == sorted(labels)) == (task.name in ("imdb", "dbpedia"))
    assert not set(texts(task, "train")) & set(texts(task, "test"))


def test_the_texts_of_a_version_never_change():
    rows = [split_of(task.name, split).to_list() for task in FIVE_TASKS for split in EMBEDDED_ROWS]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest == DIGEST[EMBEDDED_VERSION]


def test_the_vocabulary_is_exactly_what_the_texts_use():
    vocabulary = embedded_vocabulary()
    assert set(vocabulary) == {
        word for task in FIVE_TASKS for split in EMBEDDED_ROWS for word in words(task, split)
    }
    assert vocabulary == sorted(set(vocabulary))
    assert len(vocabulary) < 600


def test_tasks_share_words_so_that_they_interfere():
    imdb, ag_news, dbpedia, yelp, yahoo = (words(task, "test") for task in FIVE_TASKS)
    assert len(imdb & yelp) > 30
    for one, other in ((ag_news, dbpedia), (ag_news, yahoo), (dbpedia, yahoo)):
        assert len(one & other) > 100


@pytest.mark.parametrize("task", FIVE_TASKS, ids=lambda task: task.name)
def test_word_counts_predict_the_label_far_above_chance_but_not_always(task):
    """Naive Bayes on word counts shows how much there is to learn."""
    index = {word: number for number, word in enumerate(embedded_vocabulary())}

    def bags(split: str) -> tuple[np.ndarray, np.ndarray]:
        bags = np.zeros((EMBEDDED_ROWS[split], len(index)))
        for row, text in enumerate(texts(task, split)):
            np.add.at(bags[row], [index[word] for word in text.split()], 1)
        return bags, np.array(split_of(task.name, split)[task.label][:])

    (train, known), (test, wanted) = map(bags, EMBEDDED_ROWS)
    counts = np.stack([train[known == label].sum(0) + 0.5 for label in range(task.num_labels)])
    scores = test @ np.log(counts / counts.sum(1, keepdims=True)).T
    accuracy = (scores.argmax(1) == wanted).mean()
    assert 1 / task.num_labels + 0.2 < accuracy < 0.98


@pytest.mark.parametrize(
    ("task", "split", "said"),
    [("snli", "train", "'snli': use one of imdb"), ("imdb", "dev", "'dev': use one of train")],
)
def test_unknown_names_are_refused_with_the_known_ones(task, split, said):
    with pytest.raises(ValueError, match=said):
        embedded_split(task, split)
