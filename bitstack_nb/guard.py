"""The guarantee: a locked weight gets no gradient, and is put back after each optimizer step.

A gradient of zero keeps a locked weight out of clipping and of Adam's moments. Momentum and weight
decay still move the weight, so after the step it gets back the value it was locked with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitstack_nb.eligible import refuse_shards
from bitstack_nb.locks import Locks

_guards: WeakKeyDictionary[nn.Module, WeakSet[Guard]] = WeakKeyDictionary()
# Models whose importance is being measured: gradient hooks do nothing there.
_lifted: WeakSet[nn.Module] = WeakSet()


class LockedWeightsMoved(RuntimeError):
    """Locked weights differ from the values they were locked with."""


def active_guards(model: nn.Module) -> list[Guard]:
    """The guards that have gradient hooks on a model."""
    return [guard for guard in _guards.get(model, ()) if guard.handles]


class OptimizerHooks(NamedTuple):
    """The hooks of a guard on one optimizer."""

    before: RemovableHandle
    after: RemovableHandle

    def remove(self) -> None:
        """Take both off the optimizer."""
        self.before.remove()
        self.after.remove()


class Guard:
    """Hooks on the parameters with locked weights, and on the optimizers that step them.

    The hooks keep the guard alive, so it still works after the stack is deleted. A deep copy of a
    guard guards the copied model, and is not attached to an optimizer.

    Attributes:
        handles: one gradient hook per parameter with locked weights, by name.
        hook_calls: how often each gradient hook was called.
    """

    def __init__(self, model: nn.Module, locks: Locks) -> None:
        self._model, self._locks = model, locks
        self._attached: WeakKeyDictionary[torch.optim.Optimizer, OptimizerHooks]
        self._attached = WeakKeyDictionary()
        self.handles: dict[str, RemovableHandle] = {}
        self.hook_calls: dict[str, int] = {}
        _guards.setdefault(model, WeakSet()).add(self)

    @property
    def locked(self) -> int:
        """Number of weights that the guard keeps locked."""
        return self._locks.count

    # Before the step: no gradient ---------------------------------------------------------------

    def add_gradient_hooks(self) -> None:
        """Add a gradient hook to each parameter that has locked weights and no hook yet."""
        for name in self._locks.names:
            parameter = self._locks.parameters[name]
            if name not in self.handles and parameter.requires_grad:
                self.handles[name] = parameter.register_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            if self._model in _lifted:
                return None  # torch keeps the gradient as it is
            self.hook_calls[name] = self.hook_calls.get(name, 0) + 1
            return self._locks.zeroed(name, gradient)

        return hook

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within the block the gradient hooks on the model do nothing, to measure importance."""
        _lifted.add(self._model)
        try:
            yield
        finally:
            _lifted.discard(self._model)

    # After the step: put back -------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> OptimizerHooks:
        """Hook an optimizer; ``BitStack.attach`` documents it."""
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # accelerate wraps the one that steps
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is {optimizer!r}, expected a torch.optim.Optimizer")
        self.check_parameters_present()
        if _held_by(optimizer).isdisjoint(id(p) for p in self._model.parameters()):
            raise ValueError(
                f"this {type(optimizer).__name__} holds no parameter of the stack's model: build "
                "it from that model's parameters (shards of FSDP or DeepSpeed ZeRO are other "
                "parameters, and not supported)"
            )
        self.add_gradient_hooks()
        if optimizer in self._attached:
            self._attached[optimizer].remove()
        # A compiled step must not trace these, or the values put back would become constants.
        zero, put_back = map(torch.compiler.disable, (self._locks.zero_waiting, self._put_back))
        self._attached[optimizer] = OptimizerHooks(
            optimizer.register_step_pre_hook(lambda *_: zero()),
            optimizer.register_step_post_hook(lambda stepped, *_: put_back(stepped)),
        )
        return self._attached[optimizer]

    def _put_back(self, stepped: torch.optim.Optimizer) -> None:
        # Other optimizers' weights stay: a backward pass that still runs may need them.
        self._locks.restore(_held_by(stepped))

    def detach(self) -> None:
        """Remove every gradient and optimizer hook."""
        for hooks in (*self.handles.values(), *self._attached.values()):
            hooks.remove()
        self.handles.clear()
        self._attached.clear()

    # Checks -------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise LockedWeightsMoved if a locked weight moved, and say how many and where."""
        self.check_parameters_present()
        moved = self._locks.moved()
        if moved:
            where = ", ".join(f"{name} ({number:,})" for name, number in moved.items())
            raise LockedWeightsMoved(
                f"{sum(moved.values()):,} locked weights moved: {where}. "
                "Call attach(optimizer) before training, or restore() to put them back"
            )

    def check_parameters_present(self) -> None:
        """Raise a RuntimeError if the model no longer holds one of the guarded parameters."""
        refuse_shards(self._model)
        present = {id(p) for p in self._model.parameters()}
        gone = [name for name, p in self._locks.parameters.items() if id(p) not in present]
        if gone:
            raise RuntimeError(
                f"the model no longer holds {', '.join(gone[:3])}{' ...' if gone[3:] else ''}: a "
                "module was replaced after the stack was made, or FSDP made shards of it, which is "
                "not supported. Exclude heads that are swapped "
                "(exclude=[...]), or save the stack and load it onto the model as it is now"
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a stack's callback cannot be pickled, because it belongs to a live model: use "
            "save(path) and load(path, model) of the stack, and make another callback"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        # torch copies no gradient hooks, so the copy makes its own.
        copied = Guard(copy.deepcopy(self._model, memo), copy.deepcopy(self._locks, memo))
        if self.handles:
            copied.add_gradient_hooks()
        return copied


def _held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
