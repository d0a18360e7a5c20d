"""A task's head: all of a model that lies outside its backbone, and the names of its labels."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitstack_nb.bits import digest
from bitstack_nb.eligible import head_parameters, head_paths, within

# What a transformers model knows of its labels.
_LABELS = ("id2label", "label2id", "problem_type")


@dataclass
class Head:
    """A head and what the model's configuration says about it.

    Attributes:
        parts: modules (or parameters) by their names in the model.
        config: ``num_labels``, ``id2label``, ``label2id``, ``problem_type``, where the model has
            them.
    """

    parts: dict[str, nn.Module | nn.Parameter]
    config: dict[str, Any] = field(default_factory=dict)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the model."""
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                yield from ((f"{name}.{own}", p) for own, p in part.named_parameters())
            else:
                yield name, part

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, by their names in the model; not copied."""
        state = {}
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                state |= {f"{name}.{own}": t for own, t in part.state_dict().items()}
            else:
                state[name] = part.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what :meth:`state_dict` gave; a ValueError where it does not fit."""
        present = self.state_dict()
        found, expected = _described(state), _described(present)
        if found != expected:
            names = sorted(n for n in found | expected if found.get(n) != expected.get(n))
            raise ValueError(
                f"the head is another one: {', '.join(names[:3])}{' ...' if names[3:] else ''}"
            )
        for name, tensor in present.items():
            tensor.copy_(state[name])

    def digests(self) -> dict[str, str]:
        """The digest of every tensor, by name."""
        return {name: digest(tensor) for name, tensor in self.state_dict().items()}

    def differing(self, digests: Mapping[str, str]) -> list[str]:
        """The tensors whose digests are no longer these, for a message."""
        return [f"{name} (head)" for name, own in self.digests().items() if own != digests[name]]

    def set_trainable(self, trainable: bool) -> None:
        """Let its parameters take gradients from now on, or none."""
        for _, parameter in self.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(trainable)
            parameter.grad = None


def _described(state: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(t.shape), t.dtype) for name, t in state.items()}


def part_names(model: nn.Module) -> list[str]:
    """The names of the modules and parameters that make up an unwrapped model's head."""
    own = head_parameters(model)
    return [path for path in head_paths(model) if any(within(name, [path]) for name in own)]


def present(model: nn.Module, names: Iterable[str]) -> Head:
    """The head that is in an unwrapped model now: the same modules, not copies."""
    parts = {name: getattr(*_place(model, name)) for name in names}
    owner = _owner(model, parts)
    config = {name: getattr(owner.config, name, None) for name in _LABELS if _configured(owner)}
    if hasattr(owner, "num_labels"):
        config["num_labels"] = owner.num_labels
    return Head(parts, copy.deepcopy(config))


def place(model: nn.Module, head: Head) -> None:
    """Put a head into an unwrapped model, on its device and in its mode."""
    device = next(model.parameters()).device
    for name, part in head.parts.items():
        if isinstance(part, nn.Module):
            part = part.to(device).train(model.training)
        elif part.device != device:
            part = nn.Parameter(part.to(device))
        setattr(*_place(model, name), part)
    owner = _owner(model, head.parts)
    for name, value in copy.deepcopy(head.config).items():
        setattr(owner if name == "num_labels" else owner.config, name, value)


def copied(model: nn.Module, head: Head) -> Head:
    """A copy of a head; what it shares with the backbone stays shared."""
    own = {id(p) for _, p in head.named_parameters()}
    shared = {id(p): p for p in model.parameters() if id(p) not in own}
    return Head(copy.deepcopy(head.parts, shared), copy.deepcopy(head.config))


def labelled(model: nn.Module, pattern: Head, labels: Sequence[str], *, seed: str) -> Head:
    """A new head for these labels: as ``pattern``, its last linear layer random.

    Weights are normal with the model's ``initializer_range``, biases 0.
    """
    head = resized(model, pattern, len(labels))
    name, path, _ = _output(model, pattern)
    output = head.parts[name].get_submodule(path) if path else head.parts[name]
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    config = getattr(_owner(model, head.parts), "config", None)
    deviation = getattr(config, "initializer_range", None) or 0.02
    weight = torch.empty(output.weight.shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        output.weight.copy_(weight.normal_(0.0, deviation, generator=generator))
        if output.bias is not None:
            output.bias.zero_()
    return describe(head, labels)


def resized(model: nn.Module, pattern: Head, outputs: int) -> Head:
    """A copy of a head with another number of outputs; its last layer holds anything."""
    head = copied(model, pattern)
    name, path, old = _output(model, head)
    # Built without its usual initialisation, which would draw from the global generator.
    new = nn.utils.skip_init(
        nn.Linear,
        old.in_features,
        outputs,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    if path:
        head.parts[name].set_submodule(path, new)
    else:
        head.parts[name] = new
    return head


def restored(
    model: nn.Module, pattern: Head, state: Mapping[str, torch.Tensor], *, config: dict[str, Any]
) -> Head:
    """The head with this state; a ValueError where it is not one of the model's kind."""
    weight = None
    if _linear(pattern):
        name, path, _ = _output(model, pattern)
        weight = state.get(f"{name}.{path}.weight" if path else f"{name}.weight")
    head = copied(model, pattern) if weight is None else resized(model, pattern, len(weight))
    head.load_state_dict(state)
    head.config = config
    head.set_trainable(False)
    return head


def check_labels(labels: Sequence[str]) -> None:
    """Raise a ValueError unless these are names of at least two labels."""
    known = not isinstance(labels, str) and all(isinstance(label, str) for label in labels)
    if not known or len(set(labels)) != len(labels) or len(labels) < 2:
        raise ValueError(f"labels is {labels!r}, expected a list of two or more different names")


def describe(head: Head, labels: Sequence[str]) -> Head:
    """Write the labels' names into what the configuration will say."""
    if "id2label" in head.config:
        head.config |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": None,
        }
    if "num_labels" in head.config:
        head.config["num_labels"] = len(labels)
    return head


def _output(model: nn.Module, head: Head) -> tuple[str, str, nn.Linear]:
    """The layer that gives the logits: the part that holds it, its path in there, and itself."""
    linear = _linear(head)
    if not linear:
        raise ValueError(
            f"the head of {type(model).__name__} ends in no linear layer, so none can be made for "
            "labels: put a head into the model and leave labels out"
        )
    number = head.config.get("num_labels")
    fitting = [found for found in linear if found[2].out_features == number]
    return (fitting or linear)[-1]


def _linear(head: Head) -> list[tuple[str, str, nn.Linear]]:
    return [
        (name, path, module)
        for name, part in head.parts.items()
        if isinstance(part, nn.Module)
        for path, module in part.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a part of the head, and the part's name in it."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _owner(model: nn.Module, parts: Iterable[str]) -> nn.Module:
    """The innermost module around the head that knows of labels; if none does, the model."""
    path = next(iter(parts), "")
    while path:
        owner, _ = _place(model, path)
        if _configured(owner) or hasattr(owner, "num_labels"):
            return owner
        path = path.rpartition(".")[0]
    return model


def _configured(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "id2label")
