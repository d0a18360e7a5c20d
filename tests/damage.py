"""Damage to files and to their contents, by a seeded generator."""

import copy
import random
from typing import Any

# What stands where something else should, in JSON.
JUNK = [
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "3", "torch.float64", [], [[]], [0], {}, {"name": "x"},
]  # fmt: skip


def damaged(data: bytes, generator: random.Random, *, header: int) -> bytes:
    """One to three changes; half of them in the first ``header`` bytes."""
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        end = min(header, len(changed)) if generator.random() < 0.5 else len(changed)
        at, size = generator.randrange(max(end, 1)), generator.choice([1, 2, 8, 64])
        kind = generator.choice(["flip", "digit", "overwrite", "zero", "cut", "delete", "repeat"])
        if kind == "flip" and changed:
            changed[at % len(changed)] ^= 1 << generator.randrange(8)
        elif kind == "digit":
            digits = [i for i, byte in enumerate(changed[:end]) if chr(byte).isdigit()]
            if digits:
                changed[generator.choice(digits)] = ord(generator.choice("0123456789"))
        elif kind == "overwrite":
            changed[at : at + size] = generator.randbytes(size)
        elif kind == "zero":
            changed[at : at + size] = bytes(size)
        elif kind == "cut":
            del changed[at:]
        elif kind == "delete":
            del changed[at : at + size]
        else:
            changed[at:at] = changed[at : at + size]
    return bytes(changed)


def spoilt(value: Any, generator: random.Random) -> Any:
    """JSON with one value replaced by junk, left out, or repeated."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not (every := _places(value)):
        return generator.choice(JUNK)
    *above, last = generator.choice(every)
    parent = value
    for key in above:
        parent = parent[key]
    kind = generator.choice(["junk", "junk", "junk", "out", "repeat"])
    if kind == "out":
        del parent[last]
    elif kind == "repeat" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[last]))
    else:
        parent[last] = generator.choice(JUNK)
    return value


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested lists and dicts."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += _places(item, (*path, key))
    return found
