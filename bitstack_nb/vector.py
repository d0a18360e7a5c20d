"""The vector that an optimizer trains: the open task's own weights, flat.

While a task is open its own weights stand in the model and, once more, in a flat vector per dtype.
Backward gives the model's weights dense gradients, one parameter at a time; a hook gathers those of
the own weights into the vector's gradient and drops the dense one. The optimizer steps the vector,
and a hook behind its step writes the vector into the model. Nothing else has a gradient or is in
the optimizer, so nothing else can move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from bitstack_nb import ranks
from bitstack_nb.bits import take
from bitstack_nb.own import Layout, Own

NAME = "own_weights"  # of the vector among the model's parameters, followed by its dtype

# The vectors of all open tasks, for the hook behind every optimizer's step.
_vectors: WeakSet[Vector] = WeakSet()


class Vector:
    """The open task's own weights as trainable flat parameters of its model.

    They are registered in the backbone, so that clipping and the Trainer find them; its state dict
    does not show them. What is loaded into the model while a task is open goes into them as well.

    Args:
        model: already unwrapped.
        layout: of its eligible parameters.
        own: the task's own weights, with the values that are in the model; the vector takes them.
        base: all of the model's parameters but the head's, by name.
        shown: tells whether the model is the task's now.
        after_step: called after the vector was written into the model.
        after_load: called after a state dict was loaded into the model and the vector.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        own: Own,
        *,
        base: Mapping[str, nn.Parameter],
        shown: Callable[[], bool],
        after_step: Callable[[], None],
        after_load: Callable[[], None],
    ) -> None:
        self._model, self._layout, self._base = model, layout, base
        self._shown, self._after_step, self._after_load = shown, after_step, after_load
        self._host = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
        if not isinstance(self._host, nn.Module):
            self._host = model
        self.parameters = [nn.Parameter(values) for values in own.values]
        self.own = own._replace(values=self.parameters)
        # Which parameters of the base took gradients before.
        self.trained = {name: p.requires_grad for name, p in base.items()}
        self._gathering: list[RemovableHandle] = []  # of the hooks on the model's parameters
        self._hiding: list[RemovableHandle] = []
        self._pending: list[torch.Tensor] | None = None  # this rank's part of this backward

    @property
    def names(self) -> list[str]:
        """The vector's names in the host."""
        return [f"{NAME}_{str(d).removeprefix('torch.')}" for d in self._layout.dtypes]

    def register(self) -> None:
        """Put the vector into the model, where nothing but it and the head takes gradients."""
        for parameter in self._base.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._put_in()
        if ranks.count() > 1:  # DDP reduces the head's gradients only; the vector sees to its own
            ours = {*self._base.values(), *self.parameters}
            names = [name for name, p in self._model.named_parameters() if p in ours]
            # DDP writes the name of a parameter outside all submodules with a point.
            dotted = [f".{name}" for name in names if "." not in name]
            self._model._ddp_params_and_buffers_to_ignore = names + dotted
        _vectors.add(self)

    def remove(self) -> None:
        """Take the vector and its hooks off the model, which takes gradients as it did before."""
        _vectors.discard(self)
        self.stop()
        self._take_out()
        vars(self._model).pop("_ddp_params_and_buffers_to_ignore", None)
        for name, trained in self.trained.items():
            self._base[name].requires_grad_(trained)
        for parameter in self.parameters:
            parameter.grad = None

    @contextmanager
    def out_of_the_model(self) -> Iterator[None]:
        """In the body the model does not know of the vector."""
        self._take_out()
        try:
            yield
        finally:
            self._put_in()

    def _put_in(self) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self._host.register_parameter(name, parameter)
        self._hiding = [
            # torch marks these hooks, and methods cannot be marked.
            self._host.register_state_dict_post_hook(lambda *args: self._hide(*args)),
            self._host.register_load_state_dict_post_hook(lambda *args: self._loaded(*args)),
        ]

    def _take_out(self) -> None:
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
        if self._checkpointing():
            # Reentrant checkpointing needs an input with a gradient, and the embeddings have none.
            self._model.enable_input_require_grads()

    def stop(self) -> None:
        """The model's weights take no gradient any more."""
        if self._gathering and self._checkpointing():
            self._model.disable_input_require_grads()
        for handle in self._gathering:
            handle.remove()
        self._gathering = []
        for parameter in self._layout.parameters.values():
            parameter.requires_grad_(False)

    def _checkpointing(self) -> bool:
        """Whether this is a transformers model with gradient checkpointing."""
        parts = self._model.modules() if hasattr(self._model, "enable_input_require_grads") else ()
        return any(getattr(part, "gradient_checkpointing", False) for part in parts)

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
