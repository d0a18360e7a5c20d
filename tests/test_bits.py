"""bits.py: packed masks against numpy.packbits, on every device there is."""

import unittest

import numpy as np
import torch

from bitstack_nb.bits import count, owned, owned_by_any, pack, positions, unpack, with_owner

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (63,), (64,), (65,), (3, 5), (4, 0, 2), (33, 7, 5)]


def masks():
    generator = torch.Generator().manual_seed(0)
    for device in DEVICES:
        for shape in SHAPES:
            for density in (0.0, 0.3, 1.0):
                mask = torch.rand(shape, generator=generator) < density
                yield device, shape, density, mask.to(device)


class Packing(unittest.TestCase):
    def test_same_bytes_as_numpy(self):
        for device, shape, density, mask in masks():
            with self.subTest(device=device, shape=shape, density=density):
                bits = pack(mask)
                expected = np.packbits(mask.cpu().numpy().flatten(), bitorder="little")
                self.assertEqual(bits.dtype, torch.uint8)
                self.assertEqual(bits.shape, (-(-mask.numel() // 8),))
                self.assertEqual(bits.device.type, device)
                np.testing.assert_array_equal(bits.cpu().numpy(), expected)

    def test_round_trip_and_count(self):
        for device, shape, density, mask in masks():
            with self.subTest(device=device, shape=shape, density=density):
                before = mask.clone()
                bits = pack(mask)
                back = unpack(bits, mask.shape)
                self.assertEqual(back.dtype, torch.bool)
                self.assertEqual(back.device.type, device)
                self.assertEqual(back.shape, mask.shape)
                self.assertTrue(torch.equal(back, mask))
                self.assertTrue(torch.equal(mask, before))
                self.assertEqual(count(bits), int(mask.sum()))
                self.assertIsInstance(count(bits), int)

    def test_positions(self):
        for device, shape, density, mask in masks():
            with self.subTest(device=device, shape=shape, density=density):
                found = positions(pack(mask), mask.shape)
                self.assertEqual((found.dtype, found.device.type), (torch.int64, device))
                self.assertTrue(torch.equal(found, mask.flatten().nonzero().flatten()))

    def test_every_byte(self):
        for value in range(256):
            bits = torch.tensor([value], dtype=torch.uint8)
            mask = unpack(bits, (8,))
            self.assertEqual([int(bit) for bit in mask], [value >> i & 1 for i in range(8)])
            self.assertTrue(torch.equal(pack(mask), bits))
            self.assertEqual(count(bits), value.bit_count())

    def test_not_contiguous(self):
        mask = torch.rand(13, 6, generator=torch.Generator().manual_seed(1)) < 0.5
        for name, view in {"transposed": mask.t(), "strided": mask[::2, 1::2]}.items():
            with self.subTest(name):
                self.assertTrue(torch.equal(pack(view), pack(view.contiguous())))
                self.assertTrue(torch.equal(unpack(pack(view), view.shape), view))

    def test_unpacked_is_a_copy(self):
        bits = pack(torch.zeros(16, dtype=torch.bool))
        unpack(bits, (16,)).fill_(True)
        self.assertEqual(count(bits), 0)

    def test_union_of_packed_is_packed_union(self):
        generator = torch.Generator().manual_seed(2)
        first, second = (torch.rand(77, generator=generator) < 0.4 for _ in range(2))
        self.assertTrue(torch.equal(pack(first) | pack(second), pack(first | second)))

    def test_bad_input(self):
        with self.assertRaises((TypeError, ValueError)):
            pack(torch.ones(8))
        with self.assertRaises((TypeError, ValueError)):
            unpack(torch.zeros(2, dtype=torch.uint8), (17,))
        with self.assertRaises((TypeError, ValueError)):
            unpack(torch.zeros(8, dtype=torch.int64), (64,))


class Owners(unittest.TestCase):
    def test_disjoint_masks_in_planes(self):
        generator = torch.Generator().manual_seed(0)
        for device in DEVICES:
            for shape in SHAPES:
                owner = torch.randint(-1, 9, shape, generator=generator).to(device)
                planes = torch.zeros(0, len(pack(owner > 0)), dtype=torch.uint8, device=device)
                for task in range(9):
                    planes = with_owner(planes, pack(owner == task), task)
                    self.assertEqual(len(planes), (task + 1).bit_length())
                    for earlier in range(task + 1):
                        own = unpack(owned(planes, earlier), shape)
                        self.assertTrue(torch.equal(own, owner == earlier))
                    present = (owner >= 0) & (owner <= task)
                    self.assertTrue(torch.equal(unpack(owned_by_any(planes), shape), present))


if __name__ == "__main__":
    unittest.main()
