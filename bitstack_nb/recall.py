"""Exact recall, our extension: each task trains weights of its own on one base.

Every task starts from the base and moves its own weights and the head only, so that the model of
any task can be put together again bit for bit. ``owners`` keeps the books; here is the order of
things (begin, close, switch) and its errors.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitstack_nb import eligible, maskfile, ranks
from bitstack_nb.fitting import (
    HEAD_LEARNING_RATE,
    HEAD_STEPS,
    check_fitting,
    first_batches,
    fit_heads,
    put_back_on_error,
)
from bitstack_nb.guard import Guard
from bitstack_nb.importance import check_batches, choose, measure, random_scores
from bitstack_nb.locks import Masks
from bitstack_nb.owners import Owners
from bitstack_nb.settings import IMPORTANCES, RANDOM, check_settings

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class ExactRecall:
    """Tasks with weights of their own over one base, each recalled bit for bit.

    Under ``torchrun`` every rank makes one and calls ``begin`` and ``measure`` with the others.

    Args:
        model: the base of every task's model, in any wrapper.
        sparsity: share of the eligible weights that one task owns, 0 to 1.
        exclude: strings; parameters with one of them in their name are never owned. ``None``
            leaves out embeddings and the final norm, found from the model; heads always are.
        importance: ``"random"`` gives a task random weights; ``"gradient"``,
            ``"gradient-weight"`` and ``"fisher"`` those that matter most, as in ``BitStack``.

    Raises:
        ValueError: a setting is out of range, the model has no eligible weights, no head, or
            shards for parameters (FSDP, DeepSpeed ZeRO).
        TypeError: the model is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.01,
        exclude: Sequence[str] | None = None,
        *,
        importance: str = RANDOM,
    ) -> None:
        check_settings(sparsity, exclude, importance=importance, importances=(*IMPORTANCES, RANDOM))
        self.settings = {
            "sparsity": float(sparsity),
            "exclude": None if exclude is None else list(exclude),
            "importance": importance,
        }
        self._model = eligible.unwrap(model)
        eligible.trainable_heads(self._model)  # or an error now
        own, fixed = eligible.recall_parameters(self._model, self.settings["exclude"])
        self._owners = Owners(own, fixed, partial(eligible.backbone_buffers, self._model))
        if not self._owners.eligible:
            raise ValueError(
                f"{type(self._model).__name__} has no eligible weights: every parameter is "
                f"excluded, frozen or empty (exclude is {self.settings['exclude']!r})"
            )
        self._guard = Guard(self._model, self._owners)
        self._names: list[str] = []  # the open task's too
        self._running = 0

    # Tasks --------------------------------------------------------------------------------------

    def begin(
        self,
        name: str,
        labels: Sequence[str] | None = None,
        *,
        loader: Iterable[Mapping[str, Any]] | None = None,
        n_batches: int = 32,
        head_steps: int = HEAD_STEPS,
        head_learning_rate: float = HEAD_LEARNING_RATE,
    ) -> dict[str, float]:
        """Open a task: put the base back and give the task weights of its own.

        They are chosen among those that no task owns. Until :meth:`close` only they and the head
        move.

        Args:
            name: of the task.
            labels: None, so far: the task takes the head that is in the model.
            loader: batches to fit the head on and to measure importance on, as for
                ``BitStack.update``. None leaves the head as it is, and is for importance
                ``"random"`` alone.
            n_batches: how many importance is measured on; fewer are fine.
            head_steps: Adam steps on the head, a batch each, from the first on again when they
                are used up; 0 leaves the head as it is.
            head_learning_rate: of these steps.

        Returns:
            The new :meth:`stats`.

        Raises:
            ValueError, TypeError: the name is taken, too few weights are left (the message says
                how many tasks fitted), or as in ``BitStack.update``. Nothing has changed.
            RuntimeError: a task is open already.
            maskfile.MaskFileError: the base of a loaded file has moved since.
        """
        owners = self._owners
        with ranks.agreed():
            self._check_not_running("begin")
            self._check_new(name, labels)
            check_fitting(head_steps, head_learning_rate)
            self._guard.check_still_the_models()
            budget = self._next_budget()
            heads = eligible.trainable_heads(self._model)
            batches: list[Mapping[str, Any]] = []
            if loader is not None or self.settings["importance"] != RANDOM:
                check_batches(loader, n_batches)
                batches = first_batches(loader, max(n_batches, head_steps), heads[0].device)
        owners.keep_base()
        with put_back_on_error(heads), owners.shown_as_before_on_error():
            owners.show(None)
            owners.restore()
            ranks.check_same(owners.held, "weights of the base")
            if batches:
                fit_heads(
                    self._model, heads, batches, steps=head_steps, learning_rate=head_learning_rate
                )
            scores = self._scores(batches, n_batches)
            chosen = choose(scores, budget, without=self.masks, ties=False)
            ranks.check_same(chosen, "weights to train")
            owners.open(chosen)
            self._names = [*self._names[: owners.closed], name]
        self._guard.add_gradient_hooks()
        logger.info("task %s may train %d weights", name, budget)
        return self.stats()

    def close(self) -> dict[str, float]:
        """Close the open task: its own weights and their values are final then.

        Returns:
            The new :meth:`stats`.

        Raises:
            RuntimeError, LockedWeightsMoved: no task is open; something else moved in it.
        """
        self._check_not_running("close")
        if not self._owners.is_open:
            raise RuntimeError("no task is open: begin(name), train, then close()")
        self._owners.show(self._owners.closed)  # two interrupts may have left another shown
        self._guard.verify()
        self._owners.close()
        logger.info("task %s is closed", self._names[-1])
        return self.stats()

    def switch(self, name: str | None) -> None:
        """Turn the model into that of a closed task, or with None into the base, until told else.

        Values are exchanged in place, for every user of the model. The head is not exchanged: put
        the task's into the model as well. Only what tasks own is exchanged: what was moved by hand,
        or by an optimizer that is not attached, stays moved (:meth:`verify` tells).

        Raises:
            ValueError: there is no such task.
        """
        number = None if name is None else self._number(name)
        self._guard.check_still_the_models()
        self._owners.show(number)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Within the ``with`` block the model is, bit for bit, a task's, as after :meth:`switch`.

        Blocks may be nested; leaving one, by an exception too, brings back exactly what was there.
        """
        before = self._owners.shown
        self._running += 1
        try:
            self.switch(name)
            yield self._model
        finally:
            self._running -= 1
            try:
                self._owners.show(before)
            except KeyboardInterrupt:  # or an open task would be left for good, and train no more
                self._owners.show(before)
                raise

    def export(self, name: str | None) -> nn.Module:
        """A copy of a task's model, with the head that is in it now, without hooks."""
        with self.using(name) as model:
            exported = copy.deepcopy(model)
        if "_original_forward" in vars(exported) and "_hf_hook" not in vars(exported):
            # The autocast wrapper that a Trainer leaves behind would run the model copied from.
            del exported.forward, exported._original_forward
        return exported

    @property
    def names(self) -> tuple[str, ...]:
        """The closed tasks, in the order of :meth:`begin`."""
        return tuple(self._names[: self._owners.closed])

    def measure(
        self, loader: Iterable[Mapping[str, Any]], n_batches: int = 32
    ) -> dict[str, torch.Tensor]:
        """The importance that :meth:`begin` would go by, of the model as it stands."""
        self._guard.check_still_the_models()
        return self._scores(loader, n_batches)

    # The guarantee ------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep all but the open task's weights and the head exact through this optimizer's steps.

        Raises:
            ValueError: the optimizer holds none of the model's parameters.
            TypeError: it is no optimizer.
            maskfile.MaskFileError: the base of a loaded file has moved since.
        """
        self._owners.keep_base()  # to put back from; what was loaded has none
        return self._guard.attach(optimizer)

    def detach(self) -> None:
        """Remove every gradient and optimizer hook; :meth:`attach` resumes."""
        self._guard.detach()

    def callback(self) -> TrainerCallback:
        """The same guarantee for the transformers ``Trainer``: ``Trainer(callbacks=[...])``."""
        from bitstack_nb.trainer import GuardCallback

        return GuardCallback(self)

    def restore(self) -> None:
        """Put back everything but the open task's weights and the head."""
        self._guard.check_still_the_models()
        self._owners.restore()

    def verify(self) -> int:
        """Count the weights that may not move and are not bit for bit what they must be: 0.

        What was loaded compares the present task's own weights only, until ``attach`` or ``begin``
        copies the base.

        Raises:
            LockedWeightsMoved: some moved; the message says how many, and where.
        """
        self._guard.verify()
        return 0

    @property
    def handles(self) -> dict[str, RemovableHandle]:
        """One gradient hook per parameter with weights that may not move, by name."""
        return self._guard.handles

    @property
    def hook_calls(self) -> dict[str, int]:
        """How often each gradient hook was called."""
        return self._guard.hook_calls

    # Who owns what ------------------------------------------------------------------------------

    def mask(self, name: str) -> Mapping[str, torch.Tensor]:
        """A task's own weights: parameter name -> bool tensor of its shape, unpacked on look-up."""
        number = self._number(name)
        return Masks(self._owners.parameters, partial(self._owners.own_mask, number))

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """The weights that any task owns, the open one too, as :meth:`mask` gives them."""
        return Masks(self._owners.parameters, self._owners.mask)

    def stats(self) -> dict[str, float]:
        """Owned, total and eligible weights; owned in percent of all and of the eligible."""
        owned, total = self._owners.count, eligible.parameter_count(self._model)
        return {
            "locked": owned,
            "total": total,
            "eligible": self._owners.eligible,
            "locked_pct": 100 * owned / total,
            "frozen_pct": 100 * owned / self._owners.eligible,
        }

    def layer_table(self) -> pandas.DataFrame:
        """One row per layer, module and task; columns as in ``BitStack.layer_table``."""
        return self._owners.layer_table()

    # Files --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, names, parameter shapes and dtypes, packed owners, values, the base's digests.

        Raises:
            RuntimeError: a task is open.
        """
        state = self._owners.state_dict()
        return {"settings": dict(self.settings), "names": list(self.names), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over tasks; the model must hold the base, and is the last task's afterwards.

        Raises:
            maskfile.MaskFileError: the state does not match the model; every mismatch is named
                and nothing has changed.
            RuntimeError: a task is open.
        """
        self._check_not_running("load_state_dict")
        self._owners.load_state_dict(state)
        self._names = list(state["names"])
        self.settings.update(state["settings"])
        self._guard.add_gradient_hooks()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tasks as safetensors; heads are not in it."""
        maskfile.write(path, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], base_model: nn.Module) -> ExactRecall:
        """The tasks saved at ``path``, on their base, which is the last task's model afterwards.

        The model may be frozen, as for inference.

        Raises:
            FileNotFoundError: there is no such file.
            maskfile.MaskFileError: it is damaged, foreign or of another base; the model is
                untouched.
            TypeError: the model is no module.
        """
        whole, state = eligible.unwrap(base_model), maskfile.read(path, recall=True)
        try:
            names = {*state["parameters"], *eligible.head_parameters(whole)}
            with eligible.trainable(whole, names):
                tasks = cls(base_model, **state["settings"])
        except (TypeError, ValueError) as error:
            raise maskfile.MaskFileError(f"{path} does not fit this model: {error}") from error
        tasks.load_state_dict(state)
        tasks._owners.release_base()  # attach and begin make another
        return tasks

    # Errors and choices -------------------------------------------------------------------------

    def _scores(
        self, loader: Iterable[Mapping[str, Any]], n_batches: int
    ) -> dict[str, torch.Tensor]:
        parameters, how = self._owners.parameters, self.settings["importance"]
        if how == RANDOM:
            frozen = {n: torch.zeros_like(p) for n, p in parameters.items() if not p.requires_grad}
            random = random_scores({n: p for n, p in parameters.items() if n not in frozen}, seed=0)
            return {name: (random | frozen)[name].float() for name in parameters}
        with self._guard.lifted():
            return measure(self._model, parameters, loader, n_batches=n_batches, importance=how)

    def _number(self, name: str) -> int:
        known = self._names[: self._owners.closed + self._owners.is_open]
        if name not in known:
            raise ValueError(f"task is {name!r}, expected None or one of {', '.join(known)}")
        return known.index(name)

    def _check_new(self, name: str, labels: Sequence[str] | None) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}, expected the task's name, a string")
        if name in self.names:
            raise ValueError(f"there is a task {name!r} already: choose another name")
        if labels is not None:
            raise NotImplementedError("labels: the task takes the head that is in the model")

    def _check_not_running(self, method: str) -> None:
        """Raise a RuntimeError in a ``using`` block: leaving it has to find what it left."""
        if self._running:
            raise RuntimeError(f"{method}() within a using(...) block: leave the block first")

    def _next_budget(self) -> int:
        """Weights for the next task."""
        owners, done, sparsity = self._owners, self._owners.closed, self.settings["sparsity"]
        if owners.is_open:
            raise RuntimeError(f"task {self._names[done]!r} is still open: close() it first")
        budget, left = round(sparsity * owners.eligible), owners.eligible - owners.count
        # Rounding may leave the last of the tasks that fit a few weights short.
        if budget > left and (done + 1) * sparsity > 1 + 1e-9:
            raise ValueError(
                f"{done} task{'s' if done != 1 else ''} fitted, and no further one: at sparsity "
                f"{sparsity:g} it takes {budget:,} of {owners.eligible:,} eligible weights, "
                f"and {left:,} are left. A smaller sparsity makes room for more tasks"
            )
        return min(budget, left)
