"""A task's own weights: where they are in the model, and the flat vector that an optimizer trains.

While a task is open its own weights stand in the model and, once more, in a flat vector per dtype.
Backward gives the model's weights dense gradients, one parameter at a time; a hook gathers those of
the own weights into the vector's gradient and drops the dense one. The optimizer steps the vector,
and a hook behind its step writes the vector into the model. Nothing else has a gradient or is in
the optimizer, so nothing else can move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from bitstack_nb import ranks
from bitstack_nb.bits import put, take
from bitstack_nb.importance import choose

VECTOR = "own_weights"  # the vector's name among the model's parameters, followed by its dtype


class Own(NamedTuple):
    """A task's own weights.

    Attributes:
        counts: how many there are in each parameter of the layout.
        positions: int32, in each flattened parameter ascending, one parameter after the other.
        values: in the same order, a tensor per dtype of the layout.
    """

    counts: list[int]
    positions: torch.Tensor
    values: list[torch.Tensor]


class Piece(NamedTuple):
    """The own weights of one parameter, on its device."""

    name: str
    parameter: nn.Parameter
    where: torch.Tensor
    values: torch.Tensor


class Layout:
    """The eligible parameters in a fixed order, those of one dtype side by side.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.dtypes = list(dict.fromkeys(p.dtype for p in parameters.values()))
        places = [(name, p, self.dtypes.index(p.dtype)) for name, p in parameters.items()]
        self._places = sorted(places, key=lambda place: place[2])
        self.parameters = {name: p for name, p, _ in self._places}
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self.sizes)

    def own(self, where: Sequence[torch.Tensor]) -> Own:
        """The weights at these positions of each parameter, with the values they have now."""
        positions = torch.cat([at.to(self._device(), torch.int32) for at in where])
        own = Own([len(at) for at in where], positions, [])
        return own._replace(values=self.read(own))

    def read(self, own: Own) -> list[torch.Tensor]:
        """The values that the model has at these positions now, a tensor per dtype."""
        sizes, device = self._by_dtype(own.counts), own.positions.device
        values = [
            torch.empty(sum(size), dtype=dtype, device=device)
            for dtype, size in zip(self.dtypes, sizes, strict=True)
        ]
        parts = [part for v, size in zip(values, sizes, strict=True) for part in v.split(size)]
        positions = own.positions.split(own.counts)
        for (_, parameter, _), where, part in zip(self._places, positions, parts, strict=True):
            part.copy_(take(parameter, where.to(parameter.device)))
        return values

    def pieces(self, own: Own) -> Iterator[Piece]:
        """The own weights parameter by parameter, without those that have none."""
        device = self._device()  # moved at once, not piece by piece
        positions = own.positions.to(device).split(own.counts)
        flat = [v.detach().to(device, d) for v, d in zip(own.values, self.dtypes, strict=True)]
        sizes = self._by_dtype(own.counts)
        values = [part for v, size in zip(flat, sizes, strict=True) for part in v.split(size)]
        for (name, parameter, _), where, value in zip(self._places, positions, values, strict=True):
            if value.numel():
                if (at := parameter.device) != device:  # the model lies on several
                    where, value = where.to(at), value.to(at)
                yield Piece(name, parameter, where, value)

    def _device(self) -> torch.device:
        return self._places[0][1].device

    def _by_dtype(self, counts: Sequence[int]) -> list[list[int]]:
        parted: list[list[int]] = [[] for _ in self.dtypes]
        for (*_, dtype), count in zip(self._places, counts, strict=True):
            parted[dtype].append(count)
        return parted

    def write(self, own: Own) -> None:
        """Put own weights into the model."""
        for piece in self.pieces(own):
            put(piece.parameter, piece.where, piece.values)


def random_positions(
    parameters: Mapping[str, torch.Tensor], count: int, *, seed: int
) -> list[torch.Tensor]:
    """Positions in each parameter of ``count`` weights chosen at random, all equally likely.

    They are those with the largest of ``importance.random_scores``, of which only the candidates
    are kept. A seed gives the same on every device.
    """
    # Nearly surely at least count of all scores, which are uniform up to 1, are beyond this limit.
    limit = 1 - (count + 10 * count**0.5 + 100) / sum(p.numel() for p in parameters.values())
    scores, where = _scores_from(max(limit, 0), parameters, seed=seed)
    if sum(map(len, where.values())) < count:
        scores, where = _scores_from(0, parameters, seed=seed)
    chosen = choose(scores, count, ties=False)
    return [positions[chosen[name]] for name, positions in where.items()]


def _scores_from(
    limit: float, parameters: Mapping[str, torch.Tensor], *, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The random scores of each parameter that are at least ``limit``, and their positions."""
    generator = torch.Generator().manual_seed(seed)
    scores, where = {}, {}
    for name, p in parameters.items():
        every = torch.rand(p.shape, generator=generator, dtype=torch.float32, device="cpu")
        every = every.clamp_(min=torch.finfo(torch.float32).tiny).flatten()
        where[name] = (every >= limit).nonzero().flatten().int()
        scores[name] = every[where[name]]
    return scores, where


# The vectors of all open tasks, for the hook behind every optimizer's step.
_vectors: WeakSet[Vector] = WeakSet()


class Vector:
    """The open task's own weights as trainable flat parameters of a module.

    They are registered in the module, so that clipping and the Trainer find them; its state dict
    does not show them. What is loaded into the module while a task is open goes into them as well.

    Args:
        host: the backbone.
        layout: of the model's eligible parameters.
        own: the task's own weights, with the values that are in the model; the vector takes them.
        shown: tells whether the model is the task's now.
        after_step: called after the vector was written into the model.
        after_load: called after a state dict was loaded into the model and the vector.
    """

    def __init__(
        self,
        host: nn.Module,
        layout: Layout,
        own: Own,
        *,
        shown: Callable[[], bool],
        after_step: Callable[[], None],
        after_load: Callable[[], None],
    ) -> None:
        self._host, self._layout = host, layout
        self._shown, self._after_step, self._after_load = shown, after_step, after_load
        self.parameters = [nn.Parameter(values) for values in own.values]
        self.own = own._replace(values=self.parameters)
        self._gathering: list[RemovableHandle] = []  # of the hooks on the model's parameters
        self._hiding: list[RemovableHandle] = []
        self._pending: list[torch.Tensor] | None = None  # this rank's part of this backward

    @property
    def names(self) -> list[str]:
        """The vector's names in the host."""
        return [f"{VECTOR}_{str(d).removeprefix('torch.')}" for d in self._layout.dtypes]

    def register(self) -> None:
        """Put the vector among the host's parameters."""
        _vectors.add(self)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self._host.register_parameter(name, parameter)
        self._hiding = [
            # torch marks these hooks, and methods cannot be marked.
            self._host.register_state_dict_post_hook(lambda *args: self._hide(*args)),
            self._host.register_load_state_dict_post_hook(lambda *args: self._loaded(*args)),
        ]

    @contextmanager
    def out_of_the_model(self) -> Iterator[None]:
        """In the body the model does not know of the vector."""
        self._unregister()
        try:
            yield
        finally:
            self.register()

    def _unregister(self) -> None:
        for name in self.names:
            self._host._parameters.pop(name, None)
        for handle in self._hiding:
            handle.remove()

    def _hide(self, module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        for name in self.names:
            state.pop(prefix + name, None)

    def _loaded(self, module: nn.Module, keys: Any) -> None:
        ours = {n for n in keys.missing_keys if n.rpartition(".")[2] in self.names}
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in ours]
        if self._shown():
            self._read()
            self._after_load()

    @torch.no_grad()
    def _read(self) -> None:
        for parameter, values in zip(self.parameters, self._layout.read(self.own), strict=True):
            parameter.copy_(values)

    def remove(self) -> None:
        """Take the vector and its hooks off the model."""
        self.stop()
        self._unregister()
        for parameter in self.parameters:
            parameter.grad = None
        _vectors.discard(self)

    # Training -----------------------------------------------------------------------------------

    def start(self) -> None:
        """From now on backward gives the vector its gradient."""
        if self._gathering:
            return
        starts = [0] * len(self.parameters)
        for piece in self._layout.pieces(self.own):
            group = self._layout.dtypes.index(piece.parameter.dtype)
            stop = starts[group] + len(piece.where)
            piece.parameter.requires_grad_(True)
            hook = self._hook(group, slice(starts[group], stop), piece.where)
            self._gathering.append(piece.parameter.register_post_accumulate_grad_hook(hook))
            starts[group] = stop
        self._ranks = ranks.count()

    def stop(self) -> None:
        """The model's weights take no gradient any more."""
        for handle in self._gathering:
            handle.remove()
        self._gathering = []
        for parameter in self._layout.parameters.values():
            parameter.requires_grad_(False)

    def _hook(self, group: int, part: slice, where: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if self._shown():
                self._gradient(group)[part] += take(gradient, where)

        return hook

    def _gradient(self, group: int) -> torch.Tensor:
        """The gradient to add to: the vector's, or this rank's, which is averaged at the end."""
        if self._ranks > 1:
            if self._pending is None:
                self._pending = [torch.zeros_like(p) for p in self.parameters]
                torch.autograd.Variable._execution_engine.queue_callback(self._average)
            return self._pending[group]
        return _started(self.parameters[group])

    @torch.no_grad()
    def _average(self) -> None:
        """Add the mean of all ranks' gradients to the vector's, behind the end of backward."""
        pending, self._pending = self._pending, None
        for parameter, gradient in zip(self.parameters, pending, strict=True):
            gradient /= self._ranks
            dist.all_reduce(gradient)
            _started(parameter).add_(gradient)

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """What follows a step of any optimizer."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, self.parameters)):
            if not held.isdisjoint(map(id, self._layout.parameters.values())):
                raise RuntimeError(
                    f"this {type(optimizer).__name__} was made before begin() and does not hold "
                    "the task's own weights: make it from tasks.parameters()"
                )
        elif not self._gathering:
            raise RuntimeError(
                "the task's own weights get no gradient yet: make the optimizer from "
                "tasks.parameters(), or give the Trainer tasks.callback()"
            )
        elif isinstance(optimizer, torch.optim.LBFGS):
            raise RuntimeError(
                "LBFGS runs the model several times within a step, and own weights are written "
                "into it after a step: take another optimizer"
            )
        elif self._shown():
            self._layout.write(self.own)
            self._after_step()


def _started(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, new where there is none."""
    if parameter.grad is None:
        # The one number to which any gradient can be added without a bit of it changing.
        parameter.grad = torch.full_like(parameter, -0.0)
    return parameter.grad


# Not traced where a step is compiled: the positions would be constants of the graph.
@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for vector in tuple(_vectors):
        vector.stepped(optimizer)


register_optimizer_step_post_hook(_after_step)
