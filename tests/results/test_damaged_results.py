"""Damaged result files: each is refused by our error, or can be shown, kept and read again."""

import json
import random

import pytest
from damage import damaged, spoilt
from toy_results import run

from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import format_table, table


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "result.json"
    run().save(path)
    return path.read_text()


def load(file, number: int) -> None:
    """Refuse it by our error, or it can be shown, kept and read again."""
    try:
        result = Result.load(file)
    except ResultError as error:
        assert str(file) in str(error)
        return
    assert format_table(table([result])), number
    result.save(file)
    assert Result.load(file) == result, number


def test_damaged_bytes_of_a_result(text, tmp_path):
    generator, file = random.Random(2), tmp_path / "damaged.json"
    for number in range(200):
        file.write_bytes(damaged(text.encode(), generator, header=2000))
        load(file, number)


def test_results_with_other_contents(text, tmp_path):
    generator, file, whole = random.Random(3), tmp_path / "spoilt.json", json.loads(text)
    for number in range(300):
        # Top level first: there are few of those, and many values in the lock records.
        key = generator.choice(sorted(whole))
        other = {**whole, key: spoilt(whole[key], generator)}
        file.write_text(json.dumps(other))
        load(file, number)


def test_nesting_without_end(tmp_path):
    file = tmp_path / "deep.json"
    file.write_text("[" * 200_000)
    with pytest.raises(ResultError, match=r"deep\.json"):
        Result.load(file)
