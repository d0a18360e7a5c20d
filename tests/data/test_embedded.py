"""The synthetic tasks: shapes, determinism, and a grammar that is learnable and not trivial."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from bitstack_nb.data.embedded import EMBEDDED_ROWS, embedded_split, embedded_vocabulary

COLUMNS = {
    "imdb": {"text", "label"},
    "ag_news": {"text", "label"},
    "dbpedia": {"label", "title", "content"},
    "yelp": {"label", "text"},
    "yahoo": {"id", "topic", "question_title", "question_content", "best_answer"},
}
CLASSES = {"imdb": 2, "ag_news": 4, "dbpedia": 14, "yelp": 5, "yahoo": 10}


def texts(rows) -> list[str]:
    columns = [c for c in rows.column_names if c not in ("id", "label", "topic")]
    return [" ".join(row[column] for column in columns) for row in rows]


def labels(rows) -> list[int]:
    return rows["topic" if "topic" in rows.column_names else "label"][:]


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("split", EMBEDDED_ROWS)
def test_columns_rows_and_balanced_labels_are_those_of_the_hub(task, split):
    rows = embedded_split(task, split)
    assert set(rows.column_names) == COLUMNS[task]
    assert len(rows) == EMBEDDED_ROWS[split]
    counts = Counter(labels(rows))
    assert sorted(counts) == list(range(CLASSES[task]))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", CLASSES)
def test_imdb_and_dbpedia_are_sorted_by_label_as_on_the_hub(task):
    found = labels(embedded_split(task, "train"))
    assert (found == sorted(found)) == (task in ("imdb", "dbpedia"))


@pytest.mark.parametrize("task", CLASSES)
def test_the_same_rows_every_time_and_no_global_random_state_moves(task):
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert embedded_split(task, "test").to_list() == embedded_split(task, "test").to_list()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("task", CLASSES)
def test_no_test_text_was_seen_in_training(task):
    seen = set(texts(embedded_split(task, "train")))
    assert sum(text in seen for text in texts(embedded_split(task, "test"))) == 0


def test_the_vocabulary_is_exactly_what_the_texts_use():
    vocabulary = embedded_vocabulary()
    used = {
        word
        for task in CLASSES
        for split in EMBEDDED_ROWS
        for text in texts(embedded_split(task, split))
        for word in text.split()
    }
    assert set(vocabulary) == used
    assert vocabulary == sorted(set(vocabulary))
    assert len(vocabulary) < 600


def test_tasks_share_words_so_that_they_interfere():
    words = {
        task: {word for text in texts(embedded_split(task, "test")) for word in text.split()}
        for task in CLASSES
    }
    assert len(words["imdb"] & words["yelp"]) > 30
    for one, other in (("ag_news", "dbpedia"), ("ag_news", "yahoo"), ("dbpedia", "yahoo")):
        assert len(words[one] & words[other]) > 100


@pytest.mark.parametrize("task", CLASSES)
def test_word_counts_predict_the_label_far_above_chance_but_not_always(task):
    """Naive Bayes on word counts, the simplest learner, stands for what there is to learn."""
    index = {word: number for number, word in enumerate(embedded_vocabulary())}

    def bags(rows):
        bags = np.zeros((len(rows), len(index)))
        for row, text in enumerate(texts(rows)):
            np.add.at(bags[row], [index[word] for word in text.split()], 1)
        return bags, np.array(labels(rows))

    (train, known), (test, wanted) = (bags(embedded_split(task, s)) for s in EMBEDDED_ROWS)
    counts = np.stack([train[known == label].sum(0) + 0.5 for label in range(CLASSES[task])])
    scores = test @ np.log(counts / counts.sum(1, keepdims=True)).T
    accuracy = (scores.argmax(1) == wanted).mean()
    assert 1 / CLASSES[task] + 0.2 < accuracy < 0.98


@pytest.mark.parametrize(
    ("task", "split", "named"), [("snli", "train", "yahoo"), ("imdb", "dev", "test")]
)
def test_unknown_names_are_refused_with_those_there_are(task, split, named):
    with pytest.raises(ValueError, match=named) as caught:
        embedded_split(task, split)
    assert repr("snli" if task == "snli" else "dev") in str(caught.value)
