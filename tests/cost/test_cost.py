"""Costs: what is compared does the same work, the numbers add up, and reports come back whole.

No ratio is asserted: on models this small, and on a busy machine, it means nothing.
"""

import sys

import pytest
import tiny
import torch
from datasets import Dataset

from bitstack_nb import BitStack
from bitstack_nb.__main__ import main
from bitstack_nb.cost import measure as cost
from bitstack_nb.cost.padding import padded
from bitstack_nb.cost.plain_masks import PlainMasks
from bitstack_nb.cost.plots import cost_growth
from bitstack_nb.cost.report import LIMITS, CostReport, cost_table
from bitstack_nb.data.backbones import collate, encode, load_backbone
from bitstack_nb.eligible import eligible_parameters
from bitstack_nb.results.result import ResultError


def test_works_take_turns_and_the_first_round_does_not_count():
    order = []
    works = {name: cost.Work(lambda name=name: order.append(name)) for name in ("base", "ours")}
    times = cost.take_turns(works, rounds=3, device=torch.device("cpu"))
    assert order == ["ours", "base", "base", "ours", "ours", "base", "base", "ours"]
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"base": 3, "ours": 3}


def test_the_ratio_is_the_median_of_the_rounds():
    times = cost.Times({"base": [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 20.0]})
    assert times.ratio("ours") == 2


def test_the_plain_implementation_is_the_published_method():
    """It locks what the stack locks, and keeps it."""
    model, batches = tiny.gpt2(), tiny.batches(2, seed=0)
    stack = BitStack(model, 0.2)
    plain = PlainMasks(model.eval(), eligible_parameters(model, None), sparsity=0.2)
    stack.update(batches)
    stack.detach()  # its hooks would hide gradients
    plain.update(batches)
    assert all(plain.masks[name].equal(mask) for name, mask in stack.masks.items())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    plain.attach(optimizer)
    before = tiny.snapshot(model)
    tiny.train(model, optimizer, batches, seed=0)
    moved = tiny.changed(model, before)
    for name, mask in plain.masks.items():
        assert not moved[name][mask].any()
    assert any(moved[name].any() for name in plain.masks)
    plain.detach()
    assert not any(p._backward_hooks for p in model.parameters())


def test_every_work_runs_and_leaves_no_hook_behind():
    model = cost.gpt2(1, 64)
    rounds = {"rounds": 1}
    assert {*cost.training_step(model, tasks=2, **rounds).seconds} == {"base", "ours", "plain"}
    assert not any(p._backward_hooks for p in model.parameters())
    assert {*cost.update(model, n_batches=1, **rounds).seconds} == {"base", "ours", "plain"}
    assert {*cost.recall_switch(cost.gpt2(1, 64), tasks=2, **rounds).seconds} == {"base", "ours"}
    assert {*cost.threshold(5000, **rounds).seconds} == {"base", "ours", "plain"}


def test_a_mask_is_a_bit_an_entry():
    memory, disk = cost.mask_bits(cost.locked_stack(cost.gpt2(1, 64), tasks=1))
    assert memory == pytest.approx(1, abs=0.01)
    assert disk > memory  # names and counts come on top


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    assert 0 <= cost.threshold_memory(5_000_000) < 100


@pytest.fixture
def report():
    costs = {name: {"value": limit / 2} for name, (_, limit) in LIMITS.items()}
    costs["update"] |= {"value": 2.0, "plain": 3.0, "seconds": {"base": [1.0], "ours": [2.0]}}
    costs["benchmark"]["protocol"] = {"max_length": 256}
    growth = [
        {"what": "update", "parameters": parameters, "tasks": tasks, "ratio": 1.0}
        for parameters, tasks in ((10_000_000, 5), (20_000_000, 5), (20_000_000, 1))
    ]
    return CostReport(device="cpu", model={"layers": 1}, costs=costs, growth=growth)


def test_a_report_comes_back_whole(report, tmp_path):
    report.save(tmp_path / "cpu.json")
    assert CostReport.load(tmp_path / "cpu.json") == report
    (tmp_path / "cpu.json").write_text('{"format": 1}')
    with pytest.raises(ResultError, match=r"cpu\.json is no cost report"):
        CostReport.load(tmp_path / "cpu.json")


def test_the_table_says_what_is_beyond_its_limit(report):
    table = cost_table(report).set_index("cost")
    assert list(table.index) == list(LIMITS)
    assert not table.loc["update", "within"]
    assert table["within"].sum() == len(LIMITS) - 1


def test_a_part_is_measured_beside_those_that_are_there(report, tmp_path, capsys):
    del report.costs["benchmark"]
    report.save(tmp_path / "cpu.json")
    tiny_run = ["--model=tiny-gpt2", "--data=embedded", "--train-size=16", "--test-size=8"]
    tiny_run += ["--epochs=1"]
    options = ["--device", "cpu", "--output", str(tmp_path), "--rounds", "1", "--quiet"]
    assert main(["cost", "padding", *tiny_run, *options]) == 0
    now = CostReport.load(tmp_path / "cpu.json")
    assert now.costs.pop("benchmark")["value"] > 0
    assert (now.costs, now.growth) == (report.costs, report.growth)
    printed = capsys.readouterr().out
    assert "itself, every text padded to 256 tokens" in printed
    assert "| –" in printed  # what the plain implementation does not have


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_padded_texts_are_longer_and_mean_the_same(name, folders):
    backbone = load_backbone(str(folders[name]), max_length=16, seed=0)
    texts = {"text": ["red sun", "blue moon and rain"], "label": [0, 1]}
    rows, make_batch = encode(Dataset.from_dict(texts), backbone), collate(backbone)
    wide = padded(rows, backbone)
    assert wide["length"][:] == [16, 16]
    assert make_batch(list(wide))["input_ids"].shape == (2, 16)
    model = backbone.model.eval()
    with torch.no_grad():
        plain, same = (model(**make_batch(list(data))).logits for data in (rows, wide))
    torch.testing.assert_close(same, plain)


def test_growth_is_drawn_against_parameters_and_tasks(report):
    report.growth[-1]["ratio"] = 1.5  # higher than all that the panel beside it has
    left, right = cost_growth(report).axes
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[1] > 1.5
    assert list(left.lines[0].get_xdata()) == [10, 20]
    assert list(right.lines[0].get_xdata()) == [1, 5]
    with pytest.raises(ResultError, match="no growth"):
        cost_growth(CostReport(device="cpu", model={}))
