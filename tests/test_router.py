"""The router: features of known clusters, few texts, and parts that fit into a file."""

import unittest

import torch

from bitstack_nb.router import RANK, Router, fit


def cluster(number: int, count: int = 200, *, size: int = 96, seed: int = 0) -> torch.Tensor:
    """Features around a mean of their own, in a covariance that all clusters share."""
    centre = torch.zeros(size)
    centre[number] = 3.0
    generator = torch.Generator().manual_seed(100 * seed + number)
    noise = torch.randn(count, size, generator=generator)
    noise[:, 10] *= 20  # a direction that tells nothing of the cluster
    return centre + noise


class Routing(unittest.TestCase):
    def test_clusters_are_found_in_spite_of_a_loud_direction(self):
        parts = {str(number): fit(cluster(number)) for number in range(4)}
        router, right = Router(parts), 0
        for name in parts:
            choices = router.choose(cluster(int(name), seed=1))
            right += sum(choice.task == name for choice in choices)
            self.assertTrue(all(1 / 4 <= choice.score <= 1 for choice in choices))
        self.assertGreater(right, 0.9 * 800)

    def test_a_removed_part_leaves_nothing_behind(self):
        parts = {str(number): fit(cluster(number)) for number in range(3)}
        texts = cluster(0, seed=1)
        before = Router({"0": parts["0"], "1": parts["1"]}).choose(texts, unknown=0.1)
        Router(parts).choose(texts)
        del parts["2"]
        self.assertEqual(Router(parts).choose(texts, unknown=0.1), before)

    def test_texts_of_no_task(self):
        for held in (None, cluster(0, seed=2)[:, :10]):
            router = Router({"0": fit(cluster(0)[:, :10], held)})
            own, other = (router.choose(cluster(n, seed=1)[:, :10], unknown=0.1) for n in (0, 5))
            lost, found = (sum(c.task is None for c in choices) for choices in (own, other))
            self.assertLess(lost, 0.2 * 200)
            self.assertGreater(found, 0.8 * 200)

    def test_few_or_equal_texts(self):
        for features in (cluster(0, 2), torch.ones(5, 8), torch.zeros(3, 8)):
            part = fit(features)
            (choice,) = Router({"a": part}).choose(features[:1], unknown=0.0)
            self.assertEqual(choice, ("a", 1.0))
            self.assertTrue(all(tensor.isfinite().all() for tensor in part))

    def test_a_part_takes_some_tens_of_kilobytes(self):
        part = fit(cluster(0, 500, size=384))
        self.assertEqual(part.axes.shape, (RANK, 384))
        self.assertLess(sum(tensor.nbytes for tensor in part), 60_000)


if __name__ == "__main__":
    unittest.main()
