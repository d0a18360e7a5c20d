"""Which task a model is now: own weights and heads exchanged in place, one user at a time."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from bitstack_nb import head as heads
from bitstack_nb.base import Base
from bitstack_nb.bits import differing, take
from bitstack_nb.guard import active_guards
from bitstack_nb.head import Head
from bitstack_nb.own import Layout, Own

# All that were made for a model: no two of them may show a task on it at a time.
_of_model: WeakKeyDictionary[nn.Module, WeakSet[Exchange]] = WeakKeyDictionary()


class Exchange:
    """The model, the task that it is, and what the base has under that task's own weights.

    After an interrupt the model is one task or the base, never half of each.

    Attributes:
        shown: the task's name; None is the base.
        own: the shown task's own weights.
        covered: the base's values at the same positions.
        lock: held while the model changes, and within a block of :meth:`using`.
    """

    def __init__(self, model: nn.Module, layout: Layout, base: Base) -> None:
        self.model, self.layout, self._base = model, layout, base
        self.shown: str | None = None
        self.covered: Own | None = None
        self.lock = threading.RLock()
        self.own: Own | None = None
        self._blocks: list[FrameType] = []  # that have entered using() and not left it
        _of_model.setdefault(model, WeakSet()).add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        copied = memo[id(self)] = object.__new__(type(self))
        own = {"lock": threading.RLock(), "_blocks": []}  # which cannot be copied
        others = {name: value for name, value in vars(self).items() if name not in own}
        vars(copied).update(copy.deepcopy(others, memo) | own)
        _of_model.setdefault(copied.model, WeakSet()).add(copied)
        return copied

    @torch.inference_mode(False)
    @torch.no_grad()
    def show(self, name: str | None, own: Own | None, head: Head) -> None:
        """Make the model that of a task: its own weights on the base, and its head."""
        self._base.check_present()
        if name is not None:
            check_alone(self.model, self)
        self._base.put_back_buffers()
        former, former_head = (self.shown, self.own), heads.present(self.model, head.parts)
        try:
            if name != self.shown:
                self._uncover()
                self._cover(name, own)
            heads.place(self.model, head)
        except BaseException:  # a notebook's interrupt too
            if name != former[0]:
                self._uncover()
                self._cover(*former)
            heads.place(self.model, former_head)
            raise
        # Inside autocast the next forward would read the casts of the weights that were there.
        torch.clear_autocast_cache()

    def moved(self) -> list[str]:
        """The tensors of the base, and those with own weights, that are not what they must be."""
        self._base.check_present()
        covered = [] if self.covered is None else self.layout.pieces(self.covered)
        own = [] if self.own is None else self.layout.pieces(self.own)
        return self._base.moved({piece.name: piece for piece in covered}) + [
            f"{piece.name} (own weights)"
            for piece in own
            if differing(take(piece.parameter, piece.where), piece.values)
        ]

    def _uncover(self) -> None:
        """Bring the base back; doing it twice does no harm."""
        if self.covered is not None:
            self.layout.write(self.covered)
        self.shown = self.own = self.covered = None

    def _cover(self, name: str | None, own: Own | None) -> None:
        if own is not None:
            covered = own._replace(values=self.layout.read(own))
            # Before anything is written, so that it can be undone halfway.
            self.shown, self.own, self.covered = name, own, covered
            self.layout.write(own)

    def check_no_block(self, method: str) -> None:
        """Raise a RuntimeError in a ``using`` block: leaving it has to find what it left."""
        if self._blocks:
            raise RuntimeError(f"{method} within a using(...) block: leave the block first")


def check_alone(model: nn.Module, own: Exchange | None = None) -> None:
    """Raise a RuntimeError if a model is a task of another exchange, or has locked weights."""
    if active_guards(model):
        raise RuntimeError(
            "a BitStack has hooks on this model, so own weights that it locks would not train: "
            "call its detach() first, or BitStack(model).detach(others=True) if it has no name"
        )
    for other in _of_model.get(model, ()):
        if other is not own and other.shown is not None:
            raise RuntimeError(
                f"another ExactRecall shows its task {other.shown!r} on this model: its "
                "switch(None), or abandon() of an open task, brings the base back"
            )


class Block:
    """The context manager that ``ExactRecall.using`` gives."""

    def __init__(self, exchange: Exchange, enter: Callable[[], None], parts: list[str]) -> None:
        self._exchange, self._enter, self._parts = exchange, enter, parts

    def __enter__(self) -> nn.Module:
        exchange = self._exchange
        exchange.lock.acquire()
        try:
            frame = _user_frame()
            if exchange._blocks and not _calls(exchange._blocks[-1], frame):
                raise RuntimeError(
                    "a using(...) block of another coroutine or generator is open, and the model "
                    "can be one task only: finish that block first, without waiting in it"
                )
            self._before = exchange.shown, exchange.own
            self._head = heads.present(exchange.model, self._parts)
            try:
                self._enter()
                exchange._blocks.append(frame)
            except BaseException:
                exchange.show(*self._before, self._head)
                raise
        except BaseException:
            exchange.lock.release()
            raise
        return exchange.model

    def __exit__(self, *_: object) -> None:
        exchange = self._exchange
        try:
            try:
                exchange.show(*self._before, self._head)
            except KeyboardInterrupt:  # or an open task would be left for good, and train no more
                exchange.show(*self._before, self._head)
                raise
        finally:
            exchange._blocks.pop()
            exchange.lock.release()


def _user_frame() -> FrameType:
    """The frame of the ``with`` statement, or of what entered the block through contextlib."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    return frame


def _calls(outer: FrameType, inner: FrameType | None) -> bool:
    """Whether the inner frame is the outer one or called by it: not so if that one waits."""
    while inner is not None and inner is not outer:
        inner = inner.f_back
    return inner is outer
