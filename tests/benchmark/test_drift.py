"""Drift attribution: what each group holds, and that putting it back changes nothing for good."""

import pytest
import tiny
import torch

from bitstack_nb import BitStack
from bitstack_nb.benchmark import drift


@pytest.fixture(params=["gpt2", "bert", "distilbert"])
def model(request):
    return tiny.ARCHITECTURES[request.param][0](0)


def moved(model):
    """The backbone as it was, and the model with every entry of it elsewhere."""
    former = drift.copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return former


def test_kinds_part_the_backbone(model):
    found = drift.kinds(model)
    assert found.keys() == drift.backbone(model).keys()
    assert not any("classifier" in name or "score" in name for name in found)
    assert {"embeddings", "norms", "biases", "attention", "MLP"} <= set(found.values())
    assert set(found.values()) <= set(drift.KINDS)


def test_kinds_of_bert():
    found = drift.kinds(tiny.bert())
    layer = "bert.encoder.layer.0"
    expected = {
        "bert.embeddings.word_embeddings.weight": "embeddings",
        "bert.embeddings.LayerNorm.bias": "norms",
        f"{layer}.attention.self.query.weight": "attention",
        f"{layer}.attention.self.query.bias": "biases",
        f"{layer}.attention.output.LayerNorm.weight": "norms",
        f"{layer}.intermediate.dense.weight": "MLP",
        "bert.pooler.dense.weight": "other",
    }
    assert {name: found[name] for name in expected} == expected


def test_groups_are_put_back_and_come_again(model):
    stack = BitStack(model, 0.3)
    stack.update(tiny.batches(2, seed=0), n_batches=2)
    former = moved(model)
    present = tiny.snapshot(model)
    seen = []

    def evaluate():
        back = {n: p == former[n] for n, p in drift.backbone(model).items()}
        seen.append(sum(int(entries.sum()) for entries in back.values()))
        return 50.0

    found = drift.attribute(model, former, stack.masks, evaluate)
    assert [group["entries"] for group in found.values()] == seen
    total = sum(p.numel() for p in drift.backbone(model).values())
    for names in (drift.KINDS, drift.STATES):
        assert sum(found[name]["entries"] for name in names if name in found) == total
    assert found["locked"]["entries"] == stack.stats()["locked"]
    assert not any(entries.any() for entries in tiny.changed(model, present).values())


def test_all_comes_again_after_an_error():
    model = tiny.bert()
    former = moved(model)
    present = tiny.snapshot(model)
    everything = dict.fromkeys(drift.backbone(model))
    with pytest.raises(RuntimeError), drift.put_back(model, former, everything):
        assert all(torch.equal(former[n], p) for n, p in drift.backbone(model).items())
        raise RuntimeError
    assert not any(entries.any() for entries in tiny.changed(model, present).values())
