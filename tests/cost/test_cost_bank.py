"""A task bank beside peft's adapters: all kinds are measured, and the facts are what they must be.

No time is asserted, and nothing of peft that a later version may change.
"""

import pytest

from bitstack_nb.cost import CostReport, bank_table, measure_bank
from bitstack_nb.cost.bank import LABELS

SAVED = {"exact recall", "LoRA", "SHiRA"}


@pytest.fixture(scope="module")
def report(folders):
    report = CostReport(device="cpu")
    measure_bank(report, model=str(folders["bert"]), texts=28, rounds=1)
    return report


def test_old_answers_keep_their_bits_in_every_kind_that_merges_nothing(report):
    found = report.bank["found"]
    for name in (
        "old answers in a new process: same bits",
        "old answers after other tasks: same bits",
    ):
        assert {label for label, same in found[name].items() if same} >= SAVED
    moved = found["weights of the base that have moved, %"]
    assert {label for label, share in moved.items() if share == 0} >= SAVED
    assert found["loads heads of 2, 4 and 14 labels by itself"]["exact recall"]


def test_every_kind_is_timed_beside_the_plain_model(report):
    for name, seconds in report.bank["seconds"].items():
        assert {*seconds} - {"base"} in ({*LABELS}, SAVED), name
        assert ("base" in seconds) == ("/" in name)
        assert all(second > 0 for own in seconds.values() for second in own)
    assert all(report.bank["found"]["file of a task with head, kB"].values())


def test_the_table_shows_all_of_it_and_the_report_comes_back_whole(report, tmp_path):
    table = bank_table(report).set_index("")
    assert list(table.index) == list(report.bank["found"]) and list(table.columns) == LABELS
    assert set(table.loc["old answers after other tasks: same bits"]) <= {"yes", "no"}
    report.save(tmp_path / "cpu.json")
    assert CostReport.load(tmp_path / "cpu.json") == report
