"""Heads of several tasks on one backbone of transformers: swapping and initial weights."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from tiny_backbones import DECODERS, HEAD

from bitstack_nb.data.backbones import Backbone, collate, encode, load_backbone
from bitstack_nb.data.pooling import Pooled
from bitstack_nb.head import Head, labelled, part_names, place, present

ROWS = datasets.Dataset.from_dict({"text": ["red sun", "moon"], "label": [1, 0]})


# A decoder, and encoders whose heads are made of one, two and two modules; then linear heads.
OWN = [(architecture, None) for architecture in ("gpt2", "bert", "distilbert", "modernbert")]
POOLED = [(each, "mean") for each in ("gpt2", "bert", "distilbert")]
POOLED += [("gpt2", "cls"), ("bert", "cls")]


@pytest.fixture(params=OWN + POOLED, ids=str)
def backbone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Backbone:
    architecture, pooling = request.param
    return load_backbone(str(folders[architecture]), max_length=8, seed=0, pooling=pooling)


@pytest.mark.parametrize(("architecture", "pooling"), POOLED)
def test_a_pooled_head_reads_the_texts_own_states(folders, architecture, pooling) -> None:
    """Of all its tokens or of one, and never of the padding."""
    backbone = load_backbone(str(folders[architecture]), max_length=8, seed=0, pooling=pooling)
    model, head = backbone.model, make(backbone, 3)
    place(model, head)
    rows = list(encode(ROWS, backbone))
    found = logits(model, collate(backbone)(rows))
    own = next(iter(head.parts.values()))
    for row, expected in zip(rows, found, strict=True):
        states = model.base_model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
        one = states[-1 if architecture in DECODERS else 0]
        torch.testing.assert_close(own(states.mean(0) if pooling == "mean" else one), expected)


def make(backbone: Backbone, labels: int, *, seed: str = "0/a") -> Head:
    pattern = present(backbone.model, part_names(backbone.model))
    return labelled(backbone.model, pattern, [str(i) for i in range(labels)], seed=seed)


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def test_heads_swap_and_come_back_bit_for_bit(backbone: Backbone) -> None:
    model, two, five = backbone.model, make(backbone, 2), make(backbone, 5)
    batch = collate(backbone)(list(encode(ROWS, backbone)))
    place(model, two)
    first = logits(model, batch)
    assert first.shape == (2, 2)
    place(model, five)
    assert (model.num_labels, model.config.num_labels) == (5, 5)
    batch["labels"] = torch.tensor([4, 2])
    output = model(**batch)
    assert output.logits.shape == (2, 5)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    # Training one head leaves the other as it was.
    output.loss.backward()
    with torch.no_grad():
        for _, parameter in five.named_parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    place(model, two)
    assert torch.equal(logits(model, batch), first)


def test_a_head_is_all_that_is_outside_the_backbone(backbone: Backbone) -> None:
    architecture = Path(backbone.name).name
    usual = {"score"} if architecture in DECODERS else {"classifier"}
    head = make(backbone, 4)
    pooled = isinstance(backbone.model, Pooled)
    assert head.parts.keys() == (usual if pooled else HEAD.get(architecture, usual))
    place(backbone.model, head)
    own = {id(p) for _, p in head.named_parameters()}
    base = {id(p) for p in backbone.model.base_model.parameters()}
    assert own | base == {id(p) for p in backbone.model.parameters()}
    assert not own & base


def test_a_new_heads_last_layer_follows_its_seed(backbone: Backbone) -> None:
    one, again, other = (make(backbone, 3, seed=s).state_dict() for s in ("1/a", "1/a", "1/b"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    last = [name for name, tensor in one.items() if tensor.shape[0] == 3]
    for name in last:
        assert torch.equal(one[name], other[name]) == name.endswith("bias")
        assert one[name].any() != name.endswith("bias")


def test_heads_follow_the_mode_and_the_device_of_the_model(backbone: Backbone) -> None:
    head = make(backbone, 2)
    for training in (True, False):
        backbone.model.train(training)
        place(backbone.model, head)
        assert {module.training for module in backbone.model.modules()} == {training}
    backbone.model.to("meta")  # a device that every machine has
    place(backbone.model, make(backbone, 2))
    assert {p.device.type for p in backbone.model.parameters()} == {"meta"}
