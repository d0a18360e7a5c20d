"""A backbone: a transformers sequence classifier in float32, its tokenizer, and its batches.

Scope: loading by Hub name or local folder, or the tiny GPT-2 of the package; texts to token
columns; token columns to padded batches. The heads of the tasks are in ``bitstack_nb/head.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers

from bitstack_nb.data.pooling import Pooled
from bitstack_nb.pretrained import (
    BackboneError,
    collator,
    load_pretrained,
    positions,
    prepare,
    tokenized,
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A sequence classifier with its tokenizer and the record of its origin.

    Attributes:
        model: a float32 ``...ForSequenceClassification``, or its backbone in a ``Pooled``.
        tokenizer: pads on the side that the model needs.
        name: the Hub name, the folder or ``"tiny-gpt2"``.
        max_length: texts are cut to this many tokens.
        provenance: JSON-able. ``source`` is ``"hub"`` (with ``revision``, the commit), or
            ``"folder"`` or ``"package"`` (with ``sha256`` per weight file);
            ``backbone_parameters`` counts all but the head's.
    """

    model: transformers.PreTrainedModel | Pooled
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    max_length: int
    provenance: dict[str, Any]


def load_backbone(name: str, *, max_length: int, seed: int, pooling: str | None = None) -> Backbone:
    """Load a sequence classifier of transformers with its tokenizer, on the CPU.

    Args:
        name: ``"tiny-gpt2"`` (135 thousand weights, pretrained on synthetic texts), a local folder,
            or a name on the Hub.
        max_length: texts are cut to this many tokens.
        seed: of the weights that the files lack, usually the head's, which are random. The global
            random state is left as found.
        pooling: what the head reads, see :class:`bitstack_nb.data.pooling.Pooled`; None keeps the
            classifier that transformers has for the architecture.

    Raises:
        BackboneError: the name is unknown, gated or out of reach; the folder lacks a model or a
            tokenizer; the architecture has no sequence classifier; ``max_length`` exceeds the
            model's positions.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise BackboneError(f"max_length must be a positive whole number, got {max_length!r}")
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every GPU, which the fork leaves out.
        torch.default_generator.manual_seed(seed)
        model, tokenizer, source = load_pretrained(name)
    limit = positions(model)
    if limit is not None and max_length > limit:
        raise BackboneError(
            f"{name}: max_length {max_length} is more than the model's {limit} positions;"
            f" use at most {limit}"
        )
    prepare(model, tokenizer, name)
    if pooling:
        model = Pooled(model, pooling)
    count = sum(parameter.numel() for parameter in model.base_model.parameters())
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        name=name,
        max_length=max_length,
        provenance={**source, "backbone_parameters": count},
    )


def encode(data: datasets.Dataset, backbone: Backbone) -> datasets.Dataset:
    """Tokenize texts and cut them at ``backbone.max_length``, without padding.

    Args:
        data: columns ``text`` (str) and ``label`` (int); of pairs, ``text_pair`` is the second.
            The longer text of a pair is cut first.
        backbone: its tokenizer is used.

    Returns:
        The rows in order, in memory: the columns of the tokenizer (``input_ids``,
        ``attention_mask``, for some ``token_type_ids``), ``labels`` and ``length`` (in tokens).

    Raises:
        BackboneError: there are no rows, a column is absent, or ``max_length`` leaves no room.
    """
    if len(data) == 0 or not {"text", "label"} <= set(data.column_names):
        raise BackboneError(
            f"expected rows with the columns text and label, got {len(data)} rows with"
            f" {', '.join(data.column_names) or 'no columns'}"
        )
    texts = [
        [text or "" for text in data[name]]
        for name in ("text", "text_pair")
        if name in data.column_names
    ]
    columns = tokenized(backbone.tokenizer, *texts, max_length=backbone.max_length)
    lengths = [len(tokens) for tokens in columns["input_ids"]]
    return datasets.Dataset.from_dict({**columns, "labels": data["label"][:], "length": lengths})


def collate(backbone: Backbone) -> Callable[[list[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """Return a function that pads encoded rows into a batch of int64 tensors.

    The batch holds the model's inputs ``[rows, longest]``, ``labels`` ``[rows]`` and, if the rows
    have one, ``task`` ``[rows]``. Decoders are padded on the left, and ``position_ids`` count from
    each row's first token, so that the logits do not depend on the amount of padding.
    """
    return collator(backbone.model, backbone.tokenizer)
