"""ExactRecall: each task trains its own weights on the base, and its model comes back bit for bit.

A task is a name, a head, label names and own weights: positions in the eligible parameters of one
base, and their values. Its model is the base with these values put in, whatever was trained before
or after. Tasks know nothing of each other, and their own weights may overlap.

``vector`` trains own weights, ``exchange`` puts a task into the model, ``taskfile`` is the file.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitstack_nb import eligible, ranks, taskfile
from bitstack_nb import head as heads
from bitstack_nb.base import Base
from bitstack_nb.exchange import Block, Exchange, check_alone
from bitstack_nb.files import KeptInFiles
from bitstack_nb.fitting import (
    HEAD_LEARNING_RATE,
    HEAD_STEPS,
    check_fitting,
    first_batches,
    fit_heads,
    put_back_on_error,
)
from bitstack_nb.guard import LockedWeightsMoved
from bitstack_nb.head import Head
from bitstack_nb.importance import check_batches, choose, measure, random_positions
from bitstack_nb.locks import layer_table
from bitstack_nb.maskfile import MaskFileError, check_match
from bitstack_nb.own import Layout, Own
from bitstack_nb.settings import IMPORTANCES, RANDOM, check_settings
from bitstack_nb.vector import Vector

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """A task has NaN or infinite weights after training."""


@dataclass
class Task:
    """One task, open or closed.

    Attributes:
        name: the task's.
        labels: the names of its labels; None where the head in the model was taken as it was.
        seed: of its random own weights and its new head.
        own: its own weights; the values of an open task are its vector.
        head: its modules, which stand in the model while the task is shown.
        digests: of the closed task's head, by tensor.
        kept: tensors on the CPU that were given to ``close``.
        notes: JSON-able, given to ``close``.
        digest: of all of this, as the closed task's file holds it.
    """

    name: str
    labels: list[str] | None
    seed: int
    own: Own
    head: Head
    digests: dict[str, str] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


class ExactRecall(KeptInFiles):
    """Many tasks on one model, each with a head and a small share of the weights of its own.

    The model as given is the base. While a task is open, its own weights and its head are all that
    trains: nothing else gets a gradient or is in the optimizer. Parameters that are frozen when it
    is made are never a task's own.

    Under ``torchrun`` every rank makes one and calls ``begin`` and ``close`` with the others; a
    model is wrapped in ``DistributedDataParallel`` after ``begin``.

    Args:
        model: any module whose forward gives ``.loss``, in any wrapper (of PEFT too).
        sparsity: share of the eligible weights that are one task's own, above 0, up to 1.
        exclude: strings; parameters with one of them in their name are never a task's own. ``None``
            leaves out embeddings and the final norm, found from the model. Heads always are.
        importance: ``"random"`` gives a task random weights; ``"gradient"``,
            ``"gradient-weight"`` and ``"fisher"`` those that matter most, as in ``BitStack``.

    Raises:
        ValueError: a setting is out of range, the share rounds to no weight, or the model has no
            eligible weights, no head, or parameters that are shards (FSDP, DeepSpeed ZeRO) or
            offloaded.
        TypeError: the model is no module.
        RuntimeError: another ExactRecall shows a task on this model.
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
        check_alone(self._model)
        eligible.trainable_heads(self._model)  # or an error now
        eligible.warn_of_head(self._model)
        own, fixed = eligible.recall_parameters(self._model, exclude)
        self._layout = Layout(own)
        self._budget = round(sparsity * self._layout.size)
        if not self._budget:
            raise ValueError(
                f"sparsity {sparsity:g} of the {self._layout.size:,} eligible weights of "
                f"{type(self._model).__name__} is no weight: take a larger share, or exclude less "
                f"(exclude is {self.settings['exclude']!r})"
            )
        self._total = eligible.parameter_count(self._model)
        self._parts = heads.part_names(self._model)
        self._base_head = heads.present(self._model, self._parts)
        self._base = Base(self._model, {**own, **fixed}, self._parts)
        self._exchange = Exchange(self._model, self._layout, self._base)
        self._tasks: dict[str, Task] = {}
        self._begun = 0  # tasks closed so far, those removed since too
        self._open: tuple[Task, Vector] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactRecall:
        if self._open:
            raise RuntimeError(f"{self._still_open()} Then copy")
        return super().__deepcopy__(memo)

    # One task after the other -------------------------------------------------------------------

    def begin(
        self,
        name: str,
        labels: Sequence[str] | None = None,
        *,
        loader: Iterable[Mapping[str, Any]] | None = None,
        n_batches: int = 32,
        head_steps: int = HEAD_STEPS,
        head_learning_rate: float = HEAD_LEARNING_RATE,
        seed: int | None = None,
    ) -> None:
        """Open a task: the base, a head, and own weights.

        Until :meth:`close` make optimizers from :meth:`parameters`, or give the Trainer
        :meth:`callback`.

        Args:
            name: of the task, a new one.
            labels: names of its labels: the task gets a new head for them. None takes the head that
                is in the model now, as it is.
            loader: batches as in training, each a mapping with ``labels``. With it the head is
                fitted on the base first; without it own weights can only be random.
            n_batches: how many importance is measured on, if it is measured; fewer are fine.
            head_steps: Adam steps on the head, a batch each, from the first on again when they are
                used up; 0 leaves the head as it is.
            head_learning_rate: of these steps.
            seed: of the random own weights and the new head; None takes the number of tasks closed
                so far.

        Raises:
            ValueError, TypeError: an argument is wrong, or as in ``BitStack.update``. Nothing has
                changed.
            RuntimeError: a task is open already, or a ``using`` block.
            LockedWeightsMoved: something moved the base.
        """
        with self._exchange.lock:
            with ranks.agreed():
                self._check_new(name, labels)
                check_fitting(head_steps, head_learning_rate)
                batches = self._batches(loader, n_batches, head_steps)
                self._check()
            self._warn_of_thawed()
            seed = self._begun if seed is None else seed
            ranks.check_equal({"name": name, "labels": labels, "seed": seed}, "tasks")
            ranks.check_equal(self._base.digests, "weights of the base")
            shown, head_before = self._exchange.shown, heads.present(self._model, self._parts)
            try:
                head = self._new_head(labels, head_before, seed=f"{seed}/{name}")
                self._exchange.show(None, None, head)
                head.set_trainable(True)
                trained = [p for _, p in head.named_parameters() if p.requires_grad]
                with put_back_on_error(trained):
                    steps, rate = head_steps if batches else 0, head_learning_rate
                    fit_heads(self._model, trained, batches, steps=steps, learning_rate=rate)
                    own = self._choose(batches, n_batches, seed=seed)
                    self._start(Task(name, labels and list(labels), seed, own, head))
            except BaseException:  # an interrupt too
                self._end()
                self._show(shown, head_before)
                raise
        logger.info("task %r is open with %d own weights", name, sum(own.counts))

    def parameters(
        self, *, lr: float | None = None, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups of the open task for any torch optimizer: own weights, then the head.

        Args:
            lr: learning rate of the own weights; None leaves it to the optimizer.
            head_lr: of the head; None takes ``lr``.

        Raises:
            RuntimeError: no task is open.
        """
        task, vector = self._opened("parameters()")
        vector.start()
        groups = [
            {"params": list(vector.parameters)},
            {"params": [p for _, p in task.head.named_parameters() if p.requires_grad]},
        ]
        for group, rate in zip(groups, (lr, lr if head_lr is None else head_lr), strict=True):
            if rate is not None:
                group["lr"] = rate
        return groups

    def callback(self) -> TrainerCallback:
        """The same for the transformers ``Trainer``: ``Trainer(callbacks=[...])``."""
        from bitstack_nb.trainer import ExactRecallCallback

        return ExactRecallCallback(self)

    def pause(self) -> None:
        """Let the own weights take no gradient until :meth:`parameters` or a Trainer begins."""
        self._opened("pause()")[1].stop()

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of what the open task trains: own weights, then the head."""
        return [tensor.detach().clone() for tensor in self._trained("snapshot()")]

    @torch.no_grad()
    def put_back(self, snapshot: Sequence[torch.Tensor]) -> None:
        """Make the open task what it was at a :meth:`snapshot` of it."""
        with self._exchange.lock:
            for tensor, value in zip(self._trained("put_back()"), snapshot, strict=True):
                tensor.copy_(value)
            task, vector = self._open
            if self.shown == task.name:
                self._layout.write(vector.own)

    def _trained(self, method: str) -> list[nn.Parameter]:
        task, vector = self._opened(method)
        return [*vector.parameters, *(p for _, p in task.head.named_parameters())]

    def close(
        self,
        *,
        values: str | None = None,
        kept: Mapping[str, torch.Tensor] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the open task; its own weights and its head are final then.

        Args:
            values: ``"bfloat16"`` rounds the own weights first, which halves the file.
            kept: tensors to keep and save with the task, such as statistics of its texts.
            notes: the same for what JSON can hold.

        Raises:
            RuntimeError: no task is open.
            Diverged: the task has NaN or infinite weights.
            LockedWeightsMoved: something else moved.
        """
        if values not in (None, "bfloat16"):
            raise ValueError(f"values is {values!r}, expected None or 'bfloat16'")
        with self._exchange.lock:
            task, vector = self._opened("close()")
            self._exchange.check_no_block("close()")
            self._show(task.name)  # another may be shown
            if not all(t.isfinite().all() for t in self._trained("close()")):
                raise Diverged(
                    f"task {task.name!r} has NaN or infinite weights: training has diverged. "
                    "abandon() gives it up; begin it again with a smaller learning rate"
                )
            self._check()
            dtypes = [v.dtype if values is None else torch.bfloat16 for v in vector.parameters]
            final = [
                v.detach().to(d, copy=True) for v, d in zip(vector.parameters, dtypes, strict=True)
            ]
            task.own = vector.own._replace(values=final)
            self._layout.write(task.own)
            self._exchange.own = task.own
            task.head.config = heads.present(self._model, self._parts).config
            task.digests = task.head.digests()
            task.kept = {n: t.detach().to("cpu", copy=True) for n, t in (kept or {}).items()}
            task.notes = json.loads(json.dumps(notes or {}))  # as it is read again
            task.digest = taskfile.task_digest(task, self._layout.sizes)
            self._tasks[task.name] = task
            self._end()
            task.head.set_trainable(False)
            self._begun += 1
        logger.info("task %r is closed", task.name)

    def abandon(self) -> None:
        """Give up the open task; the model is the base then."""
        with self._exchange.lock:
            self._opened("abandon()")
            self._exchange.check_no_block("abandon()")
            self._show(None)
            self._end()

    def remove(self, name: str) -> None:
        """Forget a closed task; nothing of it is left."""
        with self._exchange.lock:
            if name not in self._tasks:
                raise ValueError(self._no_task(name))
            self._exchange.check_no_block("remove()")
            if self._exchange.shown == name:
                self._show(None)
            del self._tasks[name]

    def adopt(self, other: ExactRecall) -> None:
        """Take over copies of all closed tasks of another ExactRecall on the same base.

        Raises:
            ValueError: both have a task of one name. Nothing has changed.
            maskfile.MaskFileError: the bases, their eligible weights or their heads differ.
        """
        with self._exchange.lock:
            if self._open:
                raise RuntimeError(self._still_open())
            if both := [name for name in other._tasks if name in self._tasks]:
                raise ValueError(
                    f"both have a task {', '.join(map(repr, both))}: remove one of the two first"
                )
            self._base.check_same(other._base.digests)
            described = taskfile.described(other._layout.parameters)
            check_match(described, self._layout.parameters)
            self._tasks |= {name: self._copy(task) for name, task in other._tasks.items()}
            self._begun += len(other._tasks)

    def _copy(self, task: Task) -> Task:
        """A copy of a closed task of another ExactRecall, for this model."""
        own = task.own._replace(
            counts=list(task.own.counts),
            positions=task.own.positions.clone(),
            values=[values.clone() for values in task.own.values],
        )
        config, state = copy.deepcopy(task.head.config), task.head.state_dict()
        try:
            head = heads.restored(self._model, self._base_head, state, config=config)
        except ValueError as error:
            raise MaskFileError(f"task {task.name!r} does not fit this model: {error}") from error
        kept = {name: tensor.clone() for name, tensor in task.kept.items()}
        return replace(task, own=own, head=head, kept=kept, notes=copy.deepcopy(task.notes))

    # Which task the model is --------------------------------------------------------------------

    def switch(self, name: str | None) -> nn.Module:
        """Make the model that of a task, bit for bit, with its head; None is the base.

        Values are exchanged in place, for every user of the model. Where several threads or
        coroutines use the model, take :meth:`using`.

        Raises:
            ValueError: there is no such task.
            RuntimeError: within a ``using`` block.
        """
        with self._exchange.lock:
            self._exchange.check_no_block("switch()")
            self._show(name)
        return self._model

    def using(self, name: str | None) -> Block:
        """Within the ``with`` block the model is that of a task; then again what it was.

        Another thread that wants a task waits for the end of the block. Blocks may be nested in the
        code that a block runs; another coroutine or generator gets an error meanwhile.

        Raises:
            ValueError: there is no such task.
            RuntimeError: a block of another coroutine or generator is open.
        """
        return Block(self._exchange, lambda: self._show(name), self._parts)

    def export(self, name: str | None) -> nn.Module:
        """A plain copy of a task's model, with its head and label names; None is the base.

        Raises:
            ValueError: there is no such task, or the model holds adapters of PEFT.
        """
        if eligible.has_adapters(self._model):
            raise ValueError(
                "the model holds adapters of PEFT, so there is no plain copy of it: within "
                "using(name) call save_pretrained of the PEFT model"
            )
        vector = self._open[1] if self._open else None
        with self.using(name), vector.out_of_the_model() if vector else nullcontext():
            exported = copy.deepcopy(self._model)
        if "_original_forward" in vars(exported) and "_hf_hook" not in vars(exported):
            # The autocast wrapper that a Trainer leaves behind would run the model copied from.
            del exported.forward, exported._original_forward
        base = {n: p.requires_grad for n, p in self._base.parameters.items()}
        trained = vector.trained if vector else base
        for own, parameter in exported.named_parameters():
            known = trained.get(eligible.canonical(own), parameter.is_floating_point())
            parameter.requires_grad_(known)
        return exported

    def _show(self, name: str | None, head: Head | None = None) -> None:
        if name is None:
            self._exchange.show(None, None, head or self._base_head)
        else:
            task = self._task(name)
            task.own = self._layout.here(task.own)
            self._exchange.show(name, task.own, head or task.head)

    # What there is ------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The closed tasks, in the order of closing."""
        return list(self._tasks)

    @property
    def is_open(self) -> bool:
        """Whether a task has begun that is not closed."""
        return self._open is not None

    @property
    def shown(self) -> str | None:
        """The task that the model is now; None is the base."""
        return self._exchange.shown

    @property
    def digests(self) -> dict[str, str]:
        """By closed task the digest of its own weights, its head, its labels and what it keeps."""
        return {name: task.digest for name, task in self._tasks.items()}

    @property
    def base_digest(self) -> str:
        """The digest of the base: of all of the model but its head."""
        return self._base.digest

    def labels(self, name: str) -> list[str] | None:
        """The names of a task's labels."""
        return self._task(name).labels

    def kept(self, name: str) -> Mapping[str, torch.Tensor]:
        """The tensors that ``close`` was given for a task."""
        return self._task(name).kept

    def notes(self, name: str) -> Mapping[str, Any]:
        """The notes that ``close`` was given for a task."""
        return self._task(name).notes

    def mask(self, name: str) -> Mapping[str, torch.Tensor]:
        """By parameter a bool tensor of its shape, True at the task's own weights."""
        return self._layout.masks(self._task(name).own)

    def stats(self) -> dict[str, float]:
        """The weights that are any task's own (``locked``), all, and the eligible; in percent."""
        counted = self._layout.counted([task.own for task in self._all_tasks()])
        locked = sum(locks.added for task in counted for locks in task.values())
        return {
            "locked": locked,
            "total": self._total,
            "eligible": self._layout.size,
            "locked_pct": 100 * locked / self._total,
            "frozen_pct": 100 * locked / self._layout.size,
        }

    def layer_table(self) -> pandas.DataFrame:
        """One row per layer, module and task.

        Columns: layer and module (as in ``BitStack``), task (from 1, in the order of ``names``),
        eligible, selected (the task's own weights), added (of those, no earlier task's), locked
        (any task's so far), lock_fraction (locked over eligible, 0 to 1).
        """
        counted = self._layout.counted([task.own for task in self._all_tasks()])
        return layer_table(self._layout.parameters, counted)

    def _all_tasks(self) -> list[Task]:
        return [*self._tasks.values(), *([self._open[0]] if self._open else [])]

    def verify(self) -> int:
        """Count the tensors that are not bit for bit what they must be: 0.

        The base and every closed task are compared by their digests. Own weights in the model are
        compared with those that are kept.

        Raises:
            LockedWeightsMoved: some moved; the message says which.
        """
        with self._exchange.lock:
            changed = [
                f"task {name!r}"
                for name, task in self._tasks.items()
                if taskfile.task_digest(task, self._layout.sizes) != task.digest
            ]
            return self._check(changed)

    def _check(self, changed: Iterable[str] = ()) -> int:
        """The same for the base and the shown task alone; ``changed`` was found elsewhere."""
        with self._exchange.lock:
            eligible.refuse_shards(self._model)
            moved = [*self._exchange.moved(), *changed]
            if self.shown in self._tasks:
                moved += self._tasks[self.shown].head.differing(self._tasks[self.shown].digests)
        if moved:
            raise LockedWeightsMoved(
                f"{len(moved)} tensors are not what they were: {', '.join(moved[:3])}"
                f"{' ...' if moved[3:] else ''}. Something moved them that was not the optimizer "
                "of an open task: load the base anew, and the tasks from their file"
            )
        return 0

    # Keeping it ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all closed tasks with their heads as one safetensors file.

        Raises:
            RuntimeError: a task is open.
            LockedWeightsMoved: the head of a task was changed, for example by a cast.
        """
        with self._exchange.lock:
            if self._open:
                raise RuntimeError(self._still_open())
            self._check_heads()
            taskfile.write(
                path,
                self._tasks.values(),
                settings=self.settings,
                parameters=self._layout.parameters,
                base=self._base.digests,
                begun=self._begun,
            )

    def _check_heads(self) -> None:
        for task in self._tasks.values():
            if moved := task.head.differing(task.digests):
                raise LockedWeightsMoved(
                    f"{moved[0]} of task {task.name!r} is not what it was when the task was closed "
                    f"(a cast?): load the tasks from their file, or remove({task.name!r}) first"
                )

    def own_bytes(self) -> int:
        """Bytes that the own weights of all closed tasks take in a file."""
        return sum(taskfile.own_bytes(t.own, self._layout.sizes) for t in self._tasks.values())

    def task_bytes(self, name: str) -> dict[str, int]:
        """Bytes of a task in a file: ``own`` weights, ``head``, and tensors that are ``kept``."""
        task = self._task(name)
        parts = {"head": task.head.state_dict(), "kept": task.kept}
        sizes = {part: sum(t.nbytes for t in tensors.values()) for part, tensors in parts.items()}
        return {"own": taskfile.own_bytes(task.own, self._layout.sizes), **sizes}

    @classmethod
    def load(cls, path: str | os.PathLike[str], base_model: nn.Module) -> ExactRecall:
        """The tasks saved at ``path``, on their base; the model stays as it is.

        The model may be frozen, as for inference.

        Raises:
            FileNotFoundError: there is no such file.
            maskfile.MaskFileError: it is damaged, foreign, or of another base.
            TypeError: the model is no module.
        """
        whole, state = eligible.unwrap(base_model), taskfile.read(path)
        try:
            names = {*state["parameters"], *eligible.head_parameters(whole)}
            with eligible.trainable(whole, names):
                tasks = cls(base_model, **state["settings"])
            check_match(state["parameters"], tasks._layout.parameters)
            tasks._base.check_same(state["base"])
            for record in state["tasks"]:
                head = heads.restored(
                    whole, tasks._base_head, record.pop("head"), config=record.pop("config")
                )
                tasks._tasks[record["name"]] = Task(**record, head=head, digests=head.digests())
        except (TypeError, ValueError) as error:
            raise MaskFileError(f"{path} does not fit this model: {error}") from error
        tasks._begun = state["begun"]
        return tasks

    # Parts of begin and close -------------------------------------------------------------------

    def _check_new(self, name: str, labels: Sequence[str] | None) -> None:
        self._exchange.check_no_block("begin()")
        if self._open:
            raise RuntimeError(self._still_open())
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}, expected the task's name, a string")
        if name in self._tasks:
            raise ValueError(f"there is a task {name!r} already: choose another name, or remove it")
        if labels is not None:
            heads.check_labels(labels)
        check_alone(self._model, self._exchange)

    def _warn_of_thawed(self) -> None:
        now, _ = eligible.recall_parameters(self._model, self.settings["exclude"])
        thawed = [name for name in now if name not in self._layout.parameters]
        if thawed:
            logger.warning(
                "%s%s was frozen when the ExactRecall was made, so no task owns weights of it: "
                "make a new ExactRecall to train it",
                ", ".join(thawed[:3]),
                " ..." if thawed[3:] else "",
            )

    def _batches(
        self, loader: Iterable[Mapping[str, Any]] | None, n_batches: int, head_steps: int
    ) -> list[Mapping[str, Any]]:
        if loader is None and self.settings["importance"] == RANDOM:
            return []
        check_batches(loader, n_batches)
        device = next(self._model.parameters()).device
        return first_batches(loader, max(n_batches, head_steps), device)

    def _new_head(self, labels: Sequence[str] | None, present: Head, *, seed: str) -> Head:
        if labels is not None:
            return heads.labelled(self._model, self._base_head, labels, seed=seed)
        # The modules stay in the model, for whoever holds them; another owner keeps a copy.
        for owner in (self._base_head, *(task.head for task in self._tasks.values())):
            if any(owner.parts[name] is part for name, part in present.parts.items()):
                owner.parts = heads.copied(self._model, owner).parts
        return present

    def _choose(self, batches: list[Mapping[str, Any]], n_batches: int, *, seed: int) -> Own:
        """The new task's own weights; the model is the base with the task's head."""
        parameters, how = self._layout.parameters, self.settings["importance"]
        if how == RANDOM:
            return self._layout.own(random_positions(parameters, self._budget, seed=seed))
        with eligible.trainable(self._model, parameters):
            scores = measure(self._model, parameters, batches, n_batches=n_batches, importance=how)
        chosen = choose(scores, self._budget, ties=False)
        ranks.check_same(chosen, "weights to train")
        return self._layout.own([mask.flatten().nonzero().flatten() for mask in chosen.values()])

    def _start(self, task: Task) -> None:
        """Make a task the open one; nothing but its head takes gradients for now."""
        vector = Vector(
            self._model,
            self._layout,
            task.own,
            base=self._base.parameters,
            shown=lambda: self.shown == task.name,
            after_step=self._base.put_back_buffers,
            after_load=self._check,
        )
        task.own = vector.own
        self._open = task, vector
        vector.register()
        self._show(task.name)

    def _end(self) -> None:
        """Let go of the open task, if there is one."""
        if self._open:
            self._open[1].remove()
            self._open = None

    # Errors -------------------------------------------------------------------------------------

    def _task(self, name: str) -> Task:
        if self._open and self._open[0].name == name:
            return self._open[0]
        if name not in self._tasks:
            raise ValueError(self._no_task(name))
        return self._tasks[name]

    def _no_task(self, name: object) -> str:
        known = ", ".join(map(repr, self._tasks)) or "none yet"
        return f"there is no task {name!r}, only {known} and None, the base"

    def _opened(self, method: str) -> tuple[Task, Vector]:
        if not self._open:
            raise RuntimeError(f"{method} needs an open task: begin(name) opens one")
        return self._open

    def _still_open(self) -> str:
        return f"task {self._open[0].name!r} is open: close() keeps it, abandon() gives it up."
