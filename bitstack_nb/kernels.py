"""The guarantee on a GPU: one launch for the locked weights of all tensors, in Triton.

A launch costs a GPU step about 15 microseconds whatever its size, and a model has hundreds of
tensors. So each kernel here works on all of them. One program handles a block of 4,096 weights, and
two tables on the device describe the work:

- ``rows``, one row per tensor: where the tensor, its packed mask and its values are in memory, the
  number of its weights (0 leaves the tensor out) and its first block;
- ``blocks``, one row per block: its tensor, and how many of the tensor's weights are locked before.

Weights are copied as integers of their size. So every bit is kept, a NaN's too, and no GPU needs
instructions for the dtype. The histogram of scores for the exact threshold is made in the same way.

``gpu`` imports this module only for a device that runs the kernels. Tests run them on a CPU, in
Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from bitstack_nb import bits

logger = logging.getLogger(__name__)

BLOCK, WARPS = 4096, 8
_INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

# The kernels ------------------------------------------------------------------------------------


@triton.jit
def _part(rows, blocks, block: tl.constexpr):
    """This program's row and weights: their positions in the tensor, and 1 where one is locked."""
    program = tl.program_id(0)
    row = rows + 5 * tl.load(blocks + 2 * program)
    where = (program - tl.load(row + 4)) * block + tl.arange(0, block)
    packed = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    byte = tl.load(packed + where // 8, mask=where < tl.load(row + 3), other=0)
    return row, where, (byte.to(tl.int32) >> (where % 8).to(tl.int32)) & 1


@triton.jit
def _locked(rows, blocks, kind: tl.constexpr, block: tl.constexpr):
    """Pointers to this block's weights and to their values, and which of the weights are locked."""
    row, where, locked = _part(rows, blocks, block)
    before = tl.load(blocks + 2 * tl.program_id(0) + 1)
    weights = tl.load(row).to(tl.pointer_type(kind)) + where
    values = tl.load(row + 2).to(tl.pointer_type(kind)) + before + tl.cumsum(locked) - 1
    return weights, values, locked != 0


@triton.jit
def count_kernel(rows, blocks, counts, block: tl.constexpr):
    """Count the locked weights of each block."""
    _, _, locked = _part(rows, blocks, block)
    tl.store(counts + tl.program_id(0), tl.sum(locked))


@triton.jit
def zero_kernel(rows, blocks, kind: tl.constexpr, block: tl.constexpr):
    """Zero the locked weights. Nothing is read, so that NaN and inf go too."""
    row, where, locked = _part(rows, blocks, block)
    weights = tl.load(row).to(tl.pointer_type(kind)) + where
    tl.store(weights, tl.zeros([block], kind), mask=locked != 0)


@triton.jit
def put_kernel(rows, blocks, kind: tl.constexpr, block: tl.constexpr):
    """Write the values into the locked weights."""
    weights, values, locked = _locked(rows, blocks, kind, block)
    tl.store(weights, tl.load(values, mask=locked), mask=locked)


@triton.jit
def take_kernel(rows, blocks, kind: tl.constexpr, block: tl.constexpr):
    """Copy the locked weights into the values."""
    weights, values, locked = _locked(rows, blocks, kind, block)
    tl.store(values, tl.load(weights, mask=locked), mask=locked)


@triton.jit
def compare_kernel(rows, blocks, counts, kind: tl.constexpr, block: tl.constexpr):
    """Count, per tensor, the locked weights that differ from their values in any bit."""
    weights, values, locked = _locked(rows, blocks, kind, block)
    differ = tl.load(weights, mask=locked, other=0) != tl.load(values, mask=locked, other=0)
    tensor = tl.load(blocks + 2 * tl.program_id(0))
    tl.atomic_add(counts + tensor, tl.sum(differ.to(tl.int32)))


@triton.jit
def histogram_kernel(rows, blocks, counts, upper, low: tl.constexpr, block: tl.constexpr):
    """Count scores by their upper 16 bits, or those with these upper bits by their lower 16.

    Zeros are left out: they are many, and would wait for one another at one counter.
    """
    program = tl.program_id(0)
    row = rows + 5 * tl.load(blocks + 2 * program)
    where = (program - tl.load(row + 4)) * block + tl.arange(0, block)
    scores = tl.load(row).to(tl.pointer_type(tl.int32)) + where
    pattern = tl.load(scores, mask=where < tl.load(row + 3), other=0)
    counted = pattern != 0
    digit = pattern >> 16
    if low:
        counted = counted & (digit == tl.load(upper))
        digit = pattern & 0xFFFF
    tl.atomic_add(counts + digit, 1, mask=counted, sem="relaxed")


# Their tables -----------------------------------------------------------------------------------


class _Tables:
    """The tables for some tensors of one device, in the order of their names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._device = next(iter(tensors.values())).device
        self._sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        self._packed: Mapping[str, torch.Tensor] = {}
        self._values: Mapping[str, torch.Tensor] = {}
        each = [triton.cdiv(size, BLOCK) for size in self._sizes.values()]
        self._starts = [0, *accumulate(each)]
        numbers = [row for row, count in enumerate(each) for _ in range(count)]
        self._tensor = _sent(numbers, self._device)
        self._blocks = torch.stack([self._tensor, torch.zeros_like(self._tensor)], 1).int()
        self._known: dict[str, tuple[list[int], torch.Tensor]] = {}

    def launch(
        self, kernel: Any, tensors: Mapping[str, torch.Tensor], *arguments: Any, **constants: Any
    ) -> None:
        """Launch a kernel on those of the tensors that are given."""
        there = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with there:
            tables = self._rows(kernel.__name__, tensors), self._blocks
            grid = (len(self._blocks),)
            kernel[grid](*tables, *arguments, **constants, block=BLOCK, num_warps=WARPS)

    def _rows(self, user: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The rows on the device; sent only if an address changed since the user's last launch."""
        rows: list[int] = []
        for (name, size), start in zip(self._sizes.items(), self._starts, strict=False):
            tensor = tensors.get(name)
            rows += [
                _address(tensor),
                _address(self._packed.get(name)),
                _address(self._values.get(name)),
                0 if tensor is None else size,
                start,
            ]
        known, table = self._known.get(user, (None, None))
        if rows != known:
            table = _sent(rows, self._device)
            self._known[user] = rows, table
        return table


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sent(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Numbers on a device, without waiting for it; whatever the user's default device is."""
    pinned = torch.tensor(
        numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"
    )
    return pinned.to(device, non_blocking=True)


class _Group(_Tables):
    """Parameters of one device and dtype, their packed masks and values."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        packed: Mapping[str, torch.Tensor],
        values: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(parameters)
        self._dtype = next(iter(parameters.values())).dtype
        self._kind = _INTEGERS[self._dtype.itemsize]
        self._packed, self._values = dict(packed), dict(values)
        counts = torch.zeros(len(self._blocks), dtype=torch.int32, device=self._device)
        self.launch(count_kernel, parameters, counts)
        upto = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
        starts = _sent(self._starts, self._device)
        self._blocks[:, 1] = upto[:-1] - upto[starts[self._tensor]]
        self._locked = upto[starts].diff()

    def fitting(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the tensors that a kernel can take for this group's parameters."""
        return {
            name: tensor
            for name in self._sizes
            if (tensor := tensors.get(name)) is not None
            and tensor.dtype == self._dtype
            and tensor.device == self._device
            and tensor.numel() == self._sizes[name]
            and _plain(tensor)
        }

    def zero(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.launch(zero_kernel, tensors, kind=self._kind)

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.launch(put_kernel, tensors, kind=self._kind)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self._values = {
            name: torch.empty(size, dtype=self._dtype, device=self._device)
            for name, size in zip(self._sizes, self._locked.tolist(), strict=True)
        }
        self.launch(take_kernel, tensors, kind=self._kind)
        return self._values

    def compare(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        counts = torch.zeros(len(self._sizes), dtype=torch.int32, device=self._device)
        self.launch(compare_kernel, tensors, counts, kind=self._kind)
        everywhere = zip(self._sizes, counts.tolist(), strict=True)
        return {name: count for name, count in everywhere if name in tensors}


class Fused:
    """The locked weights of many parameters, by one launch per device and dtype.

    A method leaves to its caller the tensors that no kernel can take: those that are not
    contiguous or of another device or dtype than the parameter was, and all inside a CUDA graph,
    which would keep the addresses.

    Args:
        parameters: by name.
        packed: their packed masks; one on another device than its parameter is left alone.
        values: the values of their locked weights; ``take`` needs none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        packed: Mapping[str, torch.Tensor],
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            if (
                p.is_floating_point()
                and p.dtype.itemsize in _INTEGERS
                and 0 < p.numel() < 2**31
                and _plain(p)
                and packed[name].device == p.device
                and work_on(p.device)
            ):
                groups.setdefault((p.device, p.dtype), {})[name] = p
        self._groups = [_Group(group, packed, values or {}) for group in groups.values()]

    def zero(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Zero the locked weights of gradients; returns the names left to do."""
        return self._written(_Group.zero, tensors)

    def put(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Write the values into the locked weights; returns the names left to do."""
        return self._written(_Group.put, tensors)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """New tensors of the locked weights' values, for those that a kernel can take."""
        parts = [group.take(mine) for group, mine in self._shares(tensors)]
        return {name: values for part in parts for name, values in part.items()}

    def compare(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """How many locked weights differ from their values, for those that a kernel can take."""
        parts = [group.compare(mine) for group, mine in self._shares(tensors)]
        return {name: count for part in parts for name, count in part.items()}

    def _written(self, work: Callable[..., None], tensors: Mapping[str, torch.Tensor]) -> list[str]:
        left = dict(tensors)
        for group, mine in self._shares(tensors):
            work(group, mine)
            # Autograd must notice, as it notices an operation of torch.
            torch.autograd.graph.increment_version(list(mine.values()))
            left = {name: tensor for name, tensor in left.items() if name not in mine}
        return list(left)

    def _shares(
        self, tensors: Mapping[str, torch.Tensor]
    ) -> list[tuple[_Group, dict[str, torch.Tensor]]]:
        """Each group that has something to do, and what."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return []
        shares = [(group, group.fitting(tensors)) for group in self._groups]
        return [(group, mine) for group, mine in shares if mine]


def histogram(scores: Sequence[torch.Tensor], upper: torch.Tensor | None) -> torch.Tensor:
    """How many scores have each value of their upper 16 bits: int64 ``[65536]``.

    With ``upper`` how many of those whose upper bits it is have each value of the lower 16. All
    other scores count as 0 then, the last bucket from the top, where they change no rank.

    Args:
        scores: flat float32 tensors of one device, at least 0 and not empty.
        upper: an integer on that device.
    """
    tensors = {str(i): score for i, score in enumerate(scores)}
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=scores[0].device)
    if upper is None:
        _Tables(tensors).launch(histogram_kernel, tensors, counts, counts, low=False)
    else:
        _Tables(tensors).launch(histogram_kernel, tensors, counts, upper, low=True)
    counts[0] += sum(score.numel() for score in scores) - counts.sum()
    return counts


# When they can be used --------------------------------------------------------------------------


@cache
def work_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: tried once, for there may be no C compiler."""
    try:
        weights = nn.Parameter(torch.arange(9, dtype=torch.float32, device=device))
        packed = {"": bits.pack(weights > 4)}
        with torch.no_grad():
            group = _Group({"": weights}, packed, {})
            return group.take({"": weights})[""].tolist() == [5, 6, 7, 8]
    except Exception as error:
        logger.info("no Triton kernels on %s, every tensor has its own launches: %s", device, error)
        return False


def fills_grad() -> bool:
    """Whether the running backward pass adds plain numbers to ``.grad``; called from a hook.

    ``torch.autograd.grad`` returns gradients instead, and with ``create_graph`` they are part of a
    graph.
    """
    if torch.is_grad_enabled():
        return False
    node = torch._C._current_autograd_node()
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so torch says that this is torch.autograd.grad
        return False


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended.

    It is queued from the queue: so it comes after all that DDP has queued by then, which writes
    the gradients' averages.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(function))


def _plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a block of numbers in memory."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )
