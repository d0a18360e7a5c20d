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

from bitstack_nb import eligible, select, storage
from bitstack_nb.importance import IMPORTANCE, measure
from bitstack_nb.locks import Locks, Masks

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)

BUDGETS = ("union", "fresh")
MODES = ("protect",)


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
        parameters = eligible.eligible_parameters(self._model, self.settings["exclude"])
        self._locks = Locks(parameters)
        if not self._locks.eligible:
            raise ValueError(
                f"{type(self._model).__name__} has no eligible entries: every parameter is "
                f"excluded, frozen or empty (exclude is {self.settings['exclude']!r})"
            )
        self._attached: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = (
            WeakKeyDictionary()
        )
        self._lifted = False
        self.handles: dict[str, RemovableHandle] = {}
        self.hook_calls: dict[str, int] = {}

    # The method ---------------------------------------------------------------------------------

    def update(
        self,
        loader: Iterable[Mapping[str, Any]],
        n_batches: int = 32,
        *,
        observe: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
    ) -> dict[str, float]:
        """Lock the entries that matter most for the task that ``loader`` gives batches of.

        Args:
            loader: batches, each a mapping with ``labels``; keys that the model's forward does
                not take are dropped.
            n_batches: how many to use; fewer are fine.
            observe: called with the importance, float32 by parameter name, before anything is
                locked (:class:`bitstack_nb.curves.CurveRecorder`).

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError, TypeError: see :func:`bitstack_nb.importance.measure`. Nothing has changed.
        """
        scores = self.measure(loader, n_batches)
        if observe is not None:
            observe(scores)
        if self.settings["budget"] == "fresh":
            for name in self._locks.names:
                scores[name].masked_fill_(self._locks.mask(name), 0)
        budget = round(self.settings["sparsity"] * self._locks.eligible)
        self._locks.add(select.top_masks(scores, budget))
        self._add_gradient_hooks()
        logger.info("locked %s", stats := self.stats())
        return stats

    def measure(
        self, loader: Iterable[Mapping[str, Any]], n_batches: int = 32
    ) -> dict[str, torch.Tensor]:
        """The importance that :meth:`update` would go by: masks lifted, nothing locked or changed.

        Arguments and errors as there; float32 by parameter name, of the parameter's shape.
        """
        self._check_still_the_models()
        with self._masks_lifted():
            return measure(
                self._model,
                self._locks.parameters,
                loader,
                n_batches=n_batches,
                importance=self.settings["importance"],
            )

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
        if held.isdisjoint(id(p) for p in self._locks.parameters.values()):
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

    def restore(self) -> None:
        """Put every locked entry back to the value it was locked with."""
        self._locks.restore()

    def verify(self) -> int:
        """Count the locked entries that are not bit for bit what they were locked with: 0.

        Raises:
            LockedEntriesMoved: some moved; the message says how many, and where.
        """
        self._check_still_the_models()
        moved = self._locks.moved()
        if moved:
            where = ", ".join(f"{name} ({number:,})" for name, number in moved.items())
            raise LockedEntriesMoved(
                f"{sum(moved.values()):,} of {self._locks.count:,} locked entries moved: {where}. "
                "Call attach(optimizer) before training, or restore() to put them back"
            )
        return 0

    def _check_still_the_models(self) -> None:
        """A replaced parameter would be guarded no more, and nothing would tell."""
        present = {id(p) for p in self._model.parameters()}
        gone = [name for name, p in self._locks.parameters.items() if id(p) not in present]
        if gone:
            raise RuntimeError(
                f"the model no longer holds {', '.join(gone[:3])}{' ...' if gone[3:] else ''}: a "
                "module was replaced after the stack was made. Exclude heads that are swapped "
                "(exclude=[...]), or save the stack and load it onto the model as it is now"
            )

    def _add_gradient_hooks(self) -> None:
        for name in self._locks.names:
            parameter = self._locks.parameters[name]
            if name not in self.handles and parameter.requires_grad:
                self.handles[name] = parameter.register_hook(self._zero_locked(name))

    def _zero_locked(self, name: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            if self._lifted:
                return None
            self.hook_calls[name] = self.hook_calls.get(name, 0) + 1
            # Not a product with the mask: inf * 0 is NaN.
            return gradient.masked_fill(self._locks.mask(name), 0)

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
        return Masks(self._locks.parameters, self._locks.mask)

    def stats(self) -> dict[str, float]:
        """Locked, total and eligible entries; locked in percent of all and of the eligible."""
        locked, total = self._locks.count, eligible.parameter_count(self._model)
        return {
            "locked": locked,
            "total": total,
            "eligible": self._locks.eligible,
            "locked_pct": 100 * locked / total,
            "frozen_pct": 100 * locked / self._locks.eligible,
        }

    def layer_table(self) -> pandas.DataFrame:
        """One row per layer, module and task.

        Columns: layer (<NA> outside the blocks), module, task (from 1), eligible, selected (chosen
        by the task), added (of those, not locked before), locked (after the task), lock_fraction
        (locked over eligible, 0 to 1).
        """
        return self._locks.layer_table()

    # Keeping it ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, parameter shapes and dtypes, packed masks, locked values, locks per task."""
        return {"settings": dict(self.settings), **self._locks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks and put the locked values they come with into the model.

        Without values (``save(path, values=False)``) the model's present ones are locked.

        Raises:
            storage.MaskFileError: the state does not match the model; every mismatch is named
                and nothing has changed.
        """
        self._locks.load_state_dict(state)
        self.settings = dict(state["settings"])
        self._add_gradient_hooks()

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
