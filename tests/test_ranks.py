"""Data parallel: importance summed over ranks, the same locks on all, errors instead of waiting."""

import os
import tempfile
import unittest
from itertools import product
from unittest.mock import patch

import tiny
import torch
import torch.distributed as dist
from cases import ADAMW, backbone
from processes import in_processes
from torch.nn.parallel import DistributedDataParallel

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.importance import IMPORTANCE
from bitstack_nb.ranks import RankError

BATCHES = 5  # an odd number: ranks have different numbers of them


class OverShards(unittest.TestCase):
    """Each rank has batches of its own; together those of one process."""

    @classmethod
    def setUpClass(cls):
        cls.ranks = in_processes(over_shards)

    def test_scores_and_masks(self):
        for setting, expected in protected(shared=False).items():
            with self.subTest(setting):
                found, other = (rank["protected"][setting] for rank in self.ranks)
                for name, scores in expected["scores"].items():
                    summed = found["scores"][name]
                    self.assertTrue(torch.equal(summed, other["scores"][name]), name)
                    # What importance.measure promises for n batches.
                    error = (summed - scores).abs()
                    self.assertTrue((error <= BATCHES * 2**-23 * scores).all(), name)
                    for task, masks in enumerate(found["masks"]):
                        self.assertTrue(torch.equal(masks[name], other["masks"][task][name]))
                # In these small models no score is that near to a threshold.
                self.assert_same_masks(found["masks"], expected["masks"])

    def test_a_batch_each_is_exactly_two_batches_of_one_process(self):
        """Two summands are added in one way only."""
        expected = BitStack(tiny.plain()).measure(tiny.batches(2, seed=0))
        for rank in self.ranks:
            for name, scores in expected.items():
                self.assertTrue(torch.equal(rank["a batch each"][name], scores), name)

    def test_the_same_batches_on_every_rank(self):
        """A loader that nobody sharded: exactly the masks of one process."""
        expected = BitStack(tiny.plain()).measure(tiny.batches(BATCHES, seed=0))
        for rank in self.ranks:
            for name, scores in expected.items():
                self.assertTrue(torch.equal(rank["the same batches"][name], 2 * scores), name)

    def assert_same_masks(self, found, expected):
        for own, others in zip(found, expected, strict=True):
            for name, mask in others.items():
                self.assertTrue(torch.equal(own[name], mask), name)


def over_shards() -> dict:
    return {
        "protected": protected(shared=True),
        "a batch each": BitStack(tiny.plain()).measure(shard(tiny.batches(2, seed=0))),
        "the same batches": BitStack(tiny.plain()).measure(tiny.batches(BATCHES, seed=0)),
    }


def protected(*, shared: bool) -> dict:
    """Two tasks locked by every importance and budget, alone or in a shard: scores, masks."""
    found = {}
    for importance, budget in product(IMPORTANCE, ("union", "fresh")):
        stack = BitStack(tiny.plain(), 0.3, importance=importance, budget=budget)
        masks = []
        for task in range(2):
            batches = tiny.batches(BATCHES, seed=task)
            batches = shard(batches) if shared else batches
            scores = stack.measure(batches)
            stack.update(batches)
            masks.append(dict(stack.masks))
        found[importance, budget] = {"scores": scores, "masks": masks}
    return found


def shard(batches: list) -> list:
    """This rank's share, as accelerate deals them out."""
    return batches[dist.get_rank() :: dist.get_world_size()]


class Recalled(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.ranks = in_processes(recalled_twice)

    def test_tasks_are_chosen_alike_and_come_back(self):
        """Heads start apart and end equal; entries are the same; recall is exact on every rank."""
        one, other = (sharded for sharded, _ in self.ranks)
        for task in range(2):
            for what in ("head", "masks", "after", "recalled"):
                self.assert_bits(one[task][what], other[task][what])
            self.assert_bits(one[task]["recalled"], one[task]["after"])
            self.assertGreater(sum(int(m.sum()) for m in one[task]["masks"].values()), 0)

    def test_the_same_batches_give_what_one_process_gets(self):
        alone, _ = recalled(lambda batches: batches)
        for _, (first, _) in self.ranks:
            for what in ("head", "masks", "after"):
                self.assert_bits(first[what], alone[what])

    def assert_bits(self, found, expected):
        self.assertEqual(list(found), list(expected))
        for name, value in expected.items():
            self.assertTrue(torch.equal(tiny.as_bits(found[name]), tiny.as_bits(value)), name)


def recalled_twice() -> tuple[list[dict], list[dict]]:
    """From shards, and from the same batches on every rank."""
    return recalled(shard), recalled(lambda batches: batches)


def recalled(own) -> list[dict]:
    """Two tasks of exact recall on a rank's own batches: head, masks and weights of each."""
    model, shared = tiny.plain(), dist.is_initialized()
    recall = ExactRecall(model, 0.3, importance="gradient")
    tasks = []
    for task in range(2):
        model.classifier = head(seed=10 * task + (dist.get_rank() if shared else 0))
        batches = own(tiny.batches(BATCHES, seed=task))
        recall.begin(str(task), loader=batches)
        fitted = {n: v.clone() for n, v in model.classifier.state_dict().items()}
        trained = DistributedDataParallel(model) if shared else model
        # DDP waits for every rank at every step, so each takes as many.
        tiny.train(trained, ADAMW(recall.parameters()), batches[:2], seed=task)
        recall.close()
        masks = dict(recall.mask(str(task)))
        tasks.append({"head": fitted, "masks": masks, "after": tiny.snapshot(model)})
    for number, task in enumerate(tasks):
        with recall.using(str(number)):
            task["recalled"] = tiny.snapshot(model)
    return tasks


def head(*, seed):
    return tiny.seeded(lambda: torch.nn.Linear(tiny.WIDTH, tiny.CLASSES), seed)


class WithTrainer(unittest.TestCase):
    def test_nothing_of_the_users_code_changes(self):
        """The README's loop, each rank on its share: equal weights and locks, exact locked bits."""
        one, other = in_processes(trained)
        for what in ("masks", "locked", "after", "owned", "recalled"):
            self.assertEqual(list(one[what]), list(other[what]))
            for name, value in one[what].items():
                self.assertTrue(torch.equal(value, other[what][name]), f"{what} {name}")
        moved = 0
        for name, mask in one["masks"].items():
            before, after = one["locked"][name], one["after"][name]
            self.assertTrue(torch.equal(before[mask], after[mask]), name)
            moved += int((before != after)[~mask].sum())
        self.assertGreater(moved, 1000)
        for rank in (one, other):
            self.assertEqual(rank["recalled again"], [])
            self.assertEqual(len(rank["rows"]), 24)
        self.assertTrue(one["rows"].isdisjoint(other["rows"]))


def trained() -> dict:
    """Two tasks under the Trainer in either mode, the loaders those that accelerate has shared."""
    model, found = tiny.gpt2(), {}
    stack = BitStack(model, 0.3)
    loader = train_with_trainer(model, stack, seed=0)
    found["rows"] = {tuple(row.tolist()) for batch in loader for row in batch["input_ids"]}
    stack.update(loader)
    found["masks"], found["locked"] = dict(stack.masks), tiny.snapshot(model)
    model.score = torch.nn.Linear(16, tiny.CLASSES, bias=False)  # drawn apart on each rank
    stack.update(train_with_trainer(model, stack, seed=1))
    stack.verify()
    found["after"] = tiny.snapshot(model)
    stack.detach()  # exact recall is alone on its model
    stack = ExactRecall(model, 0.3, importance="gradient")
    stack.begin("a", loader=loader)
    train_with_trainer(model, stack, seed=2)
    stack.close()
    found["owned"], found["recalled"] = dict(stack.mask("a")), backbone(model)
    stack.begin("b", loader=loader)
    train_with_trainer(model, stack, seed=3)
    stack.close()
    with stack.using("a"):
        again = backbone(model)
    found["recalled again"] = [n for n in again if not torch.equal(again[n], found["recalled"][n])]
    return found


def train_with_trainer(model, stack, *, seed):
    """An epoch over 48 rows; returns the loader of this rank's share of them."""
    from transformers import Trainer, TrainingArguments

    (batch,) = tiny.batches(1, seed=seed, size=48)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=1e-2,
            weight_decay=0.1,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        data = [{key: value[row] for key, value in batch.items()} for row in range(48)]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[stack.callback()])
        trainer.train()
    return trainer.get_train_dataloader()


class NotTogether(unittest.TestCase):
    def test_ranks_that_cannot_go_on_together_say_so(self):
        """Every rank gets an error at once, nothing is locked, and the next call works."""
        for rank, found in enumerate(in_processes(failures)):
            for case, (expected, error, locked) in found.items():
                with self.subTest(case, rank=rank):
                    self.assertRegex(error, expected)
                    self.assertEqual(locked, 0)

    def test_processes_that_nothing_connects(self):
        """Each would lock entries of its own, and nobody would notice."""
        stack = BitStack(tiny.plain())
        launched = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}
        with patch.dict(os.environ, launched), self.assertRaisesRegex(RankError, "2 processes"):
            stack.update(tiny.batches(1, seed=0))
        stack.update(tiny.batches(1, seed=0))


def failures() -> dict[str, tuple[str, str, int]]:
    """By case: what the error should say on this rank, what it said, and how much was locked."""
    odd = dist.get_rank() == 1
    good = tiny.batches(2, seed=0)
    no_labels = [{"input_ids": batch["input_ids"]} for batch in good] if odd else good
    empty = [] if odd else good
    own = "ValueError: " if odd else "RankError: rank 1 failed: ValueError: "
    long = tiny.plain(depth=3 if odd else 2)
    moved, wide, embedding = tiny.plain(), tiny.plain(), tiny.plain()
    if odd:
        wide.classifier = torch.nn.Linear(tiny.WIDTH, 5)
        with torch.no_grad():
            moved.blocks[1].up.bias[0] += 1
            embedding.embed.weight[0, 0] += 1
    protect = {
        "another model": (BitStack(long), good, r"rank 1 has other parameters.*blocks\.2\.mix"),
        "other weights": (BitStack(moved), good, r"rank 1 has other parameters.*blocks\.1\.up\.b"),
        "another importance": (
            BitStack(tiny.plain(), importance="fisher" if odd else "gradient"),
            good,
            "rank 1 has other settings.*importance",
        ),
        "another sparsity": (BitStack(tiny.plain(), 0.3 if odd else 0.2), good, "other masks"),
        "a batch without labels": (BitStack(tiny.plain()), no_labels, f"{own}.*no 'labels'"),
        "no batch": (BitStack(tiny.plain()), empty, f"{own}the loader gave no batch"),
    }
    recall = {
        "a head of more labels": (wide, good, "rank 1 has other heads"),
        "another base": (embedding, good, r"rank 1 has other weights of the base.*embed\.weight"),
        "fitting without labels": (tiny.plain(), [*good, *no_labels], f"{own}.*no 'labels'"),
        "no batch to fit on": (tiny.plain(), empty, f"{own}the loader gave no batch"),
    }
    found = {}
    for case, (stack, batches, expected) in protect.items():
        found[case] = (expected, said(stack.update, batches), stack.stats()["locked"])
    for case, (model, batches, expected) in recall.items():
        stack = ExactRecall(model, 0.3, importance="gradient")
        found[case] = (
            expected,
            said(lambda t=stack, b=batches: t.begin("a", loader=b)),
            stack.stats()["locked"],
        )
    BitStack(tiny.plain()).update(good)
    return found


def said(call, *arguments) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Shards(unittest.TestCase):
    def test_are_refused_by_name(self):
        for case, (expected, error) in in_processes(sharded, count=1)[0].items():
            with self.subTest(case):
                self.assertRegex(error, expected)

    def test_zero_placeholders(self):
        """What DeepSpeed ZeRO 3 leaves in the place of a parameter."""
        model = tiny.plain()
        stack = BitStack(model)
        weight = model.blocks[0].up.weight
        weight.data, weight.ds_id = torch.empty(0), 1
        self.assertRegex(said(BitStack, model), "ValueError: .*DeepSpeed ZeRO")
        self.assertRegex(said(stack.verify), "ValueError: .*DeepSpeed ZeRO")

    def test_zero_optimizer_steps_flat_shards(self):
        """ZeRO 1 and 2 keep the model's parameters and step copies of them."""
        model = tiny.plain()
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = torch.optim.SGD([torch.nn.Parameter(flat)], lr=0.1)
        self.assertRegex(said(BitStack(model).attach, optimizer), "DeepSpeed ZeRO.*not supported")


def sharded() -> dict[str, tuple[str, str]]:
    """By case: what the error should say, and what it said; sharded before and after the stack."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    two, one = "ValueError: .*FSDP2 .fully_shard", "ValueError: .*FSDP1 "
    model = tiny.Body(None)
    stack = BitStack(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    found = {
        "FSDP2": (two, said(BitStack, model)),
        "FSDP2 after the stack, attached": (two, said(stack.attach, ADAMW(model.parameters()))),
        "FSDP2 after the stack, updated": (two, said(stack.update, tiny.batches(1, seed=0))),
    }
    # Without a GPU torch makes none of these; what counts is that it is one.
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = tiny.plain()
    found["FSDP1"] = (one, said(BitStack, wrapped))
    found["FSDP1 within"] = (one, said(BitStack, torch.nn.Sequential(wrapped)))
    return found


if __name__ == "__main__":
    unittest.main()
