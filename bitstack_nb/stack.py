"""BitStack, the published method: after each task, lock the weights that mattered for it.

``update`` measures importance on a task's data, and adds the most important weights to a mask of
one bit per weight. From then on a locked weight gets no gradient. After each step of an attached
optimizer it gets back, bit for bit, the value it was locked with (``guard``).

The model is any ``torch.nn.Module`` whose forward gives ``.loss``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitstack_nb import eligible, maskfile, ranks
from bitstack_nb.files import KeptInFiles
from bitstack_nb.guard import Guard, OptimizerHooks, active_guards
from bitstack_nb.importance import choose, measure
from bitstack_nb.locks import Locks, Masks
from bitstack_nb.settings import check_settings

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class BitStack(KeptInFiles):
    """Locks the weights of a model that matter for its tasks, in one mask for all tasks.

    A parameter is eligible from the first time that it is trainable: when the stack is made, or in
    an ``update``. A layer thawed later joins at the next ``update``. A layer frozen later stays
    eligible, and keeps its locks; no weight of it is locked while it is frozen.

    Under ``torchrun`` every rank makes a stack, and all ranks call ``update``, ``measure`` and
    ``lock`` together. Importance is summed over the ranks, so they lock the same weights.

    Args:
        model: the model to protect, also in a wrapper (of PEFT too); masks follow it to another
            device.
        sparsity: share of the eligible weights that one task may lock, 0 to 1.
        exclude: strings; parameters with one of them in their name are never locked. ``None``
            excludes heads, embeddings and the final norm (``eligible`` has the rules).
        budget: with ``"union"`` a task may choose locked weights again, so tasks overlap (the
            published text). With ``"fresh"`` it chooses free weights only (the published code).
        importance: a sum over batches: of the gradient's absolute value (``"gradient"``), of
            |gradient times weight| (``"gradient-weight"``) or of the gradient's square
            (``"fisher"``).

    Raises:
        ValueError: a setting is out of range, the model has no eligible weights, or its parameters
            are shards (FSDP, DeepSpeed ZeRO) or offloaded.
        TypeError: the model is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.12,
        exclude: Sequence[str] | None = None,
        *,
        budget: str = "union",
        importance: str = "gradient",
    ) -> None:
        check_settings(sparsity, exclude, budget=budget, importance=importance)
        self.settings = {
            "sparsity": float(sparsity),
            "exclude": None if exclude is None else list(exclude),
            "budget": budget,
            "importance": importance,
        }
        self._model = eligible.unwrap(model)
        if exclude is None:
            eligible.warn_of_head(self._model)
        self._locks = Locks(eligible.eligible_parameters(self._model, self.settings["exclude"]))
        if not self._locks.eligible:
            raise ValueError(
                f"{type(self._model).__name__} has no eligible weights: every parameter is "
                f"excluded, frozen or empty (exclude is {self.settings['exclude']!r})"
            )
        if others := active_guards(self._model):
            logger.warning(
                "this model has another BitStack, which keeps %s weights locked: it goes on doing "
                "so beside the new one. If it is of no use any more, as after a notebook cell was "
                "run again, detach(others=True) takes it off the model",
                " and ".join(f"{guard.locked:,}" for guard in others),
            )
        self._guard = Guard(self._model, self._locks)

    # The method ---------------------------------------------------------------------------------

    def update(
        self,
        loader: Iterable[Mapping[str, Any]],
        n_batches: int = 32,
        *,
        training: bool = False,
        observe: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
    ) -> dict[str, float]:
        """Measure importance on a task's batches, and lock the weights that matter most.

        Args:
            loader: batches as in training, each a mapping with ``labels``, for example
                ``trainer.get_train_dataloader()``. Keys that the model's forward does not take,
                by name or through ``**kwargs``, are dropped.
            n_batches: how many batches to use at most.
            training: measure in training mode (dropout on), as the published code does.
            observe: a function that gets the importance (float32 by parameter name) before
                anything is locked (:class:`bitstack_nb.benchmark.curves.CurveRecorder`).

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError, TypeError: see :func:`bitstack_nb.importance.measure`. Nothing has changed.
        """
        scores = self.measure(loader, n_batches, training=training)
        if observe is not None:
            observe(scores)
        taken = self.masks if self.settings["budget"] == "fresh" else None
        k = round(self.settings["sparsity"] * self._locks.eligible)
        return self.lock(choose(scores, k, without=taken))

    def measure(
        self, loader: Iterable[Mapping[str, Any]], n_batches: int = 32, *, training: bool = False
    ) -> dict[str, torch.Tensor]:
        """Importance of each weight, locked or not, as :meth:`update` measures it; locks nothing.

        It is float32 by parameter name, in the parameter's shape. Errors are those of ``update``.
        """
        self._guard.check_parameters_present()
        self._locks.include(eligible.eligible_parameters(self._model, self.settings["exclude"]))
        with self._guard.lifted():
            return measure(
                self._model,
                self._locks.parameters,
                loader,
                n_batches=n_batches,
                importance=self.settings["importance"],
                training=training,
            )

    def lock(self, chosen: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Lock the weights of these masks as one task's; :meth:`update` passes the top k.

        Args:
            chosen: a bool mask of the parameter's shape and on its device for every name in
                :attr:`masks`.

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError: the masks are not those of the eligible parameters.
        """
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

    # The guarantee ------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> OptimizerHooks:
        """Hook an optimizer: after each step its locked weights get their values back.

        It also adds missing gradient hooks. A second call for an optimizer changes nothing.

        Returns:
            A handle whose ``remove()`` undoes it for this optimizer alone.

        Raises:
            ValueError: the optimizer holds no parameter of the stack's model.
            TypeError: ``optimizer`` is no torch optimizer.
        """
        return self._guard.attach(optimizer)

    def detach(self, *, others: bool = False) -> None:
        """Remove every gradient and optimizer hook. Masks stay, and :meth:`attach` resumes.

        Args:
            others: also the hooks of all other stacks on the model. This reaches a stack whose
                variable was overwritten.
        """
        self._guard.detach()
        for guard in active_guards(self._model) if others else ():
            guard.detach()

    def callback(self) -> TrainerCallback:
        """A callback for ``Trainer``: attaches its optimizer, and verifies after training."""
        from bitstack_nb.trainer import GuardCallback

        return GuardCallback(self._guard)

    def restore(self) -> None:
        """Put every locked weight back to the value it was locked with."""
        self._guard.check_parameters_present()
        self._locks.restore()

    def verify(self) -> int:
        """Check that every locked weight has, bit for bit, the value it was locked with.

        Returns:
            0, the number of locked weights that moved.

        Raises:
            LockedWeightsMoved: some moved; the message says how many, and where.
        """
        self._guard.verify()
        return 0

    @property
    def handles(self) -> dict[str, RemovableHandle]:
        """One gradient hook per parameter with locked weights, by name."""
        return self._guard.handles

    @property
    def hook_calls(self) -> dict[str, int]:
        """How often each gradient hook was called."""
        return self._guard.hook_calls

    # Masks and tables ----------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """Masks by parameter name: bool, in the parameter's shape, True where locked."""
        return Masks(self._locks.parameters, self._locks.mask)

    def stats(self) -> dict[str, float]:
        """Numbers of weights; ``locked_pct`` is of all weights, ``frozen_pct`` of the eligible."""
        locked, total = self._locks.count, eligible.parameter_count(self._model)
        return {
            "locked": locked,
            "total": total,
            "eligible": self._locks.eligible,
            "locked_pct": 100 * locked / total,
            "frozen_pct": 100 * locked / self._locks.eligible,
        }

    def layer_table(self) -> pandas.DataFrame:
        """Numbers of weights, one row per layer, module and task.

        Columns: layer (<NA> outside the blocks), module (its path in the layer, behind the path of
        the stack of blocks where the model has several), task (from 1), eligible, selected (chosen
        by the task), added (chosen and not locked before), locked (after the task), lock_fraction
        (locked over eligible, 0 to 1).
        """
        return self._locks.layer_table()

    # Files --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, parameter shapes and dtypes, packed masks, locked values, locks per task."""
        return {"settings": dict(self.settings), **self._locks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the masks by those of a state, and put its locked values into the model.

        If it has no values (``save(path, values=False)``), the model's present values are locked.

        Raises:
            maskfile.MaskFileError: the state does not match the model. The message names every
                mismatch, and nothing has changed.
        """
        self._locks.load_state_dict(state)
        self.settings.update(state["settings"])
        self._guard.add_gradient_hooks()

    def save(self, path: str | os.PathLike[str], *, values: bool = True) -> None:
        """Write masks (one bit per eligible weight) and locked values to a safetensors file.

        ``values=False`` leaves out the values, for a file that is kept beside the model's weights.
        """
        maskfile.write(path, self.state_dict(), values=values)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> BitStack:
        """Make a stack for ``model`` from a file, and put the locked values into the model.

        The model may be frozen, as for inference.

        Raises:
            FileNotFoundError: there is no such file.
            maskfile.MaskFileError: the file is damaged, not a mask file or of another model. The
                model is untouched.
            TypeError: the model is no module.
        """
        whole, state = eligible.unwrap(model), maskfile.read(path)
        try:
            with eligible.trainable(whole, state["parameters"]):
                stack = cls(model, **state["settings"])
        except (TypeError, ValueError) as error:
            raise maskfile.MaskFileError(f"{path} does not fit this model: {error}") from error
        stack.load_state_dict(state)
        return stack
