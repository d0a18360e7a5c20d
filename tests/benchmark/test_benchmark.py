"""The task sequence end to end on the embedded tasks: matrix, locks, resuming, provenance."""

import json
import math
import random
import shutil
import threading
import time
from dataclasses import replace

import datasets
import numpy
import pytest
import torch
import transformers
from filelock import FileLock
from toy_data import TASK, write_toy

from bitstack_nb import Protocol, Task, load_results, run, stack
from bitstack_nb.benchmark import all_strategies, sequence
from bitstack_nb.benchmark.inputs import load_inputs
from bitstack_nb.benchmark.training import MultiHead, predict
from bitstack_nb.data.backbones import collate, encode, load_backbone
from bitstack_nb.data.loading import load_task
from bitstack_nb.data.tasks import find_task
from bitstack_nb.head import labelled, place, present
from bitstack_nb.results.plain_json import from_text

# Small enough for seconds, large enough that every stage trains and locks something.
SMALL = Protocol(
    tasks=("imdb", "ag_news", "dbpedia"),
    train_size=64,
    test_size=56,
    max_length=24,
    epochs=1,
    batch_size=16,
    learning_rate=2e-3,
)
TWO = replace(SMALL, tasks=SMALL.tasks[:2])
MEAN = replace(SMALL, pooling="mean")
STRATEGIES = {
    "finetune": SMALL,
    "bitstack": SMALL.with_strategy("bitstack", budget="fresh"),
    "recall": replace(MEAN, head_learning_rate=1e-2).with_strategy("recall", sparsity=0.3),
    "joint": MEAN.with_strategy("joint"),
    "bitstack-strict": SMALL.with_strategy("bitstack-strict"),
    "random-mask": SMALL.with_strategy("random-mask", budget="fresh"),
    "magnitude-mask": SMALL.with_strategy("magnitude-mask"),
    "frozen": replace(SMALL, head_learning_rate=1e-2).with_strategy("frozen"),
    "ewc": MEAN.with_strategy("ewc", n_batches=2),
    "replay": SMALL.with_strategy("replay", replay_size=10),
    "lora": MEAN.with_strategy("lora", rank=2),
    "single": replace(SMALL, pooling="cls").with_strategy("single"),
    "shira": MEAN.with_strategy("shira", sparsity=0.05),
    "bitfit": SMALL.with_strategy("bitfit"),
    "bitdelta": SMALL.with_strategy("bitdelta"),
    "delta-rank8": SMALL.with_strategy("delta-rank8"),
    "probe": SMALL.with_strategy("probe"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(protocol, output=folder) for name, protocol in STRATEGIES.items()}


# A run and its result ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matrix_is_measured_where_it_can_be(results, strategy):
    rows = (2,) if strategy == "joint" else (0, 1, 2)
    matrix = results[strategy].matrix
    for trained in range(3):
        for task in range(3):
            measured = trained in rows and task <= trained
            assert (matrix[trained][task] is not None) == measured
    assert all(0 <= a <= 100 for row in matrix for a in row if a is not None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predictions_give_the_accuracies_of_the_matrix(results, strategy):
    result = results[strategy]
    test = load_inputs(STRATEGIES[strategy], torch.device("cpu")).test
    for at, own in enumerate(result.predictions):
        assert own["task"] == result.protocol["tasks"][at]["name"]
        labels = from_text(own["labels"])
        assert labels.tolist() == test[at]["labels"][:]
        for text, expected in (
            (own["learnt"], result.matrix[at][at]),
            (own["final"], result.matrix[-1][at]),
        ):
            assert (text and 100 * (from_text(text) == labels).mean()) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_time_of_a_step_is_that_of_training_over_its_steps(results, strategy):
    times = results[strategy].times
    if strategy == "probe":
        assert times["step"] == [None] * 3
        return
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


def test_tasks_of_exact_recall_have_own_weights_that_may_overlap(results):
    records, stats = results["recall"].locks, results["recall"].lock_stats
    own = [sum(r["selected"] for r in records if r["task"] == task) for task in (1, 2, 3)]
    assert own == [stats[0]["locked"]] * 3
    assert stats[0]["frozen_pct"] == pytest.approx(30, abs=0.1)
    assert stats[0]["locked"] < stats[1]["locked"] < stats[2]["locked"] < sum(own)


def test_where_the_first_task_was_forgotten(results):
    """The same number of examples is behind every accuracy; nothing drifts under its own model."""
    for name, result in results.items():
        drifts = all_strategies()[name].drifts
        assert bool(result.drift) == drifts, name
        assert {"norms", "attention", "MLP"} <= result.drift.keys() or not drifts
        assert all(0 <= group["accuracy"] <= 100 for group in result.drift.values())
    assert "locked" not in results["finetune"].drift
    locked = results["bitstack"].drift["locked"]["entries"]
    assert locked == results["bitstack"].lock_stats[-1]["locked"]


def test_a_run_records_what_its_tasks_take(results):
    """The other strategies: tests/benchmark/test_strategies.py."""
    stats = results["recall"].lock_stats[0]
    values, masks = 3 * 4 * stats["locked"], 3 * stats["eligible"] / 8
    stored = results["recall"].storage
    assert values < stored["bytes"] <= 1.01 * (values + masks)
    assert stored["bytes"] - stored["best_bytes"] == values / 2


def test_result_says_where_it_comes_from(results):
    result = results["bitstack"]
    assert Protocol.from_dict(result.protocol) == STRATEGIES["bitstack"]
    origin = result.provenance
    assert origin["packages"]["torch"] == torch.__version__
    assert origin["model"]["source"] == "package"
    assert {"imdb", "ag_news", "dbpedia"} == origin["data"].keys()
    assert all(data["synthetic"] for data in origin["data"].values())
    assert len(result.times["train"]) == len(result.times["update"]) == 3


@pytest.mark.parametrize("strategy", ["recall", "lora", "shira", "bitfit", "single", "probe"])
def test_a_model_per_task_forgets_nothing(results, tmp_path, monkeypatch, strategy):
    """Every task is predicted, row by row, as just after it was trained.

    So a run tests it only then, and has the same matrix.
    """
    logits = []  # of tasks 1; 1, 2; 1, 2, 3

    def watched(model, *args, **kwargs):
        own = []
        handle = model.register_forward_hook(lambda *io: own.append(io[2].logits.clone()))
        logits.append(own)
        try:
            return predict(model, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(sequence, "predict", watched)
    with monkeypatch.context() as patch:
        patch.setattr(sequence.TaskSequence, "_tested", lambda _, stage: range(stage[-1] + 1))
        result = run(STRATEGIES[strategy], output=tmp_path / "all")
    assert len(logits) == 6
    run(STRATEGIES[strategy], output=tmp_path / "own")
    assert len(logits) == 6 + 3
    assert result.matrix == results[strategy].matrix
    for first, *later in ((0, 1, 3), (2, 4)):
        for again in later:
            assert all(map(torch.equal, logits[first], logits[again]))
    for task in range(3):
        assert len({row[task] for row in result.matrix[task:]}) == 1
    assert result.metrics["forgetting"] == result.metrics["forgetting_chaudhry"] == 0
    assert result.metrics["average_accuracy"] == result.metrics["learning_accuracy"]


def test_finished_runs_are_not_repeated(tmp_path):
    protocol = replace(SMALL, tasks=SMALL.tasks[:1], train_size=16)
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    expected = torch.rand(1), numpy.random.rand(), random.random()
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    first = run(protocol, output=tmp_path)
    assert (torch.rand(1), numpy.random.rand(), random.random()) == expected
    path = tmp_path / f"{protocol.name}.json"
    written = path.stat().st_mtime_ns
    assert run(protocol, output=tmp_path) == first == load_results(tmp_path)[0]
    assert path.stat().st_mtime_ns == written
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_second_process_waits_and_takes_the_firsts_result(tmp_path, monkeypatch, caplog):
    protocol = replace(SMALL, tasks=SMALL.tasks[:1], train_size=16)
    first = run(protocol, output=tmp_path / "first")
    monkeypatch.setattr(sequence, "train", lambda *_, **__: pytest.fail("trained again"))
    second = []
    with FileLock(tmp_path / f"{protocol.name}.lock"):
        waiting = threading.Thread(target=lambda: second.append(run(protocol, output=tmp_path)))
        waiting.start()
        while "waiting" not in caplog.text:
            assert waiting.is_alive()
            time.sleep(0.01)
        first.save(tmp_path / f"{protocol.name}.json")
    waiting.join()
    assert second == [first]
    assert {file.name for file in tmp_path.iterdir()} == {"first", f"{protocol.name}.json"}


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, "gpu", "device is 'gpu'.*auto, cpu or cuda"),
        ({}, "cuda", "no GPU"),
        (
            {"tasks": (Task(name="o", dataset="me/o", text=("t",), label="l", num_labels=2),)},
            "auto",
            r"no embedded data for 'me/o'.*FOLDER",
        ),
    ],
)
def test_what_cannot_be_run_says_what_to_do(tmp_path, changes, device, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        run(replace(SMALL, **changes), output=tmp_path, device=device)
    assert not list(tmp_path.iterdir())


def test_several_ranks_are_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2.*without torchrun.*sweep") as caught:
        run(SMALL, output=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "distilbert", "bert with hidden states"])
def test_own_tasks_from_a_folder_on_any_classifier(tmp_path, folders, architecture, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_toy(tmp_path / "data")
    two = replace(TASK, name="two", num_labels=2, relabel=(0, 1, 1))
    model = folders[architecture.split()[0]]
    if "hidden states" in architecture:  # its forward gives more than logits
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


# Resuming ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


def stop_in_stage(number, protocol, folder, monkeypatch):
    real = sequence.TaskSequence.lock

    def die(self, stage, *args):
        if stage == number - 1:
            raise Killed
        return real(self, stage, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sequence.TaskSequence, "lock", die)
        run(protocol, output=folder)
    return folder / f"{protocol.name}.state"


SAVING = ["bitstack", "random-mask", "recall", "ewc", "lora", "shira", "single", "bitfit", "probe"]
SAVING += ["bitdelta", "delta-rank8"]


@pytest.mark.parametrize("strategy", SAVING)
def test_what_each_strategy_saves_is_enough_to_go_on(results, tmp_path, monkeypatch, strategy):
    """Dead in the third stage; tests/benchmark/test_killed.py kills anywhere."""
    protocol = STRATEGIES[strategy]
    stop_in_stage(3, protocol, tmp_path, monkeypatch)
    assert not list(tmp_path.glob("*.json"))
    torch.manual_seed(12345)  # the new process starts from another state
    resumed = run(protocol, output=tmp_path)
    for part in ("matrix", "predictions", "locks", "importance", "drift", "storage"):
        assert getattr(resumed, part) == getattr(results[strategy], part), part
    assert [item.name for item in tmp_path.iterdir()] == [f"{protocol.name}.json"]


def test_a_mask_of_exactly_the_size_of_bitstacks(tmp_path, monkeypatch):
    method = run(TWO.with_strategy("bitstack"), output=tmp_path)
    protocol = TWO.with_strategy("random-mask", locks_of=str(tmp_path))
    stop_in_stage(2, protocol, tmp_path, monkeypatch)
    result = run(protocol, output=tmp_path)
    locked = [[s["locked"] for s in each.lock_stats] for each in (method, result)]
    assert locked[0] == locked[1] and 0 < locked[0][0] < locked[0][1]
    with pytest.raises(ValueError, match=r"no runs of bitstack.*seed 1.*run bitstack first"):
        run(replace(protocol, seed=1), output=tmp_path)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", ["numbers.json", "masks.safetensors", "a missing file"])
def test_behind_a_damaged_stage_the_one_before_is_taken(results, tmp_path, monkeypatch, damage):
    """On a synced drive the newest files may not have arrived whole."""
    state = stop_in_stage(3, STRATEGIES["bitstack"], tmp_path, monkeypatch)
    assert sorted(folder.name for folder in state.iterdir()) == ["stage-1", "stage-2"]
    if damage == "a missing file":
        (state / "stage-2" / "head-0.safetensors").unlink()
    else:
        cut(state / "stage-2" / damage)
    resumed = run(STRATEGIES["bitstack"], output=tmp_path)
    assert resumed.matrix == results["bitstack"].matrix
    assert resumed.locks == results["bitstack"].locks
    assert not state.exists()


def test_a_state_that_cannot_be_resumed_says_what_to_delete(tmp_path, monkeypatch):
    state = stop_in_stage(2, TWO, tmp_path, monkeypatch)
    numbers = json.loads((state / "stage-1" / "numbers.json").read_text())
    numbers["origin"]["data"]["imdb"]["sample"]["train"] = "0" * 64
    (state / "stage-1" / "numbers.json").write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match=f"another data.*delete {state}"):
        run(TWO, output=tmp_path)
    cut(state / "stage-1" / "model.safetensors")
    with pytest.raises(ValueError, match=f"damaged.*delete {state}") as caught:
        run(TWO, output=tmp_path)
    assert "\n" not in str(caught.value)


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["finetune", "replay"])
def test_a_new_head_is_fitted_on_its_own_task_before_training(tmp_path, monkeypatch, strategy):
    """Replay mixes other tasks' rows into training, but not into this."""
    seen, real = [], sequence.fit_head

    def watched(model, batches, *, steps):
        seen.append((steps, max(int(label) for batch in batches for label in batch["labels"])))
        return real(model, batches, steps=steps)

    monkeypatch.setattr(sequence, "fit_head", watched)
    run(
        replace(TWO, tasks=("imdb", "dbpedia")).with_strategy(strategy, head_steps=8),
        output=tmp_path,
    )
    assert seen == [(8, 1), (8, 13)]


def test_a_mixed_batch_is_scored_by_each_rows_own_head():
    backbone = load_backbone("tiny-gpt2", max_length=24, seed=0)
    model, pattern = backbone.model.eval(), present(backbone.model, ["score"])
    heads, rows = [], []
    for index, name in enumerate(("imdb", "ag_news", "dbpedia")):
        task = find_task(name)
        labels = [str(label) for label in range(task.num_labels)]
        heads.append(labelled(model, pattern, labels, seed=name))
        data = load_task(task, "embedded", train_size=index + 1, test_size=1, seed=0).train
        rows += [{**row, "task": index} for row in encode(data, backbone)]
    make_batch = collate(backbone)
    joint = MultiHead(model, heads)
    mixed = joint(**make_batch(rows))["loss"]
    singles = []
    for row in rows:
        batch = make_batch([row])
        place(model, heads[int(batch.pop("task"))])
        singles.append(model(**batch).loss)
    assert mixed.item() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-5)
    mixed.backward()
    own = [p for head in heads for _, p in head.named_parameters()]
    assert all(p.grad.any() for p in own)
    assert {id(p) for p in own} < {id(p) for p in joint.parameters()}


def test_half_precision_is_on_in_every_stage_and_evaluation(tmp_path, monkeypatch):
    """accelerate's mark on the model once kept the second Trainer from autocast."""
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
    monkeypatch.setattr(sequence, "predict", watched("evaluate", sequence.predict))
    monkeypatch.setattr(stack, "measure", watched("update", stack.measure))
    run(replace(TWO.with_strategy("bitstack"), train_size=16, precision="bf16"), output=tmp_path)
    assert {name: set(seen) for name, seen in dtypes.items()} == {
        "train": {torch.bfloat16},
        "evaluate": {torch.bfloat16},
        "update": {torch.float32},
    }


@pytest.mark.parametrize("strategy", ["bitstack", "recall", "joint", "replay", "lora"])
def test_the_heads_have_a_rate_of_their_own(tmp_path, monkeypatch, strategy):
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
            if strategy != "recall":  # there the backbone's gradients go to the own weights
                assert {id(p) for p in model.parameters() if p.requires_grad} <= set(stepped)
            assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}
            seen.append((rates[True].pop(), rates[False].pop()))
            assert rates == {True: set(), False: set()}

    real = sequence.train

    def watched(*args, callbacks, **kwargs):
        return real(*args, callbacks=[*callbacks, Rates()], **kwargs)

    monkeypatch.setattr(sequence, "train", watched)
    rates = {"learning_rate": 2e-3, "head_learning_rate": 2e-2}
    run(TWO.with_strategy(strategy, **rates, warmup_steps=2), output=tmp_path)
    assert max(backbone for backbone, _ in seen) == pytest.approx(2e-3)
    assert all(head == pytest.approx(10 * backbone) for backbone, head in seen)


def test_replay_mixes_in_training_rows_of_earlier_tasks(tmp_path, monkeypatch):
    """Each row of an earlier task is one of its training rows, and goes to its own head."""
    protocol = TWO.with_strategy("replay", replay_size=10)
    inputs = load_inputs(protocol, torch.device("cpu"))
    seen = []

    def watched(model, data, *args, **kwargs):
        seen.append((type(model), data.to_list()))
        return 1

    monkeypatch.setattr(sequence, "train", watched)
    run(protocol, output=tmp_path)
    (_, first), (module, second) = seen
    assert first == inputs.train[0].to_list() and module is MultiHead
    earlier = [row for row in second if row.pop("task") == 0]
    assert len(earlier) == 10 and all(row in first for row in earlier)
    assert second[: len(inputs.train[1])] == inputs.train[1].to_list()
