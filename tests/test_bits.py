"""bits.py: packed masks against numpy.packbits, on every device there is."""

import unittest

import numpy as np
import torch

from bitstack_nb.bits import (
    count,
    differing,
    digest,
    pack,
    positions,
    unpack,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (63,), (64,), (65,), (3, 5), (4, 0, 2), (33, 7, 5)]


class Packing(unittest.TestCase):
    def test_as_numpy_packs(self):
        generator = torch.Generator().manual_seed(0)
        for device in DEVICES:
            for shape in SHAPES:
                for density in (0.0, 0.3, 1.0):
                    with self.subTest(device=device, shape=shape, density=density):
                        mask = (torch.rand(shape, generator=generator) < density).to(device)
                        self.check(mask, device)

    def check(self, mask: torch.Tensor, device: str) -> None:
        before, bits = mask.clone(), pack(mask)
        expected = np.packbits(mask.cpu().numpy().flatten(), bitorder="little")
        self.assertEqual((bits.dtype, bits.device.type), (torch.uint8, device))
        np.testing.assert_array_equal(bits.cpu().numpy(), expected)
        back, where = unpack(bits, mask.shape), positions(bits, mask.shape)
        self.assertEqual((back.dtype, back.device.type), (torch.bool, device))
        self.assertTrue(torch.equal(back, mask) and torch.equal(mask, before))
        self.assertEqual((where.dtype, where.device.type), (torch.int64, device))
        self.assertTrue(torch.equal(where, mask.flatten().nonzero().flatten()))
        self.assertEqual(count(bits), int(mask.sum()))

    def test_every_byte(self):
        for value in range(256):
            bits = torch.tensor([value], dtype=torch.uint8)
            mask = unpack(bits, (8,))
            self.assertEqual([int(bit) for bit in mask], [value >> i & 1 for i in range(8)])
            self.assertTrue(torch.equal(pack(mask), bits))
            self.assertEqual(count(bits), value.bit_count())

    def test_not_contiguous_and_not_shared(self):
        mask = torch.rand(13, 6, generator=torch.Generator().manual_seed(1)) < 0.5
        for view in (mask.t(), mask[::2, 1::2]):
            bits = pack(view)
            self.assertTrue(torch.equal(bits, pack(view.contiguous())))
            self.assertTrue(torch.equal(unpack(bits, view.shape), view))
            unpack(bits, view.shape).fill_(True)
            self.assertEqual(count(bits), int(view.sum()))

    def test_bad_input(self):
        for call in (
            lambda: pack(torch.ones(8)),
            lambda: unpack(torch.zeros(2, dtype=torch.uint8), (17,)),
            lambda: unpack(torch.zeros(8, dtype=torch.int64), (64,)),
        ):
            with self.assertRaises((TypeError, ValueError)):
                call()


class Patterns(unittest.TestCase):
    def test_every_bit_counts(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            one = torch.tensor([0.0, 1.0, float("nan")], dtype=dtype)
            other = torch.tensor([-0.0, 1.0, float("nan")], dtype=dtype)
            self.assertEqual((differing(one, other), differing(one, one)), (1, 0))
            self.assertNotEqual(digest(one), digest(other))
            self.assertEqual(digest(one), digest(one.repeat(2, 1).t()[:, 0]))


if __name__ == "__main__":
    unittest.main()
