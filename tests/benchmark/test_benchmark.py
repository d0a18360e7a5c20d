"""The task sequence end to end on the embedded tasks: matrix, locks, resuming, provenance."""

import json
import math
import random
import shutil
from dataclasses import replace

import datasets
import numpy
import pytest
import torch
import transformers
from tiny_backbones import CONFIGS
from toy_data import TASK, write_toy

from bitstack_nb import Protocol, Result, Task, load_results, run, stack
from bitstack_nb.benchmark import sequence, training
from bitstack_nb.benchmark.heads import Heads
from bitstack_nb.benchmark.inputs import load_inputs
from bitstack_nb.benchmark.strategies import all_strategies, strategy_names
from bitstack_nb.benchmark.training import MultiHead, accuracy
from bitstack_nb.data.backbones import collate, encode, load_backbone
from bitstack_nb.data.loading import load_task
from bitstack_nb.data.tasks import find_task
from bitstack_nb.fitting import fit_head

# Small enough for seconds, large enough that every stage trains and locks something.
SMALL = Protocol(
    tasks=("imdb", "ag_news", "dbpedia"), train_size=64, test_size=56, max_length=24, epochs=1
)
STRATEGIES = {
    "finetune": SMALL,
    "bitstack": SMALL.with_strategy("bitstack", budget="fresh"),
    "recall": replace(SMALL, head_learning_rate=1e-2).with_strategy("recall", sparsity=0.3),
    "joint": SMALL.with_strategy("joint"),
    "bitstack-strict": SMALL.with_strategy("bitstack-strict"),
    "random-mask": SMALL.with_strategy("random-mask", budget="fresh"),
    "magnitude-mask": SMALL.with_strategy("magnitude-mask"),
    "frozen": replace(SMALL, head_learning_rate=1e-2).with_strategy("frozen"),
    "ewc": SMALL.with_strategy("ewc", n_batches=2),
    "replay": SMALL.with_strategy("replay", replay_size=10),
    "lora": SMALL.with_strategy("lora", rank=2),
    "single": SMALL.with_strategy("single"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(protocol, output=folder) for name, protocol in STRATEGIES.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matrix_is_measured_where_it_can_be(results, strategy):
    rows = (2,) if strategy == "joint" else (0, 1, 2)
    matrix = results[strategy].matrix
    for trained in range(3):
        for task in range(3):
            measured = trained in rows and task <= trained
            assert (matrix[trained][task] is not None) == measured
    assert all(0 <= a <= 100 for row in matrix for a in row if a is not None)


@pytest.mark.parametrize("strategy", ["finetune", "replay"])
def test_a_new_head_is_fitted_on_its_own_task_before_training(tmp_path, monkeypatch, strategy):
    """Replay mixes other tasks' rows into training, but not into this."""
    protocol = SMALL.with_strategy(strategy, head_steps=8)
    seen = []

    def watched(model, batches, *, steps):
        seen.append((steps, {int(label) for batch in batches for label in batch["labels"]}))
        return fit_head(model, batches, steps=steps)

    monkeypatch.setattr(sequence, "fit_head", watched)
    fitted = run(protocol, output=tmp_path)
    assert [steps for steps, _ in seen] == [8] * 3
    assert [max(labels) for _, labels in seen] == [1, 3, 13]
    plain = run(replace(protocol, head_steps=None), output=tmp_path)
    assert len(seen) == 3 and plain.matrix != fitted.matrix


def test_recall_fits_heads_anyway_and_joint_training_knows_no_new_one():
    for strategy in ("recall", "joint"):
        assert SMALL.with_strategy(strategy, head_steps=4) == SMALL.with_strategy(strategy)


def test_a_mixed_batch_is_scored_by_each_rows_own_head():
    backbone = load_backbone("tiny-gpt2", max_length=24, seed=0)
    heads = Heads(backbone.model.eval(), seed=0)
    rows = []
    for index, (name, labels) in enumerate([("imdb", 2), ("ag_news", 4), ("dbpedia", 14)]):
        heads.add(name, labels)
        data = load_task(
            find_task(name), "embedded", train_size=index + 1, test_size=1, seed=0
        ).train
        rows += [{**row, "task": index} for row in encode(data, backbone)]
    make_batch = collate(backbone)
    joint = MultiHead(heads)
    mixed = joint(**make_batch(rows))["loss"]
    singles = []
    for row in rows:
        batch = make_batch([row])
        model = heads.use(heads.names[int(batch.pop("task"))])
        singles.append(model(**batch).loss)
    assert mixed.item() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-5)
    mixed.backward()
    assert all(p.grad.any() for head in heads.modules().values() for p in head.parameters())
    assert {id(p) for h in heads.modules().values() for p in h.parameters()} < {
        id(p) for p in joint.parameters()
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_time_of_a_step_is_that_of_training_over_its_steps(results, strategy):
    times = results[strategy].times
    sizes = {"joint": [3 * 64], "replay": [64, 74, 84]}.get(strategy, [64, 64, 64])
    for train, step, size in zip(times["train"], times["step"], sizes, strict=True):
        assert train / step == pytest.approx(math.ceil(size / SMALL.batch_size))


def test_locks_follow_the_budget(results):
    stats = results["bitstack"].lock_stats
    eligible = stats[0]["eligible"]
    assert [s["locked"] for s in stats] == sorted(s["locked"] for s in stats)
    # fresh: every task locks its own share, ties aside.
    assert stats[-1]["locked"] == pytest.approx(3 * 0.12 * eligible, rel=0.01)
    last = [row for row in results["bitstack"].locks if row["task"] == 3]
    assert sum(row["locked"] for row in last) == stats[-1]["locked"]
    assert results["finetune"].lock_stats == results["finetune"].locks == []


@pytest.mark.parametrize("strategy", ["recall", "lora", "single"])
def test_a_model_per_task_forgets_nothing(tmp_path, monkeypatch, strategy):
    """Every task is predicted, row by row, as just after it was trained."""
    predictions = {}

    def watched(model, data, *args, **kwargs):
        def record(module, inputs, output):
            predictions.setdefault(len(predictions_of), []).append(output.logits.clone())

        predictions_of.append(data)
        handle = model.register_forward_hook(record)
        try:
            return accuracy(model, data, *args, **kwargs)
        finally:
            handle.remove()

    predictions_of = []
    monkeypatch.setattr(sequence, "accuracy", watched)
    result = run(STRATEGIES[strategy], output=tmp_path)
    logits = list(predictions.values())  # tasks 1; 1, 2; 1, 2, 3
    assert len(logits) == 6
    for first, *later in ((0, 1, 3), (2, 4)):
        for again in later:
            assert all(map(torch.equal, logits[first], logits[again]))
    for task in range(3):
        assert len({row[task] for row in result.matrix[task:]}) == 1
    assert result.metrics["forgetting"] == result.metrics["forgetting_chaudhry"] == 0
    assert result.metrics["average_accuracy"] == result.metrics["learning_accuracy"]


def test_recall_gives_each_task_its_share(results):
    owned = [stats["frozen_pct"] for stats in results["recall"].lock_stats]
    assert owned == pytest.approx([30, 60, 90], abs=0.1)


def test_where_the_first_task_was_forgotten(results):
    """The same number of examples is behind every accuracy; nothing drifts under its own model."""
    for name, result in results.items():
        drifts = name not in ("joint", "recall", "frozen", "lora", "single")
        assert bool(result.drift) == drifts, name
        assert {"norms", "attention", "MLP"} <= result.drift.keys() or not drifts
        assert all(0 <= group["accuracy"] <= 100 for group in result.drift.values())
    assert "locked" not in results["finetune"].drift
    locked = results["bitstack"].drift["locked"]["entries"]
    assert locked == results["bitstack"].lock_stats[-1]["locked"]


def test_result_says_where_it_comes_from(results):
    result = results["bitstack"]
    assert Protocol.from_dict(result.protocol) == STRATEGIES["bitstack"]
    origin = result.provenance
    assert origin["packages"]["torch"] == torch.__version__
    assert origin["model"]["source"] == "built"
    assert {"imdb", "ag_news", "dbpedia"} == origin["data"].keys()
    assert all(data["synthetic"] for data in origin["data"].values())
    assert len(result.times["train"]) == len(result.times["update"]) == 3


def test_finished_runs_are_not_repeated(tmp_path):
    protocol = replace(SMALL, tasks=SMALL.tasks[:1], train_size=16)
    first = run(protocol, output=tmp_path)
    path = tmp_path / f"{protocol.name}.json"
    written = path.stat().st_mtime_ns
    assert run(protocol, output=tmp_path) == first == load_results(tmp_path)[0]
    assert path.stat().st_mtime_ns == written
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.mark.parametrize(
    ("strategy", "where"),
    [
        *((name, "training") for name in STRATEGIES),
        *((name, "evaluation") for name in ("finetune", "bitstack", "recall", "joint", "single")),
    ],
)
def test_killed_run_ends_like_an_unbroken_one(results, tmp_path, monkeypatch, strategy, where):
    protocol = STRATEGIES[strategy]
    calls = {"training": 0, "evaluation": 0}

    def dying(what, real, last):
        def call(*args, **kwargs):
            calls[what] += 1
            if where == what and calls[what] == last:
                raise Killed
            return real(*args, **kwargs)

        return call

    # Joint training has one stage only: there it dies in the last evaluation.
    last = {"training": 1 if strategy == "joint" else 3, "evaluation": 3}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sequence, "train", dying("training", sequence.train, last["training"]))
        patch.setattr(sequence, "accuracy", dying("evaluation", accuracy, last["evaluation"]))
        run(protocol, output=tmp_path)
    assert not list(tmp_path.glob("*.json"))
    torch.manual_seed(12345)  # the new process starts from another state
    resumed = run(protocol, output=tmp_path)
    assert resumed.matrix == results[strategy].matrix
    assert resumed.locks == results[strategy].locks
    assert resumed.storage == results[strategy].storage
    assert [item.name for item in tmp_path.iterdir()] == [f"{protocol.name}.json"]


def test_half_written_checkpoint_is_passed_over(results, tmp_path, monkeypatch):
    real = sequence.save_file

    def cut_short(tensors, path, *args):
        real(tensors, path, *args)
        if "stage-2" in str(path):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sequence, "save_file", cut_short)
        run(SMALL, output=tmp_path)
    assert run(SMALL, output=tmp_path).matrix == results["finetune"].matrix


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    expected = torch.rand(1), numpy.random.rand(), random.random()
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    run(replace(SMALL, tasks=SMALL.tasks[:1], train_size=16), output=tmp_path)
    assert (torch.rand(1), numpy.random.rand(), random.random()) == expected


def test_embedded_data_have_no_rows_for_an_own_dataset(tmp_path):
    own = Task(name="own", dataset="me/mine", text=("text",), label="label", num_labels=2)
    with pytest.raises(ValueError, match=r"no embedded data for 'me/mine'.*FOLDER"):
        run(replace(SMALL, tasks=(own,)), output=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", [*CONFIGS, "bert with hidden states"])
def test_own_tasks_from_a_folder_on_any_classifier(tmp_path, folders, architecture, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_toy(tmp_path / "data")
    two = replace(TASK, name="two", num_labels=2, relabel=(0, 1, 1))
    model = folders[architecture.split()[0]]
    if architecture not in CONFIGS:  # its forward gives more than logits
        model = shutil.copytree(model, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "output_hidden_states": True}))
    protocol = Protocol(
        strategy="bitstack",
        model=str(model),
        data=str(tmp_path / "data"),
        tasks=(TASK, two),
        train_size=24,
        test_size=12,
        max_length=8,
        epochs=1,
    )
    result = run(protocol, output=tmp_path / "runs")
    assert [len([a for a in row if a is not None]) for row in result.matrix] == [1, 2]
    assert 0.1 < result.lock_stats[-1]["frozen_pct"] / 100 < 0.25
    assert Protocol.from_dict(result.protocol) == protocol


def test_half_precision_is_on_in_every_stage_and_evaluation(tmp_path, monkeypatch):
    """accelerate's mark on the model once kept the second Trainer from autocast."""
    monkeypatch.setattr(training, "half_precision", lambda device: "bf16")
    dtypes = {"train": [], "evaluate": [], "update": []}

    def watched(what, real):
        def call(model, *args, **kwargs):
            # The first linear layer of the first block sees what autocast made of its input.
            block = model.base_model.h[0].attn.c_attn
            handle = block.register_forward_hook(lambda *io: dtypes[what].append(io[2].dtype))
            try:
                return real(model, *args, **kwargs)
            finally:
                handle.remove()

        return call

    monkeypatch.setattr(sequence, "train", watched("train", sequence.train))
    monkeypatch.setattr(sequence, "accuracy", watched("evaluate", sequence.accuracy))
    monkeypatch.setattr(stack, "measure", watched("update", stack.measure))
    protocol = replace(SMALL.with_strategy("bitstack"), tasks=SMALL.tasks[:2], train_size=16)
    run(protocol, output=tmp_path)
    assert {name: set(seen) for name, seen in dtypes.items()} == {
        "train": {torch.bfloat16},
        "evaluate": {torch.bfloat16},
        "update": {torch.float32},
    }


@pytest.mark.parametrize("damage", ["model.safetensors", "numbers.json", "masks.safetensors"])
def test_a_damaged_state_says_what_to_delete(tmp_path, monkeypatch, damage):
    state = stop_in_stage(2, STRATEGIES["bitstack"], tmp_path, monkeypatch)
    cut(state / "stage-1" / damage)
    with pytest.raises(ValueError, match=f"damaged.*delete {state}") as caught:
        run(STRATEGIES["bitstack"], output=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["model.safetensors", "numbers.json", "heads.safetensors"])
def test_behind_a_damaged_stage_the_one_before_is_taken(results, tmp_path, monkeypatch, damage):
    """On a synced drive the newest files may not have arrived whole."""
    state = stop_in_stage(3, STRATEGIES["bitstack"], tmp_path, monkeypatch)
    assert sorted(folder.name for folder in state.iterdir()) == ["stage-1", "stage-2"]
    cut(state / "stage-2" / damage)
    resumed = run(STRATEGIES["bitstack"], output=tmp_path)
    assert resumed.matrix == results["bitstack"].matrix
    assert resumed.locks == results["bitstack"].locks
    assert not state.exists()


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


def test_a_state_from_other_data_is_refused(tmp_path, monkeypatch):
    state = stop_in_stage(2, SMALL, tmp_path, monkeypatch)
    numbers = json.loads((state / "stage-1" / "numbers.json").read_text())
    numbers["origin"]["data"]["imdb"]["sample"]["train"] = "0" * 64
    (state / "stage-1" / "numbers.json").write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match="another data"):
        run(SMALL, output=tmp_path)


def stop_in_stage(number, protocol, folder, monkeypatch):
    real = sequence.train

    def die(*args, seed, **kwargs):
        if seed == number - 1:
            raise Killed
        return real(*args, seed=seed, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sequence, "train", die)
        run(protocol, output=folder)
    return folder / f"{protocol.name}.state"


def test_a_strategys_file_has_its_name():
    assert strategy_names() == sorted(all_strategies()) == sorted(STRATEGIES)


def test_the_heads_have_a_rate_of_their_own(tmp_path, monkeypatch):
    """Ten times the backbone's through warm-up and decay, for every strategy alike."""
    seen = []

    class Rates(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            inside = model.backbone if isinstance(model, MultiHead) else model
            backbone = {id(p) for p in inside.base_model.parameters()}
            rates = {True: set(), False: set()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rates[id(parameter) in backbone].add(group["lr"])
            stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert len(set(stepped)) == len(stepped)
            assert {id(p) for p in model.parameters() if p.requires_grad} <= set(stepped)
            assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}
            seen.append((rates[True].pop(), rates[False].pop()))
            assert rates == {True: set(), False: set()}

    real = sequence.train

    def watched(*args, callbacks, **kwargs):
        real(*args, callbacks=[*callbacks, Rates()], **kwargs)

    monkeypatch.setattr(sequence, "train", watched)
    for strategy in ("finetune", "bitstack", "recall", "joint", "replay", "lora"):
        protocol = replace(SMALL, tasks=SMALL.tasks[:2], head_learning_rate=2e-2, warmup_steps=2)
        run(protocol.with_strategy(strategy), output=tmp_path)
        assert max(backbone for backbone, _ in seen) == pytest.approx(2e-3)
        assert all(head == pytest.approx(10 * backbone) for backbone, head in seen)
        seen.clear()


def test_replay_mixes_in_training_rows_of_earlier_tasks(tmp_path, monkeypatch):
    """Each row of an earlier task is one of its training rows, and goes to its own head."""
    protocol = replace(STRATEGIES["replay"], tasks=SMALL.tasks[:2])
    inputs = load_inputs(protocol, torch.device("cpu"))
    seen = []

    def watched(model, data, *args, **kwargs):
        seen.append((type(model), data.to_list()))

    monkeypatch.setattr(sequence, "train", watched)
    result = run(protocol, output=tmp_path)
    (_, first), (module, second) = seen
    assert first == inputs.train[0].to_list() and module is MultiHead
    earlier = [row for row in second if row.pop("task") == 0]
    assert len(earlier) == 10 and all(row in first for row in earlier)
    assert second[: len(inputs.train[1])] == inputs.train[1].to_list()
    assert result.storage["bytes"] > 10 * 4


def test_a_run_records_what_its_tasks_take(results):
    stored = {name: result.storage["bytes"] for name, result in results.items()}
    assert stored["finetune"] == stored["joint"] == stored["frozen"] == 0
    masks = results["bitstack"].lock_stats[0]["eligible"] / 8
    assert masks <= stored["bitstack"] == stored["random-mask"] < 1.01 * masks
    values = 4 * results["recall"].lock_stats[-1]["locked"]
    assert values < stored["recall"] <= 1.01 * (values + 2 * masks)  # owners are compressed
    assert stored["single"] > stored["recall"] > stored["lora"] > stored["bitstack"]


def test_names_depend_on_what_matters():
    assert SMALL.name == replace(SMALL, sparsity=0.5, budget="fresh").name
    union, fresh = (SMALL.with_strategy("bitstack", budget=b) for b in ("union", "fresh"))
    names = {
        p.name for p in (SMALL, union, fresh, replace(union, seed=1), replace(union, epochs=3))
    }
    assert len(names) == 5
    assert SMALL.name == replace(SMALL, importance="fisher").name
    assert SMALL.name == replace(SMALL, head_learning_rate=SMALL.learning_rate).name
    assert union.name == replace(union, importance="gradient").name
    recall = SMALL.with_strategy("recall")
    assert recall.name == replace(recall, budget="fresh").name
    drawn = replace(recall, importance="random")
    assert drawn.name == replace(recall, importance="random", n_batches=8).name
    assert drawn == Protocol.from_dict(drawn.to_dict()) and replace(drawn, seed=1).seed == 1
    more = {
        p.name
        for p in (recall, replace(recall, importance="fisher"), replace(recall, sparsity=0.2))
    }
    assert len(more | {replace(SMALL, head_learning_rate=1.0).name, SMALL.name}) == 5
    for strategy, setting, value in (("ewc", "strength", 5), ("lora", "rank", 4)):
        own = SMALL.with_strategy(strategy)
        assert own.name != replace(own, **{setting: value}).name
        assert SMALL.name == replace(SMALL, **{setting: value}).name
    assert replace(SMALL, epochs=1.0, weight_decay=0.0) == replace(SMALL, weight_decay=0)
    assert replace(SMALL, train_size=1.0).name != replace(SMALL, train_size=1).name


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
        ({"sampling": "tail"}, "tail.*head"),
        ({"evaluate_on": "train"}, "train.*heldout"),
        ({"strategy": "bitstack", "sparsity": 1.2}, "sparsity is 1.2"),
        ({"strategy": "bitstack", "budget": "new"}, "new.*fresh"),
        ({"strategy": "bitstack", "importance": "luck"}, "luck.*fisher"),
        ({"strategy": "recall", "importance": "luck"}, "luck.*fisher"),
        ({"strategy": "bitstack", "importance": "random"}, "random.*fisher"),
        ({"strategy": "recall", "sparsity": 0.3}, r"sparsity is 0\.3.*5 tasks.*0\.2"),
        ({"head_learning_rate": 0}, "head_learning_rate is 0"),
        ({"strategy": "random-mask", "budget": "new"}, "new.*fresh"),
        ({"strategy": "ewc", "strength": -1}, "strength is -1.*0 on"),
        ({"strategy": "lora", "rank": 0}, "rank is 0.*at least 1"),
        ({"strategy": "replay", "replay_size": 0.5}, "replay_size is 0.5.*whole"),
        ({"strategy": "bitstack", "n_batches": 0}, "n_batches is 0.*at least 1"),
        ({"strategy": "ewc", "n_batches": -1}, "n_batches is -1.*at least 1"),
        ({"strategy": "lora", "head_steps": -1}, "head_steps is -1.*at least 0"),
        ({"warmup_steps": 0.5}, "warmup_steps is 0.5.*whole"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1.*0 on"),
    ],
)
def test_bad_protocols_say_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_no_gpu_where_one_is_asked_for(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU"):
        run(SMALL, output=tmp_path, device="cuda")


def test_results_round_trip(results, tmp_path):
    path = tmp_path / "result.json"
    results["bitstack"].save(path)
    assert Result.load(path) == results["bitstack"]
    json.loads(path.read_text())
