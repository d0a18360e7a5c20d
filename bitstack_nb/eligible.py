"""Which parameters may be locked: the backbone without heads, embeddings and the final norm.

The rules look at the model's structure only, so nothing here needs transformers:

- A *head* lies outside the backbone that the model names in ``base_model_prefix``, as the models of
  transformers do. Elsewhere it is a child with a usual name: ``classifier``, ``heads``, ``fc``...
  A wrapper is looked into. Where none of this helps, the last layer is the head, with those beside
  it that read the same input, and a warning says so.
- An *embedding* is an ``nn.Embedding``, or a parameter or module with "embed" in its name or class.
- The *final norm* is a norm layer outside the stack of blocks (a ModuleList or Sequential).

An embedding or a norm has no modules in it. One that has is a block, whatever its name.

On GPT-2 the rules give the published exclusion ``score, wte, wpe, ln_f``.

Names are canonical: parts that ``torch.compile`` adds are removed. A tied parameter has one name.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Usual names of heads, where the model does not name its backbone.
_HEADS = re.compile(
    r"(\w+_)?(logit|output|score)s|(\w+_)?score|(\w+_)?(classifier|head)s?(\d+|_\w+)?"
    r"|(cls|fc|final|last|logit|out|output)(_(fc|layer|linear|proj))?",
    re.IGNORECASE,
)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, (distributed) data-parallel and PEFT wrappers.

    Raises:
        ValueError: see :func:`refuse_shards`; or a parameter has no values, or PEFT's wrapper
            computes more than the module inside it.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, expected a torch.nn.Module")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        elif _is_peft(model):
            model = _inside_peft(model)
        else:
            refuse_shards(model)
            _refuse_offloaded(model)
            return model


def _is_peft(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # as for the engines below
    return peft is not None and isinstance(model, peft.PeftModel)


def _inside_peft(model: nn.Module) -> nn.Module:
    """The module with PEFT's adapters in it, whose forward is that of the wrapper."""
    plain_forward = sys.modules["peft.tuners.tuners_utils"].BaseTuner.forward
    config = model.active_peft_config
    if config.is_prompt_learning or type(model.base_model).forward is not plain_forward:
        raise ValueError(
            f"PEFT computes more for {config.peft_type.value} than the layers of the model, and a "
            "stack sees layers only: take LoRA or another adapter of layers"
        )
    return model.get_base_model()


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of the model are wrapped in PEFT's adapters."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and any(isinstance(m, tuners.BaseTunerLayer) for m in model.modules())


def _refuse_offloaded(model: nn.Module) -> None:
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"{empty[0]} is on the device meta, which holds no values: the model is offloaded "
            "(device_map) or not loaded. Load it whole, without device_map"
        )


def refuse_shards(model: nn.Module) -> None:
    """Raise a ValueError if a model's parameters are shards; it names the sharding engine."""
    if (engine := _sharding_engine(model)) is not None:
        raise ValueError(
            f"the parameters of {type(model).__name__} are shards of {engine}, and a stack locks "
            "weights of whole parameters: train data-parallel without shards, as torchrun and "
            "accelerate launch do by default"
        )


def _sharding_engine(model: nn.Module) -> str | None:
    # Importing an engine takes seconds. One that is not imported yet is not in the model.
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        return "FSDP1 (FullyShardedDataParallel)"
    for parameter in model.parameters():
        if tensor and isinstance(parameter, tensor.DTensor):
            return "FSDP2 (fully_shard) or tensor parallelism"
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed ZeRO"
    return None


def canonical(name: str) -> str:
    """A parameter's name without the parts that compiled submodules add to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def eligible_parameters(model: nn.Module, exclude: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """Floating-point parameters that may be locked and are trainable now, by name.

    Args:
        model: any module, already unwrapped.
        exclude: strings; a parameter is excluded if one of its names contains one of them.
            ``None`` excludes heads, embeddings and the final norm, by any of their names.
    """
    names = _names(model)
    if exclude is None:
        automatic = _automatic_exclusion(model)
        excluded = {p for p, aliases in names.items() if automatic.intersection(aliases)}
    else:
        excluded = {
            p for p, aliases in names.items() if any(e in n for e in exclude for n in aliases)
        }
    logger.info("excluded from locking: %s", ", ".join(names[p][0] for p in names if p in excluded))
    return {
        aliases[0]: parameter
        for parameter, aliases in names.items()
        if parameter not in excluded and parameter.requires_grad and parameter.is_floating_point()
    }


def head_paths(model: nn.Module) -> list[str]:
    """Names of all that is a head, as modules, parameters and buffers of an unwrapped model."""
    return _find_head(model)[0]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The heads' parameters, by name. A parameter tied to the backbone belongs to the backbone."""
    paths = head_paths(model)
    return {
        names[0]: parameter
        for parameter, names in _names(model).items()
        if all(within(name, paths) for name in names)
    }


def trainable_heads(model: nn.Module) -> list[nn.Parameter]:
    """The heads' trainable parameters; a ValueError if there are none."""
    heads = head_parameters(model)
    found = [p for p in heads.values() if p.requires_grad]
    if not found:
        why = f"{', '.join(heads)} is frozen" if heads else "none is found, or it is an embedding"
        raise ValueError(
            f"{type(model).__name__} has no trainable head ({why}), and each task has its own: "
            "let it take gradients, or name the layer that gives the logits classifier"
        )
    return found


def warn_of_head(model: nn.Module) -> None:
    """Log a warning if an unwrapped model's head is not known by name, or if it has none."""
    paths, known = _find_head(model)
    if known and paths:
        return
    found = "none is found"
    if paths:
        layers = "the last layers {} are" if paths[1:] else "the last layer {} is"
        found = f"{layers.format(', '.join(map(repr, paths)))} taken for it"
    logger.warning(
        "no part of %s has the usual name of a head, so %s: if another layer gives the logits, "
        "name it classifier, or leave it free with exclude=[...]",
        type(model).__name__,
        found,
    )


@contextmanager
def trainable(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the block, the parameters with these names are trainable (model unwrapped)."""
    wanted = set(names)
    frozen = [
        parameter
        for parameter, aliases in _names(model).items()
        if aliases[0] in wanted and parameter.is_floating_point() and not parameter.requires_grad
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def recall_parameters(
    model: nn.Module, exclude: Iterable[str] | None
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The backbone's parameters, by name: those that tasks may own weights of, and the fixed ones.

    Heads are in neither, whatever ``exclude`` says, because each task has its own head.
    """
    heads = set(head_parameters(model).values())
    own = {n: p for n, p in eligible_parameters(model, exclude).items() if p not in heads}
    owned = set(own.values())
    fixed = {
        names[0]: parameter
        for parameter, names in _names(model).items()
        if parameter not in heads and parameter not in owned
    }
    return own, fixed


def backbone_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The backbone's real-valued buffers that are saved with the model, by name."""
    kept, heads = model.state_dict(keep_vars=True), head_paths(model)
    return {
        canonical(name): buffer
        for name, buffer in model.named_buffers()
        if name in kept and not buffer.is_complex() and not within(canonical(name), heads)
    }


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with its names (several if it is tied)."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(canonical(name))
    return names


def within(name: str, paths: Iterable[str]) -> bool:
    """Whether a name is one of the paths or lies inside one."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def _automatic_exclusion(model: nn.Module) -> set[str]:
    excluded, heads, final_norms = set(), head_paths(model), _final_norms(model)
    for path, module in model.named_modules(remove_duplicate=False):
        whole = _is_embedding(path, module) or path in final_norms
        for name, _ in module.named_parameters(path, remove_duplicate=False, recurse=whole):
            name = canonical(name)
            if whole or "embed" in name.rpartition(".")[2].lower() or within(name, heads):
                excluded.add(name)
    return excluded


def _find_head(model: nn.Module) -> tuple[list[str], bool]:
    """Paths of the head, and whether the model or a name tells them; else it is the last layer."""
    path, module = "", model
    while True:
        if declared := _declared_head(path, module):
            return declared, True
        inner = [name for name, child in module.named_children() if _holds_parameters(child)]
        if len(inner) != 1 or not module._modules[inner[0]]._modules:
            break
        path, module = f"{path}{inner[0]}.", module._modules[inner[0]]
    named = []
    for name in _children(module):
        own = canonical(path + name)
        if _HEADS.fullmatch(name):
            named.append(own)
        elif isinstance(child := module._modules.get(name), nn.Module):
            named += _declared_head(f"{own}.", child._modules.get("_orig_mod", child))
    if named or getattr(module, "base_model_prefix", ""):
        return named, True  # without one it is the backbone of a transformers model
    return [canonical(path + name) for name in _last_layers(module)], False


def _children(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers, *module._modules]


def _declared_head(path: str, module: nn.Module) -> list[str]:
    """Paths of all that lies beside the backbone that a module names, if it names one."""
    backbone = getattr(module, "base_model_prefix", "")
    if not isinstance(module._modules.get(backbone), nn.Module):
        return []
    return [canonical(path + name) for name in _children(module) if name != backbone]


def _last_layers(model: nn.Module) -> list[str]:
    """Paths of the last layer, and of those just before it that read the same input."""
    layers, found = _layers(model), []
    for path, layer in reversed(layers.items()):
        if found and not (_siblings(path, found[0]) and _alike(layer, layers[found[0]])):
            break
        found.insert(0, path)
    return found


def _siblings(one: str, other: str) -> bool:
    return one.rpartition(".")[0] == other.rpartition(".")[0]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two linear layers may read the same input, and neither the output of the other."""
    if not (isinstance(one, nn.Linear) and isinstance(other, nn.Linear)):
        return False
    width = one.in_features
    return width == other.in_features and width not in (one.out_features, other.out_features)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's layers outside the blocks, without embeddings and norms, by path."""
    blocks = [
        path
        for path, module in model.named_modules()
        if path
        and isinstance(module, nn.ModuleList)
        and not all(_alike(layer, module[-1]) for layer in module)
    ]
    return {
        path: module
        for path, module in model.named_modules()
        if path
        and not module._modules
        and _holds_parameters(module)
        and not (_is_embedding(path, module) or _is_norm(module) or within(path, blocks))
    }


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_embedding(path: str, module: nn.Module) -> bool:
    words = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    return isinstance(module, nn.Embedding) or ("embed" in words and not module._modules)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not module._modules


def _final_norms(model: nn.Module) -> set[str]:
    """Paths of the norm layers outside the stack of blocks; none if there is no such stack."""
    containers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    if not containers:
        return set()
    return {
        path
        for path, module in model.named_modules()
        if _is_norm(module) and not any(path.startswith(f"{c}." if c else "") for c in containers)
    }


def places(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """By name the layer index (None outside the blocks), and the module's path in the layer.

    ``transformer.h.3.attn.c_attn.weight`` is at ``(3, "attn.c_attn")``. In a model with several
    stacks of blocks the path begins with that of the stack. So an encoder and a decoder give
    ``(3, "encoder.block.attn")`` and ``(3, "decoder.block.attn")``.
    """
    split = {name: _split(name) for name in names}
    several = len({stack for stack, layer, _ in split.values() if layer is not None}) > 1
    return {
        name: (layer, ".".join([*stack, *inside] if several else inside))
        for name, (stack, layer, inside) in split.items()
    }


def _split(name: str) -> tuple[tuple[str, ...], int | None, list[str]]:
    """The path of the stack of blocks, the layer index in it, and the module's path in that."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    inside = parts if at is None else parts[at + 1 :]
    stack, layer = ((), None) if at is None else (tuple(parts[:at]), int(parts[at]))
    return stack, layer, inside[:-1] or inside


def parameter_count(model: nn.Module) -> int:
    """Number of a model's weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
