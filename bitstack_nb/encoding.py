"""Texts to token rows, and rows to batches of similar length, for one classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from bitstack_nb.examples import Text
from bitstack_nb.pretrained import collator, positions, tokenized

Rows = list[dict[str, Any]]


class Encoder:
    """The tokenizer of a model.

    Attributes:
        limit: the number of tokens that both can read.
        collate: pads rows into a batch of tensors on the CPU.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.limit = min(positions(model) or math.inf, tokenizer.model_max_length)
        self.collate = collator(model, tokenizer)

    def rows(
        self, texts: Sequence[Text], max_length: int, labels: Sequence[int] | None = None
    ) -> Rows:
        """A row of tokens for each text, or for each pair, with its label if there are any."""
        columns = zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]
        encoded = tokenized(self._tokenizer, *columns, max_length=max_length)
        names = [name for name in self._tokenizer.model_input_names if name in encoded]
        values = [encoded[name] for name in names]
        if labels is not None:
            names, values = [*names, "labels"], [*values, labels]
        return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]

    def batches(
        self, rows: Rows, size: int
    ) -> tuple[torch.Tensor, Iterator[dict[str, torch.Tensor]]]:
        """The order of rows by length, and batches in this order on the model's device."""
        order = torch.tensor([len(row["input_ids"]) for row in rows]).argsort(stable=True)
        parts = ([rows[n] for n in part.tolist()] for part in order.split(size))
        device = self._model.device
        return order, ({n: t.to(device) for n, t in self.collate(p).items()} for p in parts)
