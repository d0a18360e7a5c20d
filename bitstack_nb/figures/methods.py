"""How figures and tables name, order and colour the methods that they compare.

A method is a strategy of the benchmark. Its configurations are told apart by the settings in which
they differ.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.results.result import Result
from bitstack_nb.results.tables import shown

MARKERS = "osv^"  # a marker per budget and importance of a method
_NO_BREAK = "\N{NO-BREAK SPACE}"
_FIRST = ("sparsity", "budget", "importance", "data")  # other settings only where these are equal


class Method(NamedTuple):
    """A method's display name, its colour, and its place in every figure and table."""

    label: str
    colour: str
    order: float


def method(strategy: str) -> Method:
    """The method of a strategy; one that the benchmark does not have keeps its own name."""
    known = all_strategies().get(strategy)
    if known is None:
        return Method(strategy, "0.35", float("inf"))
    return Method(known.label, known.colour, known.order)


class Group(NamedTuple):
    """The runs of one configuration, and its name, colour and marker in every figure."""

    key: str  # ``configuration`` of ``results.frame``
    label: str
    colour: str
    marker: str
    settings: dict[str, Any]
    runs: pd.DataFrame  # its rows

    @property
    def results(self) -> list[Result]:
        """The results of the runs."""
        return list(self.runs["result"])


def grouped(runs: pd.DataFrame) -> list[Group]:
    """The configurations of ``results.frame`` in the order of methods, published ones last."""
    rows = shown(runs).astype(object)
    found = rows.where(rows.notna(), None).to_dict("index")
    ordered = sorted(found, key=lambda key: rank(found[key]))
    settings = [found[key] for key in ordered]
    return [
        Group(
            key,
            label,
            method(own["strategy"]).colour,
            "D" if own.get("published") else _marker(own, settings),
            own,
            runs[runs["configuration"] == key],
        )
        for key, label, own in zip(ordered, labels(settings), settings, strict=True)
    ]


def rank(settings: dict[str, Any]) -> tuple[bool, float]:
    """The place of a configuration in every figure and table."""
    return bool(settings.get("published")), method(settings["strategy"]).order


def _marker(own: dict[str, Any], settings: Sequence[dict[str, Any]]) -> str:
    """A marker for the budget and importance of a configuration, among those of its method."""
    names = ("budget", "importance")
    variants = dict.fromkeys(tuple(other.get(n) for n in names) for other in _alike(own, settings))
    return MARKERS[list(variants).index(tuple(own.get(n) for n in names)) % len(MARKERS)]


def labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """A name per configuration: its method, then the settings that tell it from others of it.

    Tuned settings, such as a learning rate, are named only where nothing else differs.
    """
    return [
        ", ".join([method(own["strategy"]).label, *_told_apart(own, settings)]) for own in settings
    ]


def _told_apart(own: dict[str, Any], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The settings, in words, that differ among the configurations of a method."""
    alike = _alike(own, settings)
    names = [name for name in _FIRST if len({other.get(name) for other in alike}) > 1]
    same = [other for other in alike if all(other.get(name) == own.get(name) for name in names)]
    names += [n for n in own if n not in _FIRST and len({other.get(n) for other in same}) > 1]
    words = [_worded(name, own) for name in names if own.get(name) is not None]
    if own.get("published"):
        words.append(f"published ({own['model']})" if own.get("model") else "published")
    return words


def _alike(own: dict[str, Any], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The configurations of a method that were measured, or those that were published."""
    names = ("strategy", "published")
    return [other for other in settings if all(other.get(n) == own.get(n) for n in names)]


def _worded(name: str, settings: dict[str, Any]) -> str:
    value = settings[name]
    if name == "sparsity":  # exact recall has no budget
        share = f"{100 * value:.10g} %"
        return f"sparsity {share}" if settings.get("budget") else f"{share} own weights"
    if name == "importance":
        return "random" if value == "random" else f"by {value}"
    if name in ("budget", "data"):
        return str(value)
    number = f"{value:.10g}" if isinstance(value, float) else value
    return f"{name.replace('_', ' ')} {number}"


def counted(label: str, numbers: Iterable[int]) -> str:
    """A label, wrapped, that ends with the number of seeds."""
    numbers = list(numbers)
    count = " to ".join(map(str, dict.fromkeys([min(numbers), max(numbers)])))
    unbroken = f"n = {count}".replace(" ", _NO_BREAK)
    text = label.replace(" %", f"{_NO_BREAK}%").replace(" by ", f" by{_NO_BREAK}")
    return textwrap.fill(f"{text}, {unbroken}", 34)


def titled(title: str, results: Iterable[Result]) -> str:
    """The title of a figure, which says so where its results are of synthetic tasks."""
    synthetic = any(result.protocol.get("data") == "embedded" for result in results)
    return f"{title} (synthetic tasks)" if synthetic else title


def described(result: Result) -> str:
    """One run in words: method, budget, sparsity, seed."""
    words = [method(result.protocol["strategy"]).label]
    words += [
        _worded(name, result.protocol)
        for name in ("sparsity", "budget", "importance")
        if result.protocol.get(name) is not None
    ]
    return ", ".join([*words, f"seed {result.protocol.get('seed')}"])


def task_names(result: Result) -> list[str]:
    """The names of a run's tasks in training order, or their numbers where it names none."""
    tasks = result.protocol.get("tasks")
    if tasks:
        return [task["name"] for task in tasks]
    return [f"task {number}" for number in range(1, len(result.matrix or []) + 1)]


def shared_task_names(results: Sequence[Result]) -> list[str]:
    """The tasks' names, or their numbers where the runs have them in different orders."""
    orders = [task_names(result) for result in results]
    if all(order == orders[0] for order in orders):
        return orders[0]
    return [f"task {number}" for number in range(1, max(map(len, orders)) + 1)]


def is_published(result: Result) -> bool:
    """Whether the numbers come from elsewhere."""
    return bool(result.provenance.get("published"))
