"""The benchmark under torchrun: shared batches, one result, the same matrix, resuming together."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import tiny
import torch
import torch.distributed as dist
from datasets import Dataset
from processes import in_processes
from transformers import TrainerCallback

from bitstack_nb import Protocol, load_results, run
from bitstack_nb.benchmark import sequence, training

SMALL = Protocol(
    tasks=("imdb", "ag_news"), train_size=32, test_size=28, max_length=16, epochs=1, batch_size=8
)
BITSTACK = SMALL.with_strategy("bitstack", sparsity=0.2, n_batches=4)


def test_the_command_under_torchrun(tmp_path):
    """One file and one table, of rank 0; a second time the result is read."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "bitstack_nb", "run", "--tasks", "imdb,ag_news"]
    command += ["--train-size", "32", "--test-size", "28", "--max-length", "16"]
    command += ["--strategy", "bitstack", "--output", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in ("run", "read"):
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=500
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| bitstack ") == 1
        (file,) = tmp_path.iterdir()  # and no state
        assert done.stdout.count(str(file)) == 1
    (result,) = load_results(file)
    assert result.provenance["processes"] == 2
    assert result.lock_stats[1]["locked"] > result.lock_stats[0]["locked"] > 0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(benchmarked, tmp_path_factory.mktemp("ranks"))


def benchmarked(folder) -> dict:
    """Results of a few runs, alike on every rank where nothing else is said."""
    protocols = {
        "bitstack": BITSTACK,
        "joint": SMALL.with_strategy("joint"),
        "recall": SMALL.with_strategy("recall", sparsity=0.3, n_batches=4),
    }
    found = {name: run(p, output=folder / "unbroken") for name, p in protocols.items()}
    found["resumed"] = resumed(folder / "broken")
    found["finished for one"] = finished_for_one(folder)
    with patch.object(training, "half_precision", lambda device: "bf16"):
        found["half"] = run(replace(BITSTACK, train_size=16), output=folder / "half")
    odd = dist.get_rank() == 1
    found["uneven"] = error_of(replace(SMALL, batch_size=5), folder / "uneven")
    found["apart"] = error_of(replace(SMALL, seed=int(odd)), folder / "apart")
    (folder / "file").touch()
    found["unwritable"] = error_of(replace(SMALL, tasks=("imdb",)), folder / "file")
    found["rows"] = rows_of_two_epochs()
    found["gradient"] = gradient_of_a_step()
    return found


class Killed(BaseException):
    """Stands for the end of the process."""


def resumed(folder):
    """A run that is broken off in its second stage, and then goes on."""

    def dying(*args, seed, **kwargs):
        if seed == 1:
            raise Killed
        return training.train(*args, seed=seed, **kwargs)

    with patch.object(sequence, "train", dying), pytest.raises(Killed):
        run(BITSTACK, output=folder)
    return run(BITSTACK, output=folder)


def finished_for_one(folder):
    """A run that rank 1 alone finds finished, as where a shared folder lags behind."""
    own = folder / f"rank-{dist.get_rank()}"
    if dist.get_rank() == 1:
        own.mkdir()
        shutil.copy(folder / "unbroken" / f"{BITSTACK.name}.json", own)
    return run(BITSTACK, output=own)


def error_of(protocol, output) -> str:
    try:
        run(protocol, output=output)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def rows_of_two_epochs() -> list[int]:
    """The rows that this rank trains on in two epochs, as ids, in order."""
    lengths = [4 + row % 7 for row in range(64)]
    data = Dataset.from_dict({"id": range(64), "length": lengths})
    seen = []

    def collate(rows):
        seen.extend(row["id"] for row in rows)
        longest = max(row["length"] for row in rows)
        ids = torch.ones(len(rows), longest, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids, "labels": ids[:, 0]}

    protocol, device = replace(SMALL, epochs=2), torch.device("cpu")
    training.train(tiny.gpt2(), data, collate, protocol=protocol, seed=0, device=device)
    return seen


class GradientNorm(TrainerCallback):
    """The norm of the gradient that the optimizer sees, after clipping."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        self.norm = float(sum(squares)) ** 0.5


def gradient_of_a_step() -> float:
    """The norm in a step on eight rows, by however many ranks; less than what clipping is from."""
    ids = torch.randint(1, 12, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"input_ids": ids, "length": [6] * 8, "labels": [0, 1] * 4}
    data = Dataset.from_dict(rows)

    def collate(rows):
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    model, seen = tiny.gpt2().requires_grad_(False), GradientNorm()
    model.transformer.h[0].attn.c_proj.weight.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    how = {"protocol": SMALL, "seed": 0, "device": torch.device("cpu")}
    training.train(model, data, collate, callbacks=[seen], **how)
    return seen.norm


ALIKE = ["bitstack", "joint", "recall", "resumed", "finished for one", "half"]


@pytest.mark.parametrize("run_of", ALIKE)
def test_every_rank_ends_with_the_same(ranks, run_of):
    one, other = (rank[run_of] for rank in ranks)
    assert one.matrix == other.matrix
    assert (one.lock_stats, one.locks) == (other.lock_stats, other.locks)
    assert one.importance == other.importance


def test_it_resumes_like_an_unbroken_run(ranks):
    assert ranks[0]["resumed"].matrix == ranks[0]["bitstack"].matrix
    assert ranks[0]["resumed"].locks == ranks[0]["bitstack"].locks


def test_recall_is_exact(ranks):
    assert ranks[0]["recall"].metrics["forgetting"] == 0


def test_every_row_once_an_epoch(ranks):
    """Dropout sets the ranks' generators apart; the order of an epoch must not depend on it."""
    for start in (0, 32):
        epoch = [row for rank in ranks for row in rank["rows"][start : start + 32]]
        assert sorted(epoch) == list(range(64))


def test_two_ranks_step_by_the_gradient_of_one(ranks):
    """Before, the Trainer multiplied the loss by the number of ranks, and clipped that."""
    alone = gradient_of_a_step()
    assert 0 < alone < 0.5
    assert [rank["gradient"] for rank in ranks] == pytest.approx([alone, alone], rel=1e-4)


def test_what_cannot_be_shared_is_said_on_every_rank(ranks):
    for rank in ranks:
        assert "batch_size is 5, which 2 processes cannot share" in rank["uneven"]
        assert "RankError: rank 1 has other stages done than rank 0" in rank["apart"]
    assert "OSError" in ranks[0]["unwritable"]
    assert "RankError: rank 0 failed" in ranks[1]["unwritable"]
