"""importance.py: the exact k-th largest over many tensors against one concatenated sort."""

import unittest

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitstack_nb.importance import choose, kth_largest

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES = [(50, 7), (1,), (), (0,), (333,), (2, 3, 4)]
KINDS = {
    "uniform": lambda u: u,
    "every exponent": lambda u: torch.exp2(u * 250 - 125),
    # The same upper 16 bits: the second half of the pattern decides.
    "close": lambda u: (0x3F800000 + (u * 65535).int()).view(torch.float32),
    "subnormal": lambda u: (u * 1000).int().view(torch.float32),
    "ties": lambda u: (u * 4).floor(),
    "mostly zero": lambda u: torch.where(u < 0.05, u, 0.0),
    "zero": torch.zeros_like,
    "largest": lambda u: torch.where(u < 0.5, torch.finfo(torch.float32).max, u),
}


def scores_of(kind: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    uniform = [torch.rand(shape, generator=generator) for shape in SIZES]
    return {str(i): KINDS[kind](u).to(device) for i, u in enumerate(uniform)}


def flat(scores) -> torch.Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


class KthLargest(unittest.TestCase):
    def test_equals_sort(self):
        for device in DEVICES:
            for kind in KINDS:
                scores = scores_of(kind, device)
                before = [score.clone() for score in scores.values()]
                ordered = flat(scores).sort(descending=True).values
                n = ordered.numel()
                for k in (1, 2, 17, n // 8, n // 2, n - 1, n):
                    with self.subTest(device=device, kind=kind, k=k):
                        value = kth_largest(list(scores.values()), k)
                        self.assertEqual((value.shape, value.dtype), ((), torch.float32))
                        self.assertEqual(value.item(), ordered[k - 1].item())
                self.assertTrue(all(map(torch.equal, scores.values(), before)))

    def test_every_k_of_a_small_set(self):
        values = torch.tensor([0.0, 0.0, 1e-45, 1e-38, 0.5, 0.5, 0.5000001, 1.0, 65504.0, 3e38])
        ordered = values.sort(descending=True).values
        for k in range(1, len(values) + 1):
            self.assertEqual(kth_largest(values.split([3, 5, 2]), k).item(), ordered[k - 1].item())

    def test_not_contiguous(self):
        base = torch.rand(40, 30, generator=torch.Generator().manual_seed(4))
        views = [base.t()[3:9], base[::3, 1::2]]
        ordered = torch.cat([v.flatten() for v in views]).sort(descending=True).values
        for k in (1, 50, ordered.numel()):
            self.assertEqual(kth_largest(views, k).item(), ordered[k - 1].item())

    def test_errors_name_the_value(self):
        for k in (0, -1, 9):
            with self.assertRaisesRegex(ValueError, str(k)):
                kth_largest([torch.rand(5), torch.rand(3)], k)
        for empty in ([], [torch.rand(0)]):
            with self.assertRaises(ValueError):
                kth_largest(empty, 1)

    def test_neither_concatenates_nor_sorts(self):
        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                names.add(function.overloadpacket.__name__)
                made = result if isinstance(result, tuple | list) else [result]
                sizes.extend(t.numel() for t in made if isinstance(t, torch.Tensor))
                return result

        names, sizes = set(), []
        with Operations():
            choose({str(i): torch.rand(70_000) for i in range(6)}, 9_000)
        self.assertLessEqual(max(sizes), 70_000)
        self.assertTrue(names.isdisjoint({"sort", "topk", "kthvalue", "argsort"}))


class Choose(unittest.TestCase):
    def test_threshold_ties_and_zeros(self):
        """All ties with the k-th, or without them the first; a score of zero never."""
        for kind in KINDS:
            scores = scores_of(kind)
            everything = flat(scores)
            ordered = everything.sort(descending=True, stable=True)
            for k in (0, 1, 7, 40, 333, len(everything)):
                with self.subTest(kind=kind, k=k):
                    first = torch.zeros_like(everything, dtype=torch.bool)
                    first[ordered.indices[:k]] = True
                    tied = everything >= ordered.values[k - 1] if k else first
                    for ties, expected in ((True, tied), (False, first)):
                        masks = choose(scores, k, ties=ties)
                        self.assertEqual(list(masks), list(scores))
                        self.assertTrue(torch.equal(flat(masks), expected & (everything > 0)))

    def test_what_is_taken_is_left_out(self):
        scores = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([[2.0], [1.0]])}
        taken = {"a": torch.tensor([True, False]), "b": torch.tensor([[False], [False]])}
        masks = choose(scores, 2, without=taken)
        self.assertEqual(masks["a"].tolist(), [False, True])
        self.assertEqual(masks["b"].tolist(), [[True], [False]])
        self.assertEqual(scores["a"].tolist(), [4.0, 3.0])


if __name__ == "__main__":
    unittest.main()
