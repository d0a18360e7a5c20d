"""Masks of one bit per weight (pack, unpack, positions, count), and bit patterns of weights.

Pure tensor functions, on the tensor's device. Bit order is little: weight ``i`` of the flattened
mask is bit ``i % 8`` of byte ``i // 8``, as ``numpy.packbits(mask, bitorder="little")`` writes it.
Eight weights are handled at a time, by treating eight bytes as one 64-bit integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

import numpy
import torch

# Multiplying eight 0/1 bytes by this moves byte i to bit 56 + i (Hacker's Delight, section 7-4).
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101
# One bit per byte, bit i in byte i: 0x8040201008040201 as a signed 64-bit integer.
_DIAGONAL = 0x8040201008040201 - (1 << 64)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_size(shape: Sequence[int]) -> int:
    """Bytes that the packed mask of a tensor of this shape takes."""
    return (prod(shape) + 7) // 8


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor of any shape into uint8 ``[ceil(n / 8)]``; padding bits are zero."""
    if mask.dtype != torch.bool:
        raise TypeError(f"pack needs a bool tensor, got {mask.dtype}: compare or cast it first")
    padded = mask.new_zeros(8 * packed_size(mask.shape))
    padded[: mask.numel()] = mask.flatten()
    return ((padded.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Unpack uint8 ``[ceil(n / 8)]`` into a bool tensor of ``shape`` (n weights)."""
    if bits.dtype != torch.uint8 or bits.shape != (packed_size(shape),):
        raise ValueError(
            f"a mask of shape {tuple(shape)} is packed in {packed_size(shape)} bytes of uint8, "
            f"got {bits.dtype} of shape {tuple(bits.shape)}"
        )
    if bits.device.type == "cpu":  # numpy is ten times as fast
        return torch.from_numpy(_unpacked(bits, shape)).view(tuple(shape))
    spread = bits.to(torch.int64).mul_(_REPEAT).bitwise_and_(_DIAGONAL)
    return spread.view(torch.uint8)[: prod(shape)].ne(0).view(tuple(shape))


def positions(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Positions of the set bits in the flattened tensor of ``shape``: int64, ascending."""
    if bits.device.type != "cpu":
        return unpack(bits, shape).flatten().nonzero().flatten()
    return torch.from_numpy(numpy.flatnonzero(_unpacked(bits, shape)))


def _unpacked(bits: torch.Tensor, shape: Sequence[int]) -> numpy.ndarray:
    """A packed mask on the CPU as a flat bool array."""
    return numpy.unpackbits(bits.numpy(), count=prod(shape), bitorder="little").view(bool)


def take(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The weights at these positions of the flattened tensor."""
    return tensor.detach().reshape(-1).index_select(0, where)


def put(tensor: torch.Tensor, where: torch.Tensor, values: torch.Tensor) -> None:
    """Write values into the weights at these positions of the flattened tensor."""
    tensor, where = tensor.detach(), where.long()
    if tensor.is_contiguous():
        tensor.view(-1).scatter_(0, where, values)
    else:
        tensor.copy_(tensor.reshape(-1).scatter(0, where, values).view(tensor.shape))


def count(bits: torch.Tensor) -> int:
    """Number of set bits in a packed mask."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum(dtype=torch.int64))


def pattern(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers: -0.0 differs from 0.0, and a NaN equals itself."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many weights differ in any bit."""
    return int((pattern(one) != pattern(other)).sum())


def digest(tensor: torch.Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a tensor's bits."""
    plain = pattern(tensor.detach()).contiguous().cpu().numpy()
    return hashlib.sha256(plain).hexdigest()[:16]
