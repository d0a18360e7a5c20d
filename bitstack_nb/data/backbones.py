"""A backbone: a transformers sequence classifier in float32, its tokenizer, and its batches.

Scope: loading by Hub name or local folder, or building the tiny GPT-2; texts to token columns;
token columns to padded batches. The heads of the tasks are in ``bitstack_nb/head.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
import transformers
from torch import nn

from bitstack_nb.data.errors import BackboneError
from bitstack_nb.data.pretrained import load_pretrained

TINY = "tiny-gpt2"


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A sequence classifier with its tokenizer and the record of its origin.

    Attributes:
        model: a float32 ``...ForSequenceClassification``.
        tokenizer: pads on the side that the model needs.
        name: the Hub name, the folder or ``"tiny-gpt2"``.
        max_length: texts are cut to this many tokens.
        provenance: JSON-able. ``source`` is ``"hub"`` (with ``revision``, the commit), ``"folder"``
            (with ``sha256`` per weight file) or ``"built"`` (with ``seed`` and ``vocabulary``, the
            version of the embedded tasks); ``backbone_parameters`` counts all but the head's.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    max_length: int
    provenance: dict[str, Any]


def load_backbone(name: str, *, max_length: int, seed: int) -> Backbone:
    """Load a sequence classifier of transformers with its tokenizer, on the CPU.

    Args:
        name: ``"tiny-gpt2"`` (built with random weights), a local folder, or a name on the Hub.
        max_length: texts are cut to this many tokens.
        seed: of the random weights: those that the files lack, usually the head, or all of the
            tiny GPT-2. The global random state is left as found.

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
        model, tokenizer, source = _build_tiny(seed) if name == TINY else load_pretrained(name)
    limit = _positions(model)
    if limit is not None and max_length > limit:
        raise BackboneError(
            f"{name}: max_length {max_length} is more than the model's {limit} positions;"
            f" use at most {limit}"
        )
    _prepare(model, tokenizer, name)
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
        data: columns ``text`` (str) and ``label`` (int).
        backbone: its tokenizer is used.

    Returns:
        The rows in order, in memory: the columns of the tokenizer (``input_ids``,
        ``attention_mask``, for some ``token_type_ids``), ``labels`` and ``length`` (in tokens).

    Raises:
        BackboneError: there are no rows, or a column is absent.
    """
    if len(data) == 0 or not {"text", "label"} <= set(data.column_names):
        raise BackboneError(
            f"expected rows with the columns text and label, got {len(data)} rows with"
            f" {', '.join(data.column_names) or 'no columns'}"
        )
    texts = [text or "" for text in data["text"]]
    cut = {"truncation": True, "max_length": backbone.max_length}
    columns = dict(backbone.tokenizer(texts, **cut))
    full_stop = backbone.tokenizer(".", **cut)
    for row, tokens in enumerate(columns["input_ids"]):
        # A decoder gives NaN for a row of padding only: an empty text is read as a full stop.
        if set(tokens) <= {backbone.tokenizer.pad_token_id}:
            for name, column in columns.items():
                column[row] = full_stop[name]
    lengths = [len(tokens) for tokens in columns["input_ids"]]
    return datasets.Dataset.from_dict({**columns, "labels": data["label"][:], "length": lengths})


def collate(backbone: Backbone) -> Callable[[list[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """Return a function that pads encoded rows into a batch of int64 tensors.

    The batch holds the model's inputs ``[rows, longest]``, ``labels`` ``[rows]`` and, if the rows
    have one, ``task`` ``[rows]``. Decoders are padded on the left, and ``position_ids`` count from
    each row's first token, so that the logits do not depend on the amount of padding.
    """
    positions = _is_decoder(backbone.model) and "position_ids" in _forward_names(backbone.model)
    # A partial of a module's function can be pickled for the workers of a data loader.
    return partial(_pad, tokenizer=backbone.tokenizer, positions=positions)


def _pad(
    rows: list[Mapping[str, Any]],
    *,
    tokenizer: transformers.PreTrainedTokenizerBase,
    positions: bool,
) -> dict[str, torch.Tensor]:
    inputs = [name for name in tokenizer.model_input_names if name in rows[0]]
    columns = {name: [row[name] for row in rows] for name in inputs}
    batch = dict(tokenizer.pad(columns, return_tensors="pt"))
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for name in ("labels", "task"):
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.int64)
    return batch


def _is_decoder(model: nn.Module) -> bool:
    # transformers calls the head `score` in the classifiers that pool the last token.
    return hasattr(model, "score")


def _forward_names(model: nn.Module) -> Collection[str]:
    return inspect.signature(model.forward).parameters


def _positions(model: transformers.PreTrainedModel) -> int | None:
    """The number of tokens that the model has positions for; None if there is no limit."""
    for name, module in model.named_modules():
        # RoBERTa and models like it count positions from the padding index on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return module.num_embeddings - module.padding_idx - 1
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet's -1 means none


def _prepare(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    name: str,
) -> None:
    """Set up padding, the tokenizer's columns and the loss for one integer label per text."""
    # A model saved for regression or several labels would use another loss.
    model.config.problem_type = "single_label_classification"
    taken = _forward_names(model)
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    if not _is_decoder(model):
        return
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(
                f"{name}: the tokenizer has neither a padding nor an end token, and a decoder"
                " needs one in batches; save one with the tokenizer (tokenizer.pad_token = ...)"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
        config.use_cache = False  # each text is read once, so a cache only costs memory


def _build_tiny(
    seed: int,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, dict[str, Any]]:
    """Build a GPT-2 of 2 layers with random weights, and a word tokenizer for embedded tasks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from bitstack_nb.data.embedded import EMBEDDED_VERSION, embedded_vocabulary

    words = ["<pad>", "<unk>", *embedded_vocabulary()]
    vocabulary = {word: index for index, word in enumerate(words)}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inputs = ["input_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>", model_input_names=inputs
    )
    sizes = {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=len(words), **sizes, **tokens)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    return model, tokenizer, {"source": "built", "seed": seed, "vocabulary": EMBEDDED_VERSION}
