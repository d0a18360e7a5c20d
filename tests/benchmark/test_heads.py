"""Heads, one per task: swapping, seeds, states; on tiny random models saved to a folder."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from tiny_backbones import DECODERS, HEAD

from bitstack_nb.benchmark.heads import Heads
from bitstack_nb.data.backbones import Backbone, collate, encode, load_backbone
from bitstack_nb.data.errors import BackboneError

ROWS = datasets.Dataset.from_dict({"text": ["red sun", "moon"], "label": [1, 0]})


# A decoder, and encoders whose heads are made of one, two and two modules.
@pytest.fixture(params=["gpt2", "bert", "distilbert", "modernbert"])
def backbone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders[request.param]), max_length=8, seed=0)


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def test_heads_swap_and_come_back_bit_for_bit(backbone: Backbone) -> None:
    heads = Heads(backbone.model, seed=0)
    assert heads.current is None
    for name, labels in (("two", 2), ("five", 5)):
        heads.add(name, labels)
    batch = collate(backbone)(list(encode(ROWS, backbone)))
    first = logits(heads.use("two"), batch)
    assert first.shape == (2, 2)
    model = heads.use("five")
    assert heads.current == "five"
    assert (model.num_labels, model.config.num_labels) == (5, 5)
    batch["labels"] = torch.tensor([4, 2])
    output = model(**batch)
    assert output.logits.shape == (2, 5)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    # Training one head leaves the other as it was.
    output.loss.backward()
    with torch.no_grad():
        for parameter in heads.modules()["five"].parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    assert torch.equal(logits(heads.use("two"), batch), first)


def test_a_head_is_all_that_is_outside_the_backbone(backbone: Backbone) -> None:
    architecture = Path(backbone.name).name
    usual = {"score"} if architecture in DECODERS else {"classifier"}
    heads = Heads(backbone.model, seed=0)
    heads.add("a", 4)
    children = {name.split("/")[1].split(".")[0] for name in heads.state_dict()}
    assert children == HEAD.get(architecture, usual)
    heads.use("a")
    own = {id(p) for p in heads.modules()["a"].parameters()}
    base = {id(p) for p in backbone.model.base_model.parameters()}
    assert own | base == {id(p) for p in backbone.model.parameters()}
    assert not own & base


def test_a_head_depends_on_seed_and_name_but_not_on_order(backbone: Backbone) -> None:
    def state(seed: int, *names: str) -> dict[str, torch.Tensor]:
        heads = Heads(backbone.model, seed=seed)
        for name in names:
            heads.add(name, 3)
        return heads.state_dict()

    def last(state: dict[str, torch.Tensor], task: str) -> torch.Tensor:
        return next(v for k, v in state.items() if k.startswith(f"{task}/") and v.shape[0] == 3)

    forward, backward, other = state(1, "a", "b"), state(1, "b", "a"), state(2, "a", "b")
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[key], backward[key]) for key in forward)
    assert not torch.equal(last(forward, "a"), last(forward, "b"))
    assert not torch.equal(last(forward, "a"), last(other, "a"))
    biases = [v for k, v in forward.items() if v.shape == (3,) and k.endswith("bias")]
    assert all(not bias.any() for bias in biases)


def test_heads_follow_the_mode_of_the_model(folders: dict[str, Path]) -> None:
    made = load_backbone(str(folders["roberta"]), max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    for name in ("a", "b"):
        heads.add(name, 2)
    for training in (True, False):
        made.model.train(training)
        for name in ("a", "b"):
            modes = {module.training for module in heads.use(name).modules()}
            assert modes == {training}


def test_heads_follow_the_device_of_the_model() -> None:
    # The meta device is one that every machine has.
    made = load_backbone("tiny-gpt2", max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    heads.add("a", 2)
    made.model.to("meta")
    assert heads.use("a").score.weight.device.type == "meta"
    heads.add("b", 2)
    assert {p.device.type for p in heads.modules()["b"].parameters()} == {"meta"}


def test_head_states_round_trip(backbone: Backbone) -> None:
    source, target = (Heads(backbone.model, seed=seed) for seed in (0, 9))
    for heads in (source, target):
        for name, labels in (("z", 2), ("a", 5)):
            heads.add(name, labels)
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    kept = target.modules()["a"]
    target.load_state_dict(state)
    assert target.modules()["a"] is kept  # an optimizer may hold its parameters
    assert all(torch.equal(target.state_dict()[key], state[key]) for key in state)
    assert target.use("z").config.num_labels == 2


def test_heads_refuse_what_cannot_be() -> None:
    made = load_backbone("tiny-gpt2", max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    heads.add("a", 2)
    with pytest.raises(BackboneError, match="'a' has a head already"):
        heads.add("a", 2)
    with pytest.raises(BackboneError, match="'b' has no head; those that have: a"):
        heads.use("b")
    assert heads.names == ("a",)
    made.model.config.num_labels = 7
    with pytest.raises(BackboneError, match="7 outputs"):
        Heads(made.model, seed=0)
