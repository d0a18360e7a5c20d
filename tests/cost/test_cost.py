"""Costs: every measurement runs, the numbers add up, and reports come back whole.

No ratio is asserted: on models this small, and on a busy machine, it means nothing. Notebook 06
runs ``measure_costs``, with its new processes.
"""

import pytest

from bitstack_nb.cost import (
    CostReport,
    cost_findings,
    cost_growth,
    cost_ratios,
    cost_table,
    measure,
    measure_growth,
    processes,
    write_cost_figures,
)
from bitstack_nb.cost.report import LIMITS
from bitstack_nb.results import ResultError


def test_works_take_turns_and_the_first_round_does_not_count():
    order = []
    works = {n: measure.Work(lambda n=n: order.append(n)) for n in ("base", "ours")}
    times = measure.take_turns(works, rounds=3, device="cpu")
    assert order == ["ours", "base", "base", "ours", "ours", "base", "base", "ours"]
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"base": 3, "ours": 3}


def test_the_ratio_is_the_median_of_the_rounds():
    times = measure.Times({"base": [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 20.0]})
    assert times.ratio("ours") == 2


def test_every_work_runs_and_leaves_no_hook_behind():
    model = measure.gpt2(1, 64)
    assert {*measure.training_step(model, tasks=2, rounds=1).seconds} == {"base", "ours", "plain"}
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert {*measure.update(model, n_batches=1, rounds=1).seconds} == {"base", "ours", "plain"}
    assert {*measure.threshold(5000, rounds=1).seconds} == {"base", "ours", "plain"}


def test_a_mask_is_a_bit_per_weight():
    memory, disk = processes.mask_bits(measure.locked_stack(measure.gpt2(1, 64), tasks=1))
    assert memory == pytest.approx(1, abs=0.01)
    assert disk > memory  # names and counts come on top


def test_growth_is_measured_over_sizes_and_tasks():
    report = CostReport(device="cpu")
    measure_growth(report, sizes=((1, 64), (1, 128)), tasks=(1, 2), rounds=1)
    rows = [(row["what"], row["tasks"]) for row in report.growth]
    assert rows.count(("training step", 5)) == rows.count(("recall switch", 5)) == 2
    assert ("update", 1) in rows and ("recall switch", 1) not in rows  # one task: no switch


@pytest.fixture
def report():
    costs = {name: {"value": limit / 2} for name, (_, limit) in LIMITS.items()}
    costs["update"] |= {"value": 2.0, "plain": 3.0, "seconds": {"base": [1.0], "ours": [2.0]}}
    growth = [
        {"what": "update", "parameters": parameters, "tasks": tasks, "ratio": 1.0}
        for parameters, tasks in ((10_000_000, 5), (20_000_000, 5), (20_000_000, 1))
    ]
    return CostReport(device="cpu", model={"layers": 1}, costs=costs, growth=growth)


def test_a_report_comes_back_whole(report, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    report.save("~/cpu.json")
    assert CostReport.load("~/cpu.json") == CostReport.load(tmp_path / "cpu.json") == report
    (tmp_path / "cpu.json").write_text('{"format": 1}')
    with pytest.raises(ResultError, match=r"cpu\.json is no cost report"):
        CostReport.load(tmp_path / "cpu.json")


def test_the_table_says_which_cost_is_above_its_limit(report):
    table = cost_table(report).set_index("cost")
    assert list(table.index) == list(LIMITS)
    assert not table.loc["update", "within"]
    assert table["within"].sum() == len(LIMITS) - 1


def test_the_findings_name_the_costs_above_their_limits(report):
    assert "An update takes 2.00 times as long as the passes over its batches." in (
        found := cost_findings(report)
    )
    assert found[-1] == f"1 of {len(LIMITS)} costs are above their limits: update."
    assert cost_findings(CostReport(device="cpu", costs={"import": {"value": 1.0}})) == [
        "0 of 1 costs are above their limits."
    ]


def test_ratios_are_drawn_with_limit_and_plain_implementation(report):
    ax = cost_ratios(report).axes[0]
    assert [list(line.get_xdata()) for line in ax.lines[:3]] == [[1.08] * 2, [3.0], [2.0]]
    with pytest.raises(ResultError, match="no times"):
        cost_ratios(CostReport(device="cpu"))


def test_growth_is_drawn_against_parameters_and_tasks(report, tmp_path):
    report.growth[-1]["ratio"] = 1.5  # the highest, and in the right panel alone
    left, right = cost_growth(report).axes
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[1] > 1.5
    assert list(left.lines[0].get_xdata()) == [10, 20]
    assert list(right.lines[0].get_xdata()) == [1, 5]
    assert all(file.stat().st_size for file in write_cost_figures(report, tmp_path))
    with pytest.raises(ResultError, match="no growth"):
        cost_growth(CostReport(device="cpu"))
