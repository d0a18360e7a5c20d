"""BitStack: after each task, lock the parameters that mattered for it, one bit per entry.

Mode ``protect``, the published method: ``update`` measures importance on a task's data and ORs the
top entries into a cumulative mask. From then on two things hold for every locked entry: its
gradient is zero, and after each step of an attached optimizer it has bit for bit the value it was
locked with (``guard``). Masks are held packed and unpacked one parameter at a time (``locks``).

Mode ``recall``, our extension: ``begin`` gives a task entries of its own, chosen on the base;
nothing else of the backbone moves until ``update``, and ``recall`` shows any task's model again
(``recall``, the module).

Works on any ``torch.nn.Module`` whose forward gives ``.loss``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitstack_nb import eligible, ranks, select
from bitstack_nb import maskfile as storage
from bitstack_nb.fitting import HEAD_LEARNING_RATE, HEAD_STEPS
from bitstack_nb.guard import Guard, LockedEntriesMoved
from bitstack_nb.importance import measure
from bitstack_nb.locks import Locks, Masks
from bitstack_nb.owners import Owners
from bitstack_nb.recall import Recall, make_owners
from bitstack_nb.settings import BUDGETS, MODES, check_settings

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

__all__ = ["BUDGETS", "MODES", "BitStack", "LockedEntriesMoved", "check_settings"]

logger = logging.getLogger(__name__)


class BitStack:
    """Cumulative 1-bit masks of the parameters that mattered, and the guarantee that they stay.

    Under ``torchrun`` every rank makes a stack and calls ``update``, ``measure``, ``lock`` and
    ``begin`` with the others: importance is summed over their batches, and they lock the same.

    Args:
        model: the model to protect, in any wrapper; masks follow it to another device.
        sparsity: share of the eligible entries that one task may lock, 0 to 1.
        exclude: strings; parameters with one of them in their name are never locked. ``None``
            leaves out heads, embeddings and the final norm, found from the model.
        mode: ``"protect"``, the published method, or ``"recall"``, in which the model as given is
            the base of every task's.
        budget: ``"union"`` measures importance with the masks lifted, so that tasks overlap;
            ``"fresh"`` behind the masks, so that each task locks new entries (the published
            text and the published code, in that order). Of mode ``"protect"`` only.
        importance: what is summed over batches: ``"gradient"``, its absolute value;
            ``"gradient-weight"``, that of its product with the weight; ``"fisher"``, its square. Of
            mode ``"recall"`` also ``"random"``: drawn, so that every task gets entries alike.

    Raises:
        ValueError: a setting is out of range, the model has no eligible entries, no head (mode
            ``"recall"``), or shards for parameters (FSDP, DeepSpeed ZeRO).
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
        _check_module(model)
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
        self._locks: Locks | Owners = (
            make_owners(self._model, self.settings["exclude"])
            if mode == "recall"
            else Locks(eligible.eligible_parameters(self._model, self.settings["exclude"]))
        )
        if not self._locks.eligible:
            raise ValueError(
                f"{type(self._model).__name__} has no eligible entries: every parameter is "
                f"excluded, frozen or empty (exclude is {self.settings['exclude']!r})"
            )
        self._guard = Guard(self._model, self._locks)
        self._recall = (
            Recall(self._model, self._locks, guard=self._guard, settings=self.settings)
            if mode == "recall"
            else None
        )

    # The method ---------------------------------------------------------------------------------

    def update(
        self,
        loader: Iterable[Mapping[str, Any]] | None = None,
        n_batches: int = 32,
        *,
        observe: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
    ) -> dict[str, float]:
        """Lock the entries that matter most for the task that ``loader`` gives batches of.

        In mode ``"recall"`` without arguments: close the task, whose entries are final then.

        Args:
            loader: batches, each a mapping with ``labels``; keys that the model's forward does
                not take are dropped.
            n_batches: how many to use; fewer are fine.
            observe: called with the importance, float32 by parameter name, before anything is
                locked (:class:`bitstack_nb.benchmark.curves.CurveRecorder`).

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError, TypeError: see :func:`bitstack_nb.importance.measure`. Nothing has changed.
            RuntimeError, LockedEntriesMoved: no task is open; something else moved in it.
        """
        if self._recall is not None:
            self._recall.close(loader)
            return self.stats()
        scores = self.measure(loader, n_batches)
        if observe is not None:
            observe(scores)
        if self.settings["budget"] == "fresh":
            for name in self._locks.names:
                scores[name].masked_fill_(self._locks.mask(name), 0)
        budget = round(self.settings["sparsity"] * self._locks.eligible)
        return self.lock(select.top_masks(scores, budget))

    def lock(self, chosen: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Lock these entries as a task's, however they were chosen; mode ``"protect"`` only.

        Args:
            chosen: a bool mask of the parameter's shape and on its device for every name in
                :attr:`masks`.

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError: the masks are not those of the eligible parameters.
            RuntimeError: the mode is another.
        """
        if self._recall is not None:
            raise RuntimeError(
                'lock() needs a stack of mode "protect": in "recall" begin() chooses'
            )
        shapes = {name: (m.dtype, m.shape) for name, m in chosen.items()}
        expected = {name: (torch.bool, p.shape) for name, p in self._locks.parameters.items()}
        if shapes != expected:
            names = sorted(n for n in shapes | expected if shapes.get(n) != expected.get(n))
            raise ValueError(
                f"chosen does not fit in {', '.join(names[:3])}{' ...' if names[3:] else ''}: "
                "expected a bool mask of the parameter's shape for every name in masks"
            )
        ranks.check_same(chosen, "masks to lock")
        self._locks.add(chosen)
        self._guard.add_gradient_hooks()
        logger.info("locked %s", stats := self.stats())
        return stats

    def measure(
        self, loader: Iterable[Mapping[str, Any]], n_batches: int = 32
    ) -> dict[str, torch.Tensor]:
        """The importance that :meth:`update` would go by: masks lifted, nothing locked or changed.

        Arguments and errors as there; float32 by parameter name, of the parameter's shape.
        """
        self._guard.check_still_the_models()
        with self._guard.lifted():
            model, parameters = self._model, self._locks.parameters
            how = self.settings["importance"]
            return measure(model, parameters, loader, n_batches=n_batches, importance=how)

    # Exact recall -------------------------------------------------------------------------------

    def begin(
        self,
        loader: Iterable[Mapping[str, Any]],
        n_batches: int = 32,
        *,
        head_steps: int = HEAD_STEPS,
        head_learning_rate: float = HEAD_LEARNING_RATE,
    ) -> dict[str, float]:
        """Open the next task: give it the ``sparsity`` of all entries that matter most for it.

        The backbone is put back to the base, the head in the model is fitted on it, and the
        entries are chosen among those that no task owns. Until :meth:`update` only they and the
        head move.

        Args:
            loader: the task's batches, as for :meth:`update`.
            n_batches: how many importance is measured on, if it is measured; fewer are fine.
            head_steps: Adam steps on the head, a batch each, from the first on again when they
                are used up; 0 leaves the head as it is.
            head_learning_rate: of these steps.

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError, TypeError: too few entries are left (the message says how many tasks
                fitted), or as in :meth:`update`. Nothing has changed.
            RuntimeError: a task is open already.
            storage.MaskFileError: the base of a loaded stack has moved since.
        """
        self._in_recall_mode("begin()").begin(
            loader, n_batches, head_steps=head_steps, head_learning_rate=head_learning_rate
        )
        return self.stats()

    def recall(self, task: int | None) -> AbstractContextManager[nn.Module]:
        """Within the ``with`` block the model is, bit for bit, that of a closed task.

        Values are exchanged in place, for every user of the model. Blocks may be nested; leaving
        one, by an exception too, brings back exactly what was there. Only what tasks own is
        exchanged: what was moved by hand, or by an optimizer that is not attached, stays moved
        (:meth:`verify` tells).

        Args:
            task: counted from 0, in the order of :meth:`begin`; None for the base. Its head is
                not the stack's: put it into the model as well.

        Raises:
            ValueError: there is no such task.
        """
        return self._in_recall_mode("recall()").recall(task)

    def export(self, task: int | None) -> nn.Module:
        """A copy of a task's model, with the head that is in it now, that knows of no stack."""
        return self._in_recall_mode("export()").export(task)

    def _in_recall_mode(self, method: str) -> Recall:
        if self._recall is None:
            raise RuntimeError(
                f'{method} needs a stack of mode "recall", and this one has mode "protect"'
            )
        return self._recall

    # The guarantee ------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep what may not move exact through every step of this optimizer; once is enough.

        Returns:
            A handle whose ``remove()`` undoes it for this optimizer alone.

        Raises:
            ValueError: the optimizer holds none of the stack's parameters.
            TypeError: it is no optimizer.
            storage.MaskFileError: the base of a loaded stack has moved since.
        """
        if self._recall is not None:
            self._locks.keep_base()  # to put back from; a loaded stack has none
        return self._guard.attach(optimizer)

    def detach(self) -> None:
        """Remove every gradient and optimizer hook. Masks stay, and :meth:`attach` resumes."""
        self._guard.detach()

    def callback(self) -> TrainerCallback:
        """The same guarantee for the transformers ``Trainer``: ``Trainer(callbacks=[...])``."""
        from bitstack_nb.trainer import BitStackCallback

        return BitStackCallback(self)

    def restore(self) -> None:
        """Put back what may not move: every locked entry; all but the open task's entries."""
        self._guard.check_still_the_models()
        self._locks.restore()

    def verify(self) -> int:
        """Count the entries that may not move and are not bit for bit what they must be: 0.

        In mode ``"recall"`` these are all but the open task's and the heads'. (A loaded stack
        compares the present task's own entries only, until ``attach`` or ``begin`` copies the
        base.)

        Raises:
            LockedEntriesMoved: some moved; the message says how many, and where.
        """
        self._guard.verify()
        return 0

    @property
    def handles(self) -> dict[str, RemovableHandle]:
        """One gradient hook per parameter with entries that may not move, by name."""
        return self._guard.handles

    @property
    def hook_calls(self) -> dict[str, int]:
        """How often each gradient hook was called."""
        return self._guard.hook_calls

    # What is locked -----------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """Name -> bool tensor of the parameter's shape, True where locked; unpacked on look-up.

        In mode ``"recall"`` locked is what any task owns, the open one too.
        """
        return Masks(self._locks.parameters, self._locks.mask)

    @property
    def owners(self) -> Mapping[str, torch.Tensor]:
        """Name -> int32 tensor of the parameter's shape: 0 of nobody, t + 1 of task t.

        Of mode ``"recall"``; unpacked on look-up. The tasks' values are in :meth:`recall`.
        """
        self._in_recall_mode("owners")
        return Masks(self._locks.parameters, self._locks.numbers)

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
        """Settings, parameter shapes and dtypes, packed masks, locked values, locks per task.

        In mode ``"recall"`` packed owners, the tasks' values, and digests of the base.

        Raises:
            RuntimeError: a task is open.
        """
        return {"settings": dict(self.settings), **self._locks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks and put the locked values they come with into the model.

        Without values (``save(path, values=False)``) the model's present ones are locked. In mode
        ``"recall"`` the model must hold the base, and stands as the last task's afterwards.

        Raises:
            storage.MaskFileError: the state does not match the model; every mismatch is named
                and nothing has changed.
            RuntimeError: a task is open.
        """
        if self._recall is not None:
            self._recall.check_not_running("load_state_dict")
        modes = [each.get("mode") for each in (state["settings"], self.settings)]
        if modes[0] != modes[1]:
            raise storage.MaskFileError(
                f"the state is of mode {modes[0]!r}, the stack {modes[1]!r}"
            )
        self._locks.load_state_dict(state)
        self.settings.update(state["settings"])
        self._guard.add_gradient_hooks()

    def save(self, path: str | os.PathLike[str], *, values: bool = True) -> None:
        """Write the stack as safetensors, one bit per eligible entry, or in mode ``"recall"`` at
        most ceil(log2(tasks + 1)), less where tasks own little.

        ``values=False`` leaves out the locked values, for keeping it beside the model's weights;
        a stack of mode ``"recall"`` has them nowhere else and refuses with a ValueError.
        """
        storage.write(path, self.state_dict(), values=values)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> BitStack:
        """The stack saved at ``path``, on ``model``; its locked values are put into the model.

        The model may be frozen, as for inference.

        Raises:
            FileNotFoundError: there is no such file.
            storage.MaskFileError: it is damaged, foreign or of another model; the model is
                untouched.
            TypeError: the model is no module.
        """
        _check_module(model)
        state = storage.read(path)
        try:
            whole, names = eligible.unwrap(model), {*state["parameters"]}
            if state["settings"]["mode"] == "recall":
                names.update(eligible.head_parameters(whole))
            with eligible.trainable(whole, names):
                stack = cls(model, **state["settings"])
        except (TypeError, ValueError) as error:
            raise storage.MaskFileError(f"{path} does not fit this model: {error}") from error
        stack.load_state_dict(state)
        if stack._recall is not None:
            stack._locks.release_base()  # attach and begin make another
        return stack


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, expected a torch.nn.Module")
