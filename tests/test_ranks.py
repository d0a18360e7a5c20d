"""Data parallel: importance summed over ranks, the same locks on all, errors instead of waiting."""

import os
import tempfile
import unittest
from itertools import product
from unittest.mock import patch

import tiny
import torch
import torch.distributed as dist
from cases import ADAMW, trainer_of
from processes import in_processes
from torch.nn.parallel import DistributedDataParallel

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.importance import IMPORTANCE
from bitstack_nb.ranks import RankError

BATCHES = 5  # an odd number: ranks have different numbers of them


class Together(unittest.TestCase):
    """Two connected processes do everything once; each test looks at what both found."""

    @classmethod
    def setUpClass(cls):
        cls.ranks = in_processes(everything)

    def found(self, what: str) -> list:
        return [rank[what] for rank in self.ranks]

    def assert_bits(self, found, expected):
        self.assertEqual(list(found), list(expected))
        for name, value in expected.items():
            self.assertTrue(torch.equal(tiny.as_bits(found[name]), tiny.as_bits(value)), name)

    def test_scores_and_masks(self):
        """Equal on all ranks; one process differs by rounding in its scores, not in its masks."""
        one, other = self.found("protected")
        for setting, expected in protected(list).items():
            with self.subTest(setting):
                self.assert_bits(one[setting]["scores"], other[setting]["scores"])
                for name, scores in expected["scores"].items():
                    error = (one[setting]["scores"][name] - scores).abs()
                    # The bound that importance.measure promises for n batches.
                    self.assertTrue((error <= BATCHES * 2**-23 * scores).all(), name)
                for task, masks in enumerate(expected["masks"]):
                    for found in (one, other):  # no score here is that near to a threshold
                        self.assert_bits(found[setting]["masks"][task], masks)

    def test_sums_that_do_not_round(self):
        """A batch each (two summands), and the same batches on both (a doubling)."""
        two = BitStack(tiny.plain()).measure(tiny.batches(2, seed=0))
        same = BitStack(tiny.plain()).measure(tiny.batches(BATCHES, seed=0))
        for rank in self.ranks:
            self.assert_bits(rank["a batch each"], two)
            self.assert_bits(rank["the same"], {name: 2 * s for name, s in same.items()})

    def test_exact_recall(self):
        """Heads start apart and end equal; own weights are the same; recall is exact."""
        one, other = self.found("recalled")
        for task, others in zip(one, other, strict=True):
            for what in ("head", "masks", "after", "recalled"):
                self.assert_bits(task[what], others[what])
            self.assert_bits(task["recalled"], task["after"])
            self.assertGreater(sum(int(mask.sum()) for mask in task["masks"].values()), 0)
        alone = recalled(list)[0]
        for first, _ in self.found("recalled the same"):
            for what in ("head", "masks", "after"):
                self.assert_bits(first[what], alone[what])

    def test_with_the_trainer_nothing_of_the_users_code_changes(self):
        """Each rank trains on its share: equal weights and locks, exact locked bits."""
        one, other = self.found("trained")
        for what in ("masks", "locked", "after", "owned", "recalled"):
            self.assert_bits(one[what], other[what])
        self.assert_bits(one["recalled again"], one["recalled"])
        moved = 0
        for name, mask in one["masks"].items():
            before, after = one["locked"][name], one["after"][name]
            self.assertTrue(torch.equal(before[mask], after[mask]), name)
            moved += int((before != after)[~mask].sum())
        self.assertGreater(moved, 1000)
        self.assertEqual((len(one["rows"]), len(other["rows"])), (24, 24))
        self.assertTrue(one["rows"].isdisjoint(other["rows"]))

    def test_ranks_that_cannot_go_on_together_say_so(self):
        """Every rank gets an error at once, nothing is locked, and the next call works."""
        for rank, found in enumerate(self.found("failures")):
            for case, (expected, error, locked) in found.items():
                with self.subTest(case, rank=rank):
                    self.assertRegex(error, expected)
                    self.assertEqual(locked, 0)

    def test_shards_are_refused_by_name(self):
        for found in self.found("sharded"):
            for case, (expected, error) in found.items():
                with self.subTest(case):
                    self.assertRegex(error, expected)


class Alone(unittest.TestCase):
    def test_processes_that_nothing_connects(self):
        """Each would lock weights of its own, and nobody would notice."""
        stack = BitStack(tiny.plain())
        launched = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}
        with patch.dict(os.environ, launched), self.assertRaisesRegex(RankError, "2 processes"):
            stack.update(tiny.batches(1, seed=0))
        stack.update(tiny.batches(1, seed=0))

    def test_zero(self):
        """DeepSpeed ZeRO 1 and 2 step flat copies; ZeRO 3 leaves placeholders for parameters."""
        model = tiny.plain()
        stack = BitStack(model)
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = torch.optim.SGD([torch.nn.Parameter(flat)], lr=0.1)
        self.assertRegex(said(stack.attach, optimizer), "DeepSpeed ZeRO.*not supported")
        weight = model.blocks[0].up.weight
        weight.data, weight.ds_id = torch.empty(0), 1
        self.assertRegex(said(BitStack, model), "ValueError: .*DeepSpeed ZeRO")
        self.assertRegex(said(stack.verify), "ValueError: .*DeepSpeed ZeRO")


# In each process ----------------------------------------------------------------------------------


def everything() -> dict:
    return {
        "protected": protected(shard),
        "a batch each": BitStack(tiny.plain()).measure(shard(tiny.batches(2, seed=0))),
        "the same": BitStack(tiny.plain()).measure(tiny.batches(BATCHES, seed=0)),
        "recalled": recalled(shard),
        "recalled the same": recalled(list),
        "trained": trained(),
        "failures": failures(),
        "sharded": sharded(),
    }


def shard(batches: list) -> list:
    """This rank's share, as accelerate deals them out."""
    return batches[dist.get_rank() :: dist.get_world_size()]


def protected(share) -> dict:
    """Two tasks locked by every importance and budget: scores of the last, masks of both."""
    found = {}
    for importance, budget in product(IMPORTANCE, ("union", "fresh")):
        stack = BitStack(tiny.plain(), 0.3, importance=importance, budget=budget)
        masks = []
        for task in range(2):
            batches = share(tiny.batches(BATCHES, seed=task))
            scores = stack.measure(batches)
            stack.update(batches)
            masks.append(dict(stack.masks))
        found[importance, budget] = {"scores": scores, "masks": masks}
    return found


def recalled(share) -> list[dict]:
    """Two tasks of exact recall: head, masks and weights of each, and the model recalled."""
    model, connected = tiny.plain(), dist.is_initialized()
    recall = ExactRecall(model, 0.3, importance="gradient")
    tasks = []
    for task in range(2):
        seed = 10 * task + (dist.get_rank() if connected else 0)
        model.classifier = tiny.seeded(lambda: torch.nn.Linear(tiny.WIDTH, tiny.CLASSES), seed)
        batches = share(tiny.batches(BATCHES, seed=task))
        recall.begin(str(task), loader=batches)
        fitted = {n: v.clone() for n, v in model.classifier.state_dict().items()}
        wrapped = DistributedDataParallel(model) if connected else model
        # DDP waits for every rank at every step, so each takes as many.
        tiny.train(wrapped, ADAMW(recall.parameters()), batches[:2], seed=task)
        recall.close()
        masks = dict(recall.mask(str(task)))
        tasks.append({"head": fitted, "masks": masks, "after": tiny.snapshot(model)})
    for number, task in enumerate(tasks):
        with recall.using(str(number)):
            task["recalled"] = tiny.snapshot(model)
    return tasks


def trained() -> dict:
    """Two tasks of each method under the Trainer, with the loaders that accelerate has shared."""
    model, found = tiny.gpt2(), {}
    stack = BitStack(model, 0.3)
    loader = train(model, stack, seed=0)
    found["rows"] = {tuple(row.tolist()) for batch in loader for row in batch["input_ids"]}
    stack.update(loader)
    found["masks"], found["locked"] = dict(stack.masks), tiny.snapshot(model)
    model.score = torch.nn.Linear(16, tiny.CLASSES, bias=False)  # apart on each rank
    stack.update(train(model, stack, seed=1))
    stack.verify()
    found["after"] = tiny.snapshot(model)
    stack.detach()  # or its locks would keep own weights from training
    recall = ExactRecall(model, 0.3, importance="gradient")
    for seed, task in ((2, "a"), (3, "b")):
        recall.begin(task, loader=loader)
        train(model, recall, seed=seed)
        recall.close()
        found.setdefault("recalled", tiny.snapshot(model))
    found["owned"] = dict(recall.mask("a"))
    with recall.using("a"):
        found["recalled again"] = tiny.snapshot(model)
    return found


def train(model, method, *, seed):
    """An epoch over 48 rows; returns the loader of this rank's share of them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, folder, [method.callback()], seed=seed, count=48)
        trainer.train()
    return trainer.get_train_dataloader()


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
    importance = "fisher" if odd else "gradient"
    found = {}
    for case, model, settings, batches, expected in (
        ("model", long, {}, good, r"rank 1 has other parameters.*blocks\.2\.mix"),
        ("weights", moved, {}, good, r"rank 1 has other parameters.*blocks\.1\.up\.b"),
        ("importance", tiny.plain(), {"importance": importance}, good, "other settings.*importan"),
        ("sparsity", tiny.plain(), {"sparsity": 0.3 if odd else 0.2}, good, "other masks"),
        ("no labels", tiny.plain(), {}, no_labels, f"{own}.*no 'labels'"),
        ("no batch", tiny.plain(), {}, empty, f"{own}the loader gave no batch"),
    ):
        stack = BitStack(model, **settings)
        found[case] = (expected, said(stack.update, batches), stack.stats()["locked"])
    for case, model, batches, expected in (
        ("a head of more labels", wide, good, "rank 1 has other heads"),
        ("base", embedding, good, r"rank 1 has other weights of the base.*embed\.weight"),
        ("fitting without labels", tiny.plain(), [*good, *no_labels], f"{own}.*no 'labels'"),
        ("no batch to fit on", tiny.plain(), empty, f"{own}the loader gave no batch"),
    ):
        recall = ExactRecall(model, 0.3, importance="gradient")
        error = said(lambda tasks=recall, loader=batches: tasks.begin("a", loader=loader))
        found[case] = (expected, error, recall.stats()["locked"])
    BitStack(tiny.plain()).update(good)
    return found


def sharded() -> dict[str, tuple[str, str]]:
    """By case: what the error should say, and what it said; sharded before and after the stack."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    two, one = "ValueError: .*FSDP2 .fully_shard", "ValueError: .*FSDP1 "
    model = tiny.Body(None)
    stack = BitStack(model)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
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


def said(call, *arguments) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    unittest.main()
