"""What padding costs: the benchmark as it is, beside itself with all texts padded to one length.

Here batches are grouped by length and padded to their longest text. The plain way is to pad every
text, when it is tokenized, to the length that texts are cut at.
"""

from __future__ import annotations

from functools import partial

import torch
from datasets import Dataset

from bitstack_nb.benchmark.heads import Heads
from bitstack_nb.benchmark.inputs import load_inputs
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.training import accuracy, train
from bitstack_nb.cost.measure import Times, Work, take_turns
from bitstack_nb.data.backbones import Backbone


def benchmark(
    protocol: Protocol, *, rounds: int, device: torch.device, progress: bool = False
) -> Times:
    """Fine-tuning on a protocol's tasks as it is (``ours``), and with padded texts (``base``).

    Each time data and model are loaded, and after each task all so far are evaluated. Texts are
    padded to ``protocol.max_length`` tokens. Every round counts: a benchmark begins cold.
    """
    works = {
        "base": Work(partial(_fine_tune, protocol, device, pad=True)),
        "ours": Work(partial(_fine_tune, protocol, device, pad=False)),
    }
    return take_turns(works, rounds=rounds, device=device, uncounted=0, progress=progress)


def padded(data: Dataset, backbone: Backbone) -> Dataset:
    """Encoded rows, each with as much padding as makes it ``backbone.max_length`` tokens long."""
    tokens = [name for name in backbone.tokenizer.model_input_names if name in data.column_names]
    wide = backbone.tokenizer.pad(
        {name: data[name][:] for name in tokens},
        padding="max_length",
        max_length=backbone.max_length,
    )
    lengths = [backbone.max_length] * len(data)
    return Dataset.from_dict({**data[:], **wide, "length": lengths})


def _fine_tune(protocol: Protocol, device: torch.device, *, pad: bool) -> None:
    inputs = load_inputs(protocol, device)
    learn, test = inputs.train, inputs.test
    if pad:
        learn, test = ([padded(d, inputs.backbone) for d in split] for split in (learn, test))
    heads = Heads(inputs.backbone.model, seed=protocol.seed)
    for number, task in enumerate(protocol.tasks):
        heads.add(task.name, task.num_labels)
        model = heads.use(task.name)
        train(model, learn[number], inputs.collate, protocol=protocol, seed=number, device=device)
        for data, earlier in zip(test, protocol.tasks[: number + 1], strict=False):
            model = heads.use(earlier.name)
            accuracy(model, data, inputs.collate, protocol=protocol, device=device)
