"""Protocols: the name says what was run, wrong settings say what to do, and nothing heavy loads."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from bitstack_nb import Protocol, run
from bitstack_nb.benchmark import PRESETS, all_strategies, strategies, strategy_names

SMALL = Protocol(
    tasks=("imdb", "ag_news", "dbpedia"),
    train_size=64,
    test_size=56,
    epochs=1,
    batch_size=16,
    learning_rate=2e-3,
)
# Also tests/results/test_recorded.py: every recorded run has the name of its protocol.
NAMED = {
    "finetune-seed0-fa6f398242": replace(SMALL, max_length=24),
    "joint-seed0-1a80a6314c": replace(SMALL, max_length=24).with_strategy("joint"),
    "replay-seed0-4363624091": replace(SMALL, max_length=24).with_strategy(
        "replay", replay_size=10, head_steps=4
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stays_as_it_is(name):
    assert NAMED[name].name == name


def test_a_name_depends_on_what_matters():
    """Not on settings of other strategies, nor on how a setting is written."""
    assert SMALL.name == replace(SMALL, sparsity=0.5, budget="fresh", importance="fisher").name
    assert SMALL.name == replace(SMALL, head_learning_rate=SMALL.learning_rate).name
    assert SMALL.name != replace(SMALL, head_learning_rate=1.0).name
    assert replace(SMALL, epochs=1.0, weight_decay=0.0) == replace(SMALL, weight_decay=0)
    assert replace(SMALL, train_size=1.0).name != replace(SMALL, train_size=1).name
    union = SMALL.with_strategy("bitstack")
    assert union.name == replace(union, importance="gradient").name
    others = [{"budget": "fresh"}, {"seed": 1}, {"epochs": 3}, {"importance": "fisher"}]
    others.append({"importance_mode": "train"})
    assert len({union.name, *(replace(union, **settings).name for settings in others)}) == 6
    assert union.name == replace(union, importance_mode="eval").name
    recall = SMALL.with_strategy("recall")
    assert recall.name == replace(recall, budget="fresh").name
    gradient = SMALL.with_strategy("recall", importance="gradient")
    assert gradient.name != recall.name == replace(recall, n_batches=8).name
    for strategy, setting, value in (("ewc", "strength", 5), ("lora", "rank", 4)):
        own = SMALL.with_strategy(strategy)
        assert own.name != replace(own, **{setting: value}).name
    assert SMALL.name != replace(SMALL, pooling="mean").name
    probe = SMALL.with_strategy("probe")
    assert probe == replace(probe, pooling="cls", head_steps=4)
    for strategy in ("recall", "joint"):  # recall fits heads anyway, joint training has no new one
        assert SMALL.with_strategy(strategy, head_steps=4) == SMALL.with_strategy(strategy)


@pytest.mark.parametrize("strategy", strategy_names())
def test_a_protocol_comes_back_from_its_record(strategy):
    protocol = replace(SMALL, seed=3).with_strategy(strategy)
    assert Protocol.from_dict(protocol.to_dict()) == protocol


def test_rates_on_the_tiny_backbone_are_the_strategys_own_unless_they_were_changed():
    smoke = Protocol()
    for strategy in all_strategies():
        assert smoke.with_strategy(strategy).with_strategy("finetune") == smoke
    recall = all_strategies()["recall"].tiny
    assert smoke.with_strategy("recall").learning_rate == recall["learning_rate"]
    assert replace(smoke, learning_rate=0.5).with_strategy("recall").learning_rate == 0.5
    assert smoke.with_strategy("recall", learning_rate=0.5).learning_rate == 0.5
    real = replace(smoke, model="folder", data="folder").with_strategy("recall")
    assert (real.learning_rate, real.sparsity) == (smoke.learning_rate, Protocol.sparsity)


def test_chosen_settings_are_those_of_minilm_or_of_the_tiny_backbone():
    """As recorded in results/five-small."""
    real = replace(SMALL, model="folder", data="folder")
    for sparsity, rate in {0.01: 8e-3, 0.02: 4e-3, 0.05: 2e-3}.items():
        recall = real.with_chosen("recall", sparsity=sparsity)
        assert (recall.learning_rate, recall.head_learning_rate) == (rate, 1e-2)
        assert recall.importance == "random"
    assert real.with_chosen("recall").sparsity == 0.01
    assert real.with_chosen("recall", learning_rate=0.5).learning_rate == 0.5
    assert real.with_chosen("lora").learning_rate == 2e-3
    for strategy in ("finetune", "bitstack", "replay", "single"):
        assert real.with_chosen(strategy) == real.with_strategy(strategy)
    assert SMALL.with_chosen("recall") == SMALL.with_strategy("recall")


def test_every_strategy_says_how_it_is_shown():
    strategies = all_strategies()
    assert sorted(strategies) == strategy_names()  # a file has its strategy's name
    assert len({s.label for s in strategies.values()}) == len(strategies)
    assert len({s.colour for s in strategies.values()}) == len(strategies)
    known = {item.name for item in fields(Protocol)}
    assert all(known.issuperset(s.settings) for s in strategies.values())
    shown = ["probe", "finetune", "ewc", "replay", "random-mask", "bitstack"]
    shown += ["lora", "shira", "recall", "single"]
    assert [name for name in strategies if name in shown] == shown


def test_a_new_strategy_is_a_new_file(tmp_path, monkeypatch):
    (tmp_path / "just_mine.py").write_text(
        "from bitstack_nb.benchmark.strategy import Strategy\n"
        "class Mine(Strategy):\n"
        "    name, label, order, colour = 'just-mine', 'my own', 35, 'red'\n"
    )
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    all_strategies.cache_clear()
    try:
        assert "just-mine" in strategy_names()
        protocol = replace(SMALL, tasks=("imdb",), train_size=16, strategy="just-mine")
        assert run(protocol, output=tmp_path / "runs").protocol["strategy"] == "just-mine"
        assert list(all_strategies()).index("just-mine") == 1 + list(all_strategies()).index("ewc")
    finally:
        all_strategies.cache_clear()


def test_every_field_says_what_it_is():
    assert all(item.metadata["help"] for item in fields(Protocol))


def test_presets_are_there_and_ci_is_the_smallest():
    assert list(PRESETS) == ["smoke", "ci", "quick", "published"]
    assert PRESETS["smoke"] == Protocol()
    ci, smoke = PRESETS["ci"], PRESETS["smoke"]
    assert ci.epochs * ci.train_size * len(ci.tasks) < smoke.epochs * smoke.train_size


def test_importing_protocols_loads_no_heavy_library():
    code = (
        "import sys, bitstack_nb.benchmark.protocol\n"
        "from bitstack_nb.benchmark import strategy_names; strategy_names()\n"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "magic"}, "magic.*finetune"),
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("imdb", "imdb")}, "imdb"),
        ({"tasks": ("imbd",)}, "imbd.*ag_news"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"data": "hub"}, "tiny-gpt2.*pretrained"),
        ({"evaluate_on": "train"}, "train.*heldout"),
        ({"strategy": "bitstack", "sparsity": 1.2}, "sparsity is 1.2"),
        ({"strategy": "bitstack", "budget": "new"}, "new.*fresh"),
        ({"strategy": "bitstack", "importance": "luck"}, "luck.*fisher"),
        ({"strategy": "bitstack", "importance": "random"}, "random.*fisher"),
        ({"pooling": "max"}, "max.*cls, mean"),
        ({"head_learning_rate": 0}, "head_learning_rate is 0"),
        ({"strategy": "ewc", "strength": -1}, "strength is -1.*0 on"),
        ({"strategy": "lora", "rank": 0}, "rank is 0.*at least 1"),
        ({"strategy": "replay", "replay_size": 0.5}, "replay_size is 0.5.*whole"),
        ({"strategy": "lora", "head_steps": -1}, "head_steps is -1.*at least 0"),
    ],
)
def test_wrong_settings_say_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)
