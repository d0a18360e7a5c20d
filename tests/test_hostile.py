"""Over a thousand damaged files: each is refused by our error, or what it gives is right."""

import ast
import copy
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import ADAMW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_results import run

import bitstack_nb
from bitstack_nb import BitStack, ExactRecall, maskfile
from bitstack_nb.maskfile import MaskFileError
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import format_table, table

# What stands where something else should, in JSON.
JUNK = [
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "3", "torch.float64", [], [[]], [0], {}, {"name": "x"},
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


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested lists and dicts."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def spoilt(value: Any, generator: random.Random) -> Any:
    """JSON with one value replaced by junk or by another value of it, left out, or repeated."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not (every := places(value)):
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


def spoilt_tensor(tensor: torch.Tensor, generator: random.Random) -> torch.Tensor:
    change: Callable[[], torch.Tensor] = generator.choice(
        [
            lambda: tensor.flatten()[:-1].clone(),
            lambda: torch.cat([tensor.flatten(), tensor.flatten()[:1]]),
            lambda: tensor.flatten().clone(),
            lambda: tensor[None].clone(),
            lambda: tensor.to(generator.choice([torch.float32, torch.float16, torch.int64])),
            lambda: torch.zeros_like(tensor),
            lambda: tensor.flip(0),
            lambda: -tensor,
            lambda: torch.full_like(tensor, generator.choice([1, 5, 100])),
            lambda: tensor.new_empty(0),
            lambda: tensor.new_ones(()),
        ]
    )
    return change().contiguous()


@pytest.fixture(scope="module", params=["BitStack", "ExactRecall"])
def good(request, tmp_path_factory):
    """Three tasks of each method, and its file."""
    model = tiny.plain()
    if request.param == "BitStack":
        stack = BitStack(model, 0.1, budget="fresh")
        for task in range(3):
            stack.update(tiny.batches(2, seed=task))
    else:
        stack = ExactRecall(model, 0.2, importance="gradient")
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        for task in range(3):
            stack.begin(str(task), loader=tiny.batches(2, seed=task), head_steps=1)
            tiny.train(model, optimizer, tiny.batches(1, seed=task))
            stack.close()
    path = tmp_path_factory.mktemp(request.param) / "stack.safetensors"
    stack.save(path)
    return stack, path


def load_or_refuse(path: Path, method: type) -> BitStack | ExactRecall | None:
    """The stack, or None where our error is raised and the model is untouched."""
    model = tiny.plain()
    before = tiny.snapshot(model)
    try:
        return method.load(path, model)
    except MaskFileError:
        assert not any(c.any() for c in tiny.changed(model, before).values())
        assert not any(p._backward_hooks for p in model.parameters())
        return None


def plain(state: Any) -> Any:
    """A state in comparable form."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), state.shape, tiny.as_bits(state).tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list) else state


def test_damaged_bytes_of_a_mask_file(good, tmp_path):
    """What loads is what was saved, to the last bit."""
    stack, path = good
    expected, data = plain(stack.state_dict()), path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator, file, loaded = random.Random(0), tmp_path / "damaged.safetensors", 0
    for number in range(300):
        file.write_bytes(damaged(data, generator, header=header))
        found = load_or_refuse(file, type(stack))
        if found is not None:
            loaded += 1
            assert plain(found.state_dict()) == expected, number
    assert loaded < 30  # some change nothing: a digit by itself


def test_mask_files_with_other_contents(good, tmp_path):
    """Written by hand, digest and all: consistent, or refused."""
    stack, path = good
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    generator, file, loaded = random.Random(1), tmp_path / "spoilt.safetensors", 0
    for number in range(150):
        other_tensors, other = dict(tensors), dict(metadata)
        if generator.random() < 0.5:
            key = generator.choice(sorted(tensors))
            other_tensors[key] = spoilt_tensor(tensors[key], generator)
        else:
            key = generator.choice(["parameters", "settings", "values", "names", "base"])
            value = spoilt(json.loads(metadata.get(key, "0")), generator)
            other[key] = json.dumps(value, ensure_ascii=True)
        other["digest"] = maskfile._digest(other_tensors, other)
        save_file(other_tensors, file, metadata=other)
        if (found := load_or_refuse(file, type(stack))) is not None:
            loaded += 1
            assert_consistent(found, number)
    assert 0 < loaded < 75


def assert_consistent(stack: BitStack, number: int) -> None:
    """Counts are those of the masks, values those in the model, and it can be kept."""
    assert stack.verify() == 0, number
    locked = stack.stats()["locked"]
    assert locked == sum(int(mask.sum()) for mask in stack.masks.values()), number
    rows = stack.layer_table()
    assert rows["added"].sum() == locked, number
    assert (rows["added"] >= 0).all() and (rows["added"] <= rows["selected"]).all(), number
    assert (rows["selected"] <= rows["eligible"]).all(), number
    with tempfile.TemporaryDirectory() as folder:
        stack.save(Path(folder) / "again.safetensors")
        again = load_or_refuse(Path(folder) / "again.safetensors", type(stack))
    assert plain(again.state_dict()) == plain(stack.state_dict()), number


@pytest.fixture(scope="module")
def result_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "result.json"
    run().save(path)
    return path.read_text()


def load_result(file: Path, number: int) -> None:
    """Refuse it by our error, or it can be shown, kept and read again."""
    try:
        result = Result.load(file)
    except ResultError as error:
        assert str(file) in str(error)
        return
    assert format_table(table([result])), number
    result.save(file)
    assert Result.load(file) == result, number


def test_damaged_bytes_of_a_result(result_text, tmp_path):
    generator, file = random.Random(2), tmp_path / "damaged.json"
    for number in range(200):
        file.write_bytes(damaged(result_text.encode(), generator, header=2000))
        load_result(file, number)


def test_results_with_other_contents(result_text, tmp_path):
    generator, file, whole = random.Random(3), tmp_path / "spoilt.json", json.loads(result_text)
    for number in range(300):
        # Top level first: there are few of those, and many values in the lock records.
        key = generator.choice(sorted(whole))
        other = {**whole, key: spoilt(whole[key], generator)}
        file.write_text(json.dumps(other))
        load_result(file, number)


def test_nesting_without_end(tmp_path):
    file = tmp_path / "deep.json"
    file.write_text("[" * 200_000)
    with pytest.raises(ResultError, match=r"deep\.json"):
        Result.load(file)


def test_nothing_is_unpickled():
    """A pickle runs code when it is loaded. numpy, torch and joblib load some too if they may."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path in Path(bitstack_nb.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert forbidden.isdisjoint(name.name for name in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in forbidden, path
                of_joblib = {n.name for n in node.names} if node.module == "joblib" else set()
                assert of_joblib.isdisjoint({"load", "dump", "Memory"}), path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "joblib.load"), path
                assert "allow_pickle" not in {k.arg for k in node.keywords}, path
