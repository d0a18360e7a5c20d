"""BitStack: after each task, lock the parameters that mattered for it, one bit per entry.

``update`` measures importance on a task's data and ORs the top entries into a cumulative mask.
From then on two things hold for every locked entry: its gradient is zero (a hook per parameter, so
that clipping and Adam's moments stay clean), and after each step of an attached optimizer it has
bit for bit the value it was locked with (weight decay and momentum move weights whose gradient is
zero, so zero gradients alone are no guarantee). Masks are held packed and unpacked one parameter
at a time. Works on any ``torch.nn.Module`` whose forward gives ``.loss``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitstack_nb import bits, eligible, select, storage
from bitstack_nb.importance import IMPORTANCE, measure
from bitstack_nb.locks import Masks, TaskLocks, layer_table

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)

BUDGETS = ("union", "fresh")
MODES = ("protect",)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LockedEntriesMoved(RuntimeError):
    """Locked entries differ from the values they were locked with."""


def check_settings(
    sparsity: float,
    *,
    mode: str = "protect",
    budget: str = "union",
    importance: str = "gradient",
) -> None:
    """Raise a ValueError that names a setting out of range, and what it may be."""
    if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity!r}, expected a share from 0 to 1, as 0.12")
    for what, value, known in (
        ("mode", mode, MODES),
        ("budget", budget, BUDGETS),
        ("importance", importance, tuple(IMPORTANCE)),
    ):
        if value not in known:
            raise ValueError(f"{what} is {value!r}, expected one of {', '.join(known)}")


class BitStack:
    """Cumulative 1-bit masks of the parameters that mattered, and the guarantee that they stay.

    Args:
        model: the model to protect, in any wrapper; masks follow it to another device.
        sparsity: share of the eligible entries that one task may lock, 0 to 1.
        exclude: strings; parameters with one of them in their name are never locked. ``None``
            leaves out heads, embeddings and the final norm, found from the model.
        mode: ``"protect"``, the published method.
        budget: ``"union"`` measures importance with the masks lifted, so that tasks overlap;
            ``"fresh"`` behind the masks, so that each task locks new entries (the published
            text and the published code, in that order).
        importance: ``"gradient"``, the summed absolute gradient.

    Raises:
        ValueError: a setting is out of range, or the model has no eligible entries.
        TypeError: the model is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.12,
        exclude: Sequence[str] | None = None,
        *,
        mode: str = "protect",
        budget: str = "union",
        importance: str = "gradient",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {model!r}, expected a torch.nn.Module")
        check_settings(sparsity, mode=mode, budget=budget, importance=importance)
        if isinstance(exclude, str):
            raise ValueError(f"exclude is the string {exclude!r}, expected a list of strings")
        self.settings = {
            "sparsity": float(sparsity),
            "exclude": None if exclude is None else list(exclude),
            "mode": mode,
            "budget": budget,
            "importance": importance,
        }
        self._model = eligible.unwrap(model)
        self._parameters = eligible.eligible_parameters(self._model, self.settings["exclude"])
        self._eligible = sum(p.numel() for p in self._parameters.values())
        if not self._eligible:
            raise ValueError(
                f"{type(self._model).__name__} has no eligible entries: every parameter is "
                f"excluded, frozen or empty (exclude is {self.settings['exclude']!r})"
            )
        self._bits = {
            name: torch.zeros(bits.packed_size(p.shape), dtype=torch.uint8, device=p.device)
            for name, p in self._parameters.items()
        }
        # The exact values of the locked entries, in the order of the flattened parameter.
        self._values = {name: p.detach().new_empty(0) for name, p in self._parameters.items()}
        self._tasks: list[dict[str, TaskLocks]] = []
        self._attached: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = (
            WeakKeyDictionary()
        )
        self._lifted = False
        self.handles: dict[str, RemovableHandle] = {}
        self.hook_calls: dict[str, int] = {}

    # The method ---------------------------------------------------------------------------------

    def update(self, loader: Iterable[Mapping[str, Any]], n_batches: int = 32) -> dict[str, float]:
        """Lock the entries that matter most for the task that ``loader`` gives batches of.

        Args:
            loader: batches, each a mapping with ``labels``; keys that the model's forward does
                not take are dropped.
            n_batches: how many to use; fewer are fine.

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError, TypeError: see :func:`bitstack_nb.importance.measure`. Nothing has changed.
        """
        self._check_still_the_models()
        with self._masks_lifted():
            scores = measure(
                self._model,
                self._parameters,
                loader,
                n_batches=n_batches,
                importance=self.settings["importance"],
            )
        if self.settings["budget"] == "fresh":
            for name in self._locked_names():
                scores[name].masked_fill_(self._mask(name), 0)
        chosen = select.top_masks(scores, round(self.settings["sparsity"] * self._eligible))
        self._lock(chosen)
        return self.stats()

    @torch.no_grad()
    def _lock(self, chosen: Mapping[str, torch.Tensor]) -> None:
        """Add a task's masks. Everything new is computed before anything old is replaced."""
        new_bits, new_values, task = {}, {}, {}
        for name, mask in chosen.items():
            old = self._mask(name)
            union = mask | old
            # Entries locked before keep the value they were locked with, wherever they are now.
            current = self._parameters[name].detach().clone()
            current.masked_scatter_(old, self._values[name])
            new_bits[name] = bits.pack(union)
            new_values[name] = current.masked_select(union)
            selected = int(mask.sum())
            task[name] = TaskLocks(selected, len(new_values[name]) - len(self._values[name]))
        self._bits, self._values = new_bits, new_values
        self._tasks.append(task)
        self._add_gradient_hooks()
        logger.info("task %d: %s", len(self._tasks), self.stats())

    # The guarantee ------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep locked entries exact through every step of this optimizer; once is enough.

        Returns:
            A handle whose ``remove()`` undoes it for this optimizer alone.

        Raises:
            ValueError: the optimizer holds none of the stack's parameters.
            TypeError: it is no optimizer.
        """
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # accelerate wraps the one that steps
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is {optimizer!r}, expected a torch.optim.Optimizer")
        self._check_still_the_models()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(id(p) for p in self._parameters.values()):
            raise ValueError(
                f"this {type(optimizer).__name__} holds none of the stack's parameters: "
                "build it from the parameters of the model that the stack was made with (shards "
                "of FSDP or DeepSpeed are others)"
            )
        self._add_gradient_hooks()
        previous = self._attached.pop(optimizer, None)
        if previous is not None:
            previous.remove()
        handle = optimizer.register_step_post_hook(lambda *_: self.restore())
        self._attached[optimizer] = handle
        return handle

    def detach(self) -> None:
        """Remove every gradient and optimizer hook. Masks stay, and :meth:`attach` resumes."""
        for handle in (*self.handles.values(), *self._attached.values()):
            handle.remove()
        self.handles.clear()
        self._attached.clear()

    def callback(self) -> TrainerCallback:
        """The same guarantee for the transformers ``Trainer``: ``Trainer(callbacks=[...])``."""
        from bitstack_nb.hf import BitStackCallback

        return BitStackCallback(self)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every locked entry back to the value it was locked with."""
        for name in self._locked_names():
            self._parameters[name].masked_scatter_(self._mask(name), self._values[name])

    @torch.no_grad()
    def verify(self) -> int:
        """Count the locked entries that are not bit for bit what they were locked with: 0.

        Raises:
            LockedEntriesMoved: some moved; the message says how many, and where.
        """
        self._check_still_the_models()
        moved = {}
        for name in self._locked_names():
            present = self._parameters[name].masked_select(self._mask(name))
            integer = _INTEGERS[present.element_size()]
            differs = present.view(integer) != self._values[name].view(integer)
            moved[name] = int(differs.sum())
        if total := sum(moved.values()):
            where = ", ".join(f"{name} ({n:,})" for name, n in moved.items() if n)
            raise LockedEntriesMoved(
                f"{total:,} of {self.stats()['locked']:,} locked entries moved: {where}. "
                "Call attach(optimizer) before training, or restore() to put them back"
            )
        return 0

    def _check_still_the_models(self) -> None:
        """A replaced parameter would be guarded no more, and nothing would tell."""
        present = {id(p) for p in self._model.parameters()}
        gone = [name for name, p in self._parameters.items() if id(p) not in present]
        if gone:
            raise RuntimeError(
                f"the model no longer holds {', '.join(gone[:3])}{' ...' if gone[3:] else ''}: a "
                "module was replaced after the stack was made. Exclude heads that are swapped "
                "(exclude=[...]), or save the stack and load it onto the model as it is now"
            )

    def _add_gradient_hooks(self) -> None:
        for name in self._locked_names():
            parameter = self._parameters[name]
            if name not in self.handles and parameter.requires_grad:
                self.handles[name] = parameter.register_hook(self._zero_locked(name))

    def _zero_locked(self, name: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            if self._lifted:
                return None
            self.hook_calls[name] = self.hook_calls.get(name, 0) + 1
            # Not a product with the mask: inf * 0 is NaN.
            return gradient.masked_fill(self._mask(name), 0)

        return hook

    @contextmanager
    def _masks_lifted(self) -> Iterator[None]:
        self._lifted = True
        try:
            yield
        finally:
            self._lifted = False

    # What is locked -----------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """Name -> bool tensor of the parameter's shape, True where locked; unpacked on look-up."""
        return Masks(self._parameters, self._mask)

    def stats(self) -> dict[str, float]:
        """Locked, total and eligible entries; locked in percent of all and of the eligible."""
        locked = sum(len(values) for values in self._values.values())
        total = eligible.parameter_count(self._model)
        return {
            "locked": locked,
            "total": total,
            "eligible": self._eligible,
            "locked_pct": 100 * locked / total,
            "frozen_pct": 100 * locked / self._eligible,
        }

    def layer_table(self) -> pandas.DataFrame:
        """One row per layer, module and task.

        Columns: layer (<NA> outside the blocks), module, task (from 1), eligible, selected (chosen
        by the task), added (of those, not locked before), locked (after the task), lock_fraction
        (locked over eligible, 0 to 1).
        """
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        return layer_table(sizes, self._tasks)

    def _locked_names(self) -> list[str]:
        return [name for name, values in self._values.items() if len(values)]

    def _mask(self, name: str) -> torch.Tensor:
        """The unpacked mask on the parameter's device, where bits and values follow it."""
        parameter, values = self._parameters[name], self._values[name]
        if not len(values):  # nothing locked yet: a cast of the model loses nothing
            values = self._values[name] = parameter.detach().new_empty(0)
        if parameter.dtype != values.dtype:
            raise RuntimeError(
                f"{name} is {parameter.dtype} but its entries were locked as {values.dtype}: "
                "exact values do not survive a cast; train in the dtype of the locks"
            )
        if self._bits[name].device != parameter.device:
            self._bits[name] = self._bits[name].to(parameter.device)
            self._values[name] = values.to(parameter.device)
        return bits.unpack(self._bits[name], parameter.shape)

    # Keeping it ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, parameter shapes and dtypes, packed masks, locked values, locks per task."""
        return {
            "settings": dict(self.settings),
            "parameters": {
                n: {"shape": list(p.shape), "dtype": str(self._values[n].dtype)}
                for n, p in self._parameters.items()
            },
            "bits": {name: packed.clone() for name, packed in self._bits.items()},
            "values": {name: values.clone() for name, values in self._values.items()},
            "tasks": [{n: list(locks) for n, locks in task.items()} for task in self._tasks],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks and put the locked values they come with into the model.

        Without values (``save(path, values=False)``) the model's present ones are locked.

        Raises:
            storage.MaskFileError: the state does not match the model; every mismatch is named
                and nothing has changed.
        """
        storage.check_match(state["parameters"], self._parameters)
        placed = {n: state["bits"][n].to(p.device).clone() for n, p in self._parameters.items()}
        if state["values"] is None:
            values = {
                n: p.detach().masked_select(bits.unpack(placed[n], p.shape))
                for n, p in self._parameters.items()
            }
        else:
            values = {
                n: state["values"][n].to(p.device).clone() for n, p in self._parameters.items()
            }
        self.settings = dict(state["settings"])
        self._bits, self._values = placed, values
        self._tasks = [{n: TaskLocks(*v) for n, v in task.items()} for task in state["tasks"]]
        self._add_gradient_hooks()
        self.restore()

    def save(self, path: str | os.PathLike[str], *, values: bool = True) -> None:
        """Write the stack as safetensors, one bit per eligible entry.

        ``values=False`` leaves out the locked values, for keeping it beside the model's weights.
        """
        storage.write(path, self.state_dict(), values=values)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> BitStack:
        """The stack saved at ``path``, on ``model``; its locked values are put into the model.

        Raises:
            FileNotFoundError: there is no such file.
            storage.MaskFileError: it is damaged, foreign or of another model; the model is
                untouched.
        """
        state = storage.read(path)
        try:
            stack = cls(model, **state["settings"])
        except (TypeError, ValueError) as error:
            raise storage.MaskFileError(f"{path} does not fit this model: {error}") from error
        stack.load_state_dict(state)
        return stack
