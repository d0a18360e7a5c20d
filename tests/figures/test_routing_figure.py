"""The figure of the tasks that a bank chose."""

import pytest

from bitstack_nb.figures import chosen_tasks


def test_a_row_has_the_percentages_of_its_texts_and_tasks_keep_the_order_of_the_rows():
    chosen = {"reviews": ["reviews", "reviews", None, "news"], "news": ["news"], "else": ["mail"]}
    (ax,) = chosen_tasks(chosen).axes
    ticks = (ax.get_xticklabels(), ax.get_yticklabels())
    columns, rows = ([label.get_text() for label in labels] for labels in ticks)
    assert columns == ["reviews", "news", "mail", "no task"] and rows == list(chosen)
    numbers = [text.get_text() for text in ax.texts]
    assert numbers == ["50", "25", "0", "25", "0", "100", "0", "0", "0", "0", "100", "0"]


def test_a_kind_without_texts_is_refused():
    for chosen in ({}, {"reviews": []}):
        with pytest.raises(ValueError, match="of one text or more"):
            chosen_tasks(chosen)
