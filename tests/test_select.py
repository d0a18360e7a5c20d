"""select.py: the exact k-th largest over many tensors against one concatenated sort."""

import unittest

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitstack_nb.importance import choose, kth_largest

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES = [(50, 7), (1,), (), (0,), (333,), (2, 3, 4)]


class OutputSizes(TorchDispatchMode):
    """Records the largest tensor any operation makes, and the names of the operations."""

    def __init__(self):
        super().__init__()
        self.largest, self.operations = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def make_scores(kind: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(shape):
        uniform = torch.rand(shape, generator=generator)
        match kind:
            case "uniform":
                return uniform
            case "spread":  # every exponent of float32
                return torch.exp2(uniform * 250 - 125)
            case "close":  # the same upper 16 bits: the second half of the pattern decides
                return (0x3F800000 + (uniform * 65535).int()).view(torch.float32)
            case "subnormal":
                return (uniform * 1000).int().view(torch.float32)
            case "ties":
                return (uniform * 4).floor()
            case "mostly zero":
                return torch.where(uniform < 0.05, uniform, 0.0)
            case "zero":
                return torch.zeros(shape)
            case "largest":  # up to the largest finite float32
                return torch.where(uniform < 0.5, torch.finfo(torch.float32).max, uniform)

    return [draw(shape).to(device) for shape in SIZES]


KINDS = ["uniform", "spread", "close", "subnormal", "ties", "mostly zero", "zero", "largest"]


class KthLargest(unittest.TestCase):
    def test_equals_sort(self):
        for device in DEVICES:
            for kind in KINDS:
                scores = make_scores(kind, device)
                before = [score.clone() for score in scores]
                ordered = torch.cat([s.flatten() for s in scores]).sort(descending=True).values
                n = ordered.numel()
                for k in (1, 2, 17, n // 8, n // 2, n - 1, n):
                    with self.subTest(device=device, kind=kind, k=k):
                        value = kth_largest(scores, k)
                        self.assertEqual((value.shape, value.dtype), ((), torch.float32))
                        self.assertEqual(value.item(), ordered[k - 1].item())
                self.assertTrue(all(map(torch.equal, scores, before)))

    def test_every_k_of_a_small_set(self):
        values = [0.0, 0.0, 1e-45, 1e-38, 0.5, 0.5, 0.5000001, 1.0, 65504.0, 3e38]
        scores = [torch.tensor(values[:3]), torch.tensor(values[3:8]), torch.tensor(values[8:])]
        ordered = torch.tensor(values).sort(descending=True).values
        for k in range(1, len(values) + 1):
            self.assertEqual(kth_largest(scores, k).item(), ordered[k - 1].item())

    def test_not_contiguous(self):
        base = torch.rand(40, 30, generator=torch.Generator().manual_seed(4))
        views = [base.t()[3:9], base[::3, 1::2]]
        ordered = torch.cat([v.flatten() for v in views]).sort(descending=True).values
        for k in (1, 50, ordered.numel()):
            self.assertEqual(kth_largest(views, k).item(), ordered[k - 1].item())

    def test_errors_name_the_value(self):
        scores = [torch.rand(5), torch.rand(3)]
        for k in (0, -1, 9):
            with self.subTest(k=k), self.assertRaisesRegex(ValueError, str(k)):
                kth_largest(scores, k)
        for empty in ([], [torch.rand(0)]):
            with self.subTest(empty=empty), self.assertRaises(ValueError):
                kth_largest(empty, 1)

    def test_neither_concatenates_nor_sorts(self):
        scores = {str(i): torch.rand(70_000) for i in range(6)}
        for name, call in {
            "kth_largest": lambda: kth_largest(list(scores.values()), 9_000),
            "choose": lambda: choose(scores, 9_000),
        }.items():
            with self.subTest(name), OutputSizes() as seen:
                call()
            self.assertLessEqual(seen.largest, 70_000)
            self.assertFalse(seen.operations & {"sort", "topk", "kthvalue", "argsort"})


class TopMasks(unittest.TestCase):
    def test_threshold_ties_and_zeros(self):
        for kind in KINDS:
            scores = {str(i): score for i, score in enumerate(make_scores(kind, "cpu"))}
            flat = torch.cat([score.flatten() for score in scores.values()])
            for k in (1, 40, flat.numel() // 2, flat.numel()):
                with self.subTest(kind=kind, k=k):
                    masks = choose(scores, k)
                    threshold = flat.sort(descending=True).values[k - 1]
                    self.assertEqual(list(masks), list(scores))
                    for name, mask in masks.items():
                        expected = (scores[name] >= threshold) & (scores[name] > 0)
                        self.assertEqual(mask.dtype, torch.bool)
                        self.assertTrue(torch.equal(mask, expected))

    def test_distinct_scores_give_exactly_k(self):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(5)).float() + 1
        scores = {"a": order[:300].reshape(30, 10), "b": order[300:]}
        for k in (1, 120, 999, 1000):
            masks = choose(scores, k)
            self.assertEqual(sum(int(mask.sum()) for mask in masks.values()), k)

    def test_without_ties_exactly_k_the_first_of_them(self):
        for kind in KINDS:
            scores = {str(i): score for i, score in enumerate(make_scores(kind, "cpu"))}
            flat = torch.cat([score.flatten() for score in scores.values()])
            order = flat.sort(descending=True, stable=True).indices
            for k in (0, 1, 7, 100, 500, len(flat)):
                with self.subTest(kind=kind, k=k):
                    expected = torch.zeros_like(flat, dtype=torch.bool)
                    expected[order[:k]] = True
                    expected &= flat > 0
                    masks = choose(scores, k, ties=False)
                    found = torch.cat([masks[name].flatten() for name in scores])
                    self.assertTrue(torch.equal(found, expected))

    def test_an_entry_without_gradient_is_never_chosen(self):
        masks = choose({"a": torch.zeros(4), "b": torch.tensor([0.0, 2.0])}, 5)
        self.assertEqual(masks["a"].tolist(), [False] * 4)
        self.assertEqual(masks["b"].tolist(), [False, True])


if __name__ == "__main__":
    unittest.main()
