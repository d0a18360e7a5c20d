"""A training loop, its predictions, and three texts that a model forgets, for notebook 01."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from bitstack_nb.data import collate, encode
from bitstack_nb.data.backbones import Backbone

Batches = Sequence[Mapping[str, torch.Tensor]]


def batches_of(rows: Dataset, backbone: Backbone, device: torch.device) -> Batches:
    """Tokenized batches of 32 rows on a device."""
    loader = DataLoader(encode(rows, backbone), batch_size=32, collate_fn=collate(backbone))
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in loader]


def learn(
    model: nn.Module,
    batches: Batches,
    parameters: Iterable[Any],
    *,
    learning_rate: float = 4e-3,
    epochs: int = 3,
) -> None:
    """Train with AdamW, clipped gradients, and a rate that rises for ten steps and then falls.

    Args:
        model: any model whose forward gives ``.loss``.
        batches: of one task.
        parameters: to train, or groups of them.
        learning_rate: for groups without a rate of their own.
        epochs: passes over the batches.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    steps = epochs * len(batches)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, min(10, steps // 4), steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def answers(model: nn.Module, batches: Batches, labels: Sequence[str]) -> list[str]:
    """The name of the label that the model predicts for each text."""
    model.eval()
    numbers = torch.cat([model(**batch).logits.argmax(-1) for batch in batches])
    return [labels[number] for number in numbers.tolist()]


def three_texts(
    texts: Sequence[str], truth: Sequence[str], said: Mapping[str, Mapping[str, Sequence[str]]]
) -> str:
    """Three short texts with each method's answers, and the share of right answers to all texts.

    Args:
        texts, truth: the test texts of the first task and their labels.
        said: method -> moment -> answers. The texts are among those that all methods had right at
            the first moment and the first method has wrong at its last; else any.
    """
    first = list(next(iter(said.values())).values())
    forgotten = [
        at
        for at, true in enumerate(truth)
        if all(next(iter(moments.values()))[at] == true for moments in said.values())
        and first[-1][at] != true
    ]
    shown = sorted(forgotten or range(len(texts)), key=lambda at: len(texts[at]))[:3]
    lines = []
    for at in shown:
        lines += [textwrap.fill(texts[at], 88), _row("the label is", {"": truth[at]})]
        for method, moments in said.items():
            given = {moment: found[at] for moment, found in moments.items()}
            wrong = {m: "" if answer == truth[at] else " (wrong)" for m, answer in given.items()}
            lines.append(_row(method, {m: answer + wrong[m] for m, answer in given.items()}))
        lines.append("")
    lines.append(f"right answers to all {len(texts)} texts")
    for method, moments in said.items():
        right = {moment: f"{_right(found, truth):.0%}" for moment, found in moments.items()}
        lines.append(_row(method, right))
    return "\n".join(lines)


def _row(name: str, cells: Mapping[str, str]) -> str:
    shown = [f"{moment}: {text}" if moment else text for moment, text in cells.items()]
    return f"    {name:<14}{''.join(f'{text:<34}' for text in shown)}".rstrip()


def _right(given: Sequence[str], truth: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(given, truth, strict=True)) / len(truth)
