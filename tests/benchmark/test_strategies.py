"""The rules of each strategy, on tiny models driven stage by stage."""

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from torch.nn.functional import one_hot

from bitstack_nb import ExactRecall, Protocol
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.strategies.bitstack_strict import small_parameters
from bitstack_nb.benchmark.strategies.ewc import single_examples
from bitstack_nb.benchmark.strategies.probe import L2, best_regression
from bitstack_nb.benchmark.strategies.replay import kept_rows
from bitstack_nb.data.pooling import Pooled
from bitstack_nb.features import mean_pooled
from bitstack_nb.fitting import fit_head

CONTROLS = ("random-mask", "magnitude-mask")
PROTOCOL = Protocol(tasks=("imdb", "ag_news", "dbpedia"), batch_size=6, n_batches=2)


def make(name: str, model, **settings):
    defaults = {"n_batches": 2} if "mask" in name or name in ("bitstack", "ewc") else {}
    return all_strategies()[name](model, PROTOCOL.with_strategy(name, **defaults, **settings))


def train_stage(strategy, number: int, *, rate: float = 1e-2) -> None:
    """A stage as the benchmark and the Trainer do it, in plain torch."""
    model, batches = strategy.model, tiny.batches(4, seed=number)
    strategy.before_stage(number, batches)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.1)
    callbacks = strategy.callbacks()
    for callback in callbacks:
        callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    tiny.train(model, optimizer, batches, seed=number)
    for callback in callbacks:
        callback.on_train_end(None, None, None, model=model)
    strategy.after_stage(number, batches)


def backbone(model) -> dict[str, torch.Tensor]:
    return tiny.snapshot(model.base_model)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(tiny.as_bits(one[name]), tiny.as_bits(other[name])) for name in one)


def test_frozen_moves_the_backbone_in_the_first_task_only():
    model = tiny.bert()
    strategy, base = make("frozen", model), backbone(model)
    train_stage(strategy, 0)
    first, head = backbone(model), model.classifier.weight.detach().clone()
    assert not same(base, first)
    train_stage(strategy, 1)
    assert same(first, backbone(model))
    assert not torch.equal(head, model.classifier.weight)


def test_the_probe_solves_its_heads_and_moves_nothing_else():
    model = Pooled(tiny.bert(), "mean")
    strategy, base = make("probe", model), backbone(model)
    batches = tiny.batches(4, seed=0)
    strategy.before_stage(0, batches)
    assert same(base, backbone(model)) and not strategy.trains and strategy.storage([]) == 0
    features = mean_pooled(model, batches)
    labels = torch.cat([batch["labels"] for batch in batches])
    logits = torch.cat([model.eval()(**batch).logits for batch in batches])
    torch.testing.assert_close(logits, model.head(features))
    # At the least loss the residuals are as the penalty says, and sum to 0 over the rows.
    residuals = (logits.softmax(-1) - one_hot(labels, 3)).double()
    assert residuals.mean(0).abs().max() < 1e-4
    slope = residuals.T @ features.double() / len(labels)
    strengths = slope / -(model.head.weight * features.var(0, correction=0))
    assert min(abs(strengths.median() - l2) / l2 for l2 in L2) < 1e-2


def test_the_probe_needs_no_rows_of_every_class():
    weight, bias = best_regression(torch.randn(6, 4).double(), torch.tensor([0, 1] * 3), 3, seed=0)
    assert weight.shape == (3, 4) and bias.isfinite().all()


def test_lora_moves_only_the_adapter_of_its_task():
    model = tiny.gpt2()
    strategy = make("lora", model)
    before = backbone(model)
    for task in range(2):
        train_stage(strategy, task)
        moved = {
            n for n, changed in tiny.changed(model.base_model, before).items() if changed.any()
        }
        assert moved and all(f".task{task}." in name and ".lora_" in name for name in moved)
        before = backbone(model)


def test_shira_moves_only_the_values_of_its_task():
    """And these lie at other random weights for another task or seed."""
    model = tiny.gpt2()
    strategy = make("shira", model, sparsity=0.05)
    before = backbone(model)
    for task in range(2):
        train_stage(strategy, task)
        changed = tiny.changed(model.base_model, before)
        moved = {name for name, bits in changed.items() if bits.any()}
        assert moved and all(name.endswith(f"values.{task}") for name in moved)
        before = backbone(model)
    one, other, *_ = strategy._layers[0]._where
    assert len(one) == round(0.05 * 16 * 48) and 0 < len({*one.tolist()} & {*other.tolist()}) < 10
    protocol = replace(strategy.protocol, seed=1)
    again = all_strategies()["shira"](tiny.gpt2(), protocol)._layers[0]._where[0]
    assert not torch.equal(one, again)


def test_shira_is_that_of_peft():
    from peft import ShiraConfig, inject_adapter_in_model

    model, twin = tiny.bert(), tiny.bert()
    strategy = make("shira", model, sparsity=0.1)
    names = [name for name, m in twin.bert.named_modules() if isinstance(m, torch.nn.Linear)]
    inject_adapter_in_model(ShiraConfig(r=1, target_modules=names), twin.bert, "task0")
    for name, own in zip(names, strategy._layers, strict=True):
        layer = twin.bert.get_submodule(name)
        rows, columns = layer.shira_indices["task0"].long()
        own._where[0] = rows * layer.in_features + columns
        values = torch.randn(len(rows), generator=torch.Generator().manual_seed(len(rows)))
        own.values[0] = torch.nn.Parameter(values)
        layer.shira_weight["task0"] = torch.nn.Parameter(values.clone())
    (batch,) = tiny.batches(1, seed=0)
    one, other = model.eval()(**batch), twin.eval()(**batch)
    torch.testing.assert_close(one.logits, other.logits)
    one.loss.backward(), other.loss.backward()
    theirs = twin.bert.get_submodule(names[0]).shira_weight["task0"].grad
    torch.testing.assert_close(strategy._layers[0].values[0].grad, theirs)


def test_compressed_separate_models_are_near_the_trained_ones():
    """BitDelta has the signs, the other the largest singular values; embeddings are the base's."""
    names = ("single", "bitdelta", "delta-rank8")
    found = {}
    for name in names:
        strategy = make(name, tiny.gpt2())
        train_stage(strategy, 0)
        with strategy.model_of(0) as model:
            found[name] = backbone(model)
    base = strategy._base
    full, bits, low = ({name: found[each][name] - base[name] for name in base} for each in names)
    for name, delta in full.items():
        if name.startswith(("wte", "wpe")):
            assert delta.any() and not bits[name].any() and not low[name].any()
        elif delta.ndim < 2:
            torch.testing.assert_close(bits[name], delta, rtol=2e-3, atol=1e-6)
            assert torch.equal(bits[name], low[name])
        else:
            mean = float(delta.abs().mean())
            torch.testing.assert_close(bits[name].abs(), torch.full_like(delta, mean))
            assert ((bits[name] > 0) == (delta > 0)).all()
            left = torch.linalg.svdvals(delta)[8:].square().sum().sqrt()
            assert float((delta - low[name]).norm()) == pytest.approx(float(left), rel=0.1)


def test_bitfit_moves_only_biases_from_the_base():
    model = tiny.bert()
    strategy, base = make("bitfit", model), backbone(model)
    train_stage(strategy, 0)
    changed = tiny.changed(model.base_model, base)
    moved = {name for name, bits in changed.items() if bits.any()}
    assert moved and all(name.endswith("bias") for name in moved)
    strategy.before_stage(1, [])
    assert same(base, backbone(model))


def test_random_own_weights_follow_the_seed():
    def own(seed: int) -> list[torch.Tensor]:
        protocol = replace(PROTOCOL.with_strategy("recall", importance="random"), seed=seed)
        strategy = all_strategies()["recall"](tiny.bert(), protocol)
        train_stage(strategy, 0)
        return torch.cat([m.flatten() for m in strategy._tasks.mask("imdb").values()])

    assert torch.equal(own(0), own(0)) and not torch.equal(own(0), own(1))


def test_every_separate_model_starts_from_the_base():
    model = tiny.gpt2()
    strategy, base = make("single", model), backbone(model)
    train_stage(strategy, 0)
    assert not same(base, backbone(model))
    strategy.before_stage(1, [])
    assert same(base, backbone(model))


def test_a_head_is_fitted_as_exact_recall_fits_it():
    """And nothing else moves."""
    model, batches = tiny.bert(), tiny.batches(2, seed=0)
    base, head = backbone(model), tiny.snapshot(model.classifier)
    fit_head(model, batches, steps=4)
    assert same(base, backbone(model)) and not same(head, tiny.snapshot(model.classifier))
    recall = ExactRecall(twin := tiny.bert(), 0.2)
    recall.begin("a", loader=batches, head_steps=4)
    assert same(tiny.snapshot(model.classifier), tiny.snapshot(twin.classifier))


def test_lora_leaves_the_global_generator_alone_and_follows_the_seed():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = tiny.bert(), tiny.bert()
    make("lora", one)
    assert torch.equal(torch.rand(1), expected)
    make("lora", two)
    assert same(backbone(one), backbone(two))


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.functional", None)
    with pytest.raises(ValueError, match="pip install -U peft"):
        make("lora", tiny.bert())


# The controls and the strict method --------------------------------------------------------------


@pytest.mark.parametrize("budget", ["union", "fresh"])
@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_locks_as_many_weights_as_bitstack(name, budget):
    counts = {}
    for each in ("bitstack", name):
        strategy = make(each, tiny.gpt2(), budget=budget)
        counts[each] = []
        for task in range(3):
            train_stage(strategy, task)
            counts[each].append(strategy.stats()["locked"])
    ours, method = counts[name], counts["bitstack"]
    assert ours[0] == method[0] > 0
    # Behind the masks every task locks its share; otherwise the overlap is this run's own.
    assert ours == (method if budget == "fresh" else pytest.approx(method, rel=0.2))
    assert ours == sorted(set(ours))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_holds_what_it_locks(name):
    model = tiny.gpt2()
    strategy = make(name, model)
    train_stage(strategy, 0)
    before, masks = tiny.snapshot(model), dict(strategy._stack.masks)
    train_stage(strategy, 1)
    changed = tiny.changed(model, before)
    assert not any(changed[n][mask].any() for n, mask in masks.items())
    free = torch.cat([changed[n][~mask] for n, mask in masks.items()])
    assert free.float().mean() > 0.5


def test_importance_is_measured_with_dropout_if_asked():
    """As the published code does; a control counts in the same way."""
    for name in ("bitstack", "random-mask"):
        masks = {}
        for mode in ("eval", "train"):
            model = tiny.bert().eval()
            strategy = make(name, model, importance_mode=mode)
            torch.manual_seed(0)
            strategy.after_stage(0, tiny.batches(2, seed=0))
            assert model.training is False
            counter = strategy._stack if name == "bitstack" else strategy._count
            masks[mode] = torch.cat([mask.flatten() for mask in counter.masks.values()])
        assert masks["eval"].sum() == masks["train"].sum()
        assert not torch.equal(masks["eval"], masks["train"])


def test_the_random_mask_follows_the_seed():
    def masks(seed: int) -> torch.Tensor:
        model = tiny.gpt2()
        protocol = replace(PROTOCOL.with_strategy("random-mask", n_batches=2), seed=seed)
        strategy = all_strategies()["random-mask"](model, protocol)
        strategy.after_stage(0, tiny.batches(2, seed=0))
        return torch.cat([mask.flatten() for mask in strategy._stack.masks.values()])

    assert torch.equal(masks(0), masks(0))
    one, other = masks(0), masks(1)
    share = one.float().mean()
    assert (one & other).float().mean() == pytest.approx(float(share**2), rel=0.5)


def test_the_magnitude_mask_is_that_of_the_largest_free_weights():
    model = tiny.gpt2()
    strategy = make("magnitude-mask", model)
    for task in range(2):
        earlier = {n: mask.clone() for n, mask in strategy._stack.masks.items()}
        weights = dict(model.named_parameters())
        strategy.after_stage(task, tiny.batches(2, seed=task))
        pairs = [
            (weights[n].detach().abs()[~earlier[n]], mask[~earlier[n]])
            for n, mask in strategy._stack.masks.items()
        ]
        size, chosen = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert chosen.any() and not chosen.all()
        assert size[chosen].min() >= size[~chosen].max()


def test_strict_freezes_embeddings_norms_and_biases_after_the_first_task():
    model = tiny.bert()
    strategy = make("bitstack-strict", model)
    names = {id(p): name for name, p in model.named_parameters()}
    small = {names[id(p)] for p in small_parameters(model.base_model)}
    assert {name.rpartition(".")[2] for name in small} == {"weight", "bias"}
    assert all("embedding" in n or "Norm" in n or n.endswith("bias") for n in small)
    before = tiny.snapshot(model)
    train_stage(strategy, 0)
    assert all(tiny.changed(model, before)[name].any() for name in small if "key.bias" not in name)
    before = tiny.snapshot(model)
    train_stage(strategy, 1)
    changed = tiny.changed(model, before)
    assert not any(changed[name].any() for name in small)
    matrices = set(strategy._stack.masks) - small
    assert all(changed[name].any() for name in matrices)


# EWC and replay ----------------------------------------------------------------------------------


def test_ewc_without_strength_is_fine_tuning_bit_for_bit():
    ended = []
    for name, settings in (("finetune", {}), ("ewc", {"strength": 0})):
        model = tiny.bert()
        strategy = make(name, model, **settings)
        for task in range(3):
            train_stage(strategy, task)
        assert not model._forward_hooks
        ended.append(tiny.snapshot(model))
    assert same(*ended)


def test_ewcs_fisher_and_penalty_are_those_of_the_formula():
    model = tiny.bert()
    strategy = make("ewc", model, strength=3.0)
    batches = tiny.batches(2, seed=0)
    for task in range(2):
        strategy.before_stage(task, batches)
        strategy.after_stage(task, batches)
    strategy.before_stage(2, batches)
    assert float(strategy.penalty().detach()) == 0
    model.eval()
    weight = model.bert.encoder.layer[0].output.dense.weight
    squares = torch.zeros_like(weight)
    examples = list(single_examples(batches))
    assert len(examples) == 12
    for example in examples:
        squares += torch.autograd.grad(model(**example).loss, weight)[0].square()
    fisher = 2 * squares / 12  # two tasks, the same data
    found = strategy._fisher["encoder.layer.0.output.dense.weight"]
    assert torch.allclose(found, fisher, rtol=1e-3, atol=1e-12)
    with torch.no_grad():
        weight += 0.5
    assert float(strategy.penalty().detach()) == pytest.approx(
        1.5 * 0.25 * float(fisher.sum()), rel=1e-3
    )


def rows(task: int, count: int) -> Dataset:
    ids = [[task, number] for number in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [0] * count, "length": [2] * count})


def test_replay_takes_random_examples_by_the_seed():
    data = [rows(task, 30) for task in range(3)]
    protocol = PROTOCOL.with_strategy("replay", replay_size=8)
    replay = all_strategies()["replay"]

    def numbers(kept: Dataset) -> list[int]:
        return [number for _, number in kept["input_ids"]]

    assert {task: len(own) for task, own in replay.rows([0], data, protocol).items()} == {0: 30}
    third = replay.rows([2], data, protocol)
    assert {task: len(own) for task, own in third.items()} == {0: 8, 1: 8, 2: 30}
    assert len({*numbers(third[0])}) == 8
    assert numbers(replay.rows([1], data, protocol)[0]) == numbers(third[0])
    assert numbers(third[1]) != numbers(third[0])
    assert numbers(kept_rows(data[0], 0, replace(protocol, seed=1))) != numbers(third[0])
    assert len(kept_rows(rows(0, 5), 0, protocol)) == 5


# Storage -----------------------------------------------------------------


def test_storage_is_what_the_tensors_take():
    model = tiny.bert()
    weights = sum(4 * p.numel() for p in model.base_model.parameters())
    eligible = make("bitstack", model).stats()["eligible"]
    data = [rows(task, 30) for task in range(3)]
    found, best = {}, {}
    for name in (
        "finetune",
        "bitstack",
        "random-mask",
        "ewc",
        "single",
        "lora",
        "frozen",
        "bitfit",
    ):
        strategy = make(name, tiny.bert())
        for task in range(3):
            train_stage(strategy, task)
        found[name], best[name] = strategy.storage(data), strategy.best_storage(data)
    assert found["finetune"] == found["frozen"] == 0
    assert eligible / 8 <= found["bitstack"] == found["random-mask"] < eligible / 8 + 100
    assert found["single"] == 3 * weights
    assert 0 < found["ewc"] <= weights
    ranks = [module.weight.shape for module in linear_layers(model.base_model)]
    assert found["lora"] == 3 * 4 * 8 * sum(out + inside for out, inside in ranks)
    biases = [p for name, p in model.base_model.named_parameters() if name.endswith("bias")]
    assert found["bitfit"] == 3 * 4 * sum(p.numel() for p in biases)
    matrices = [module.weight.numel() for module in linear_layers(model.base_model)]
    tables = sum(
        m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Embedding)
    )
    others = 2 * (weights // 4 - sum(matrices) - tables)
    bits = sum(-(-size // 8) + 4 for size in matrices)
    low = sum(2 * 8 * (out + inside) for out, inside in ranks)
    for name, own in (("bitdelta", bits), ("delta-rank8", low)):
        strategy = make(name, tiny.bert())
        assert strategy.storage([]) == strategy.best_storage([]) == 3 * (own + others)
    shira = make("shira", tiny.bert(), sparsity=0.1)
    assert shira.storage([]) == 3 * 12 * sum(round(0.1 * size) for size in matrices)
    assert shira.best_storage([]) == shira.storage([]) / 3
    replay = make("replay", model, replay_size=8)
    assert replay.storage(data) == 3 * 8 * (2 + 1) * 4
    assert make("joint", model).storage(data) == 3 * 30 * (2 + 1) * 4
    halved = {name for name in found if best[name] != found[name]}
    assert halved == {"ewc", "single", "lora", "bitfit"}
    assert all(best[name] == found[name] // 2 for name in halved)


def linear_layers(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
