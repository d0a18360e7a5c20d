"""Runs that cannot be trusted or repeated are told from others: diverged, resumed, misspelt."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
from dataclasses import replace

import pytest
from toy_data import TASK, write_toy

from bitstack_nb import Protocol, run
from bitstack_nb.benchmark import all_strategies, sequence, sweep
from bitstack_nb.results.provenance import CODE, code_digest

SMALL = Protocol(
    tasks=("imdb", "ag_news"),
    train_size=16,
    test_size=8,
    max_length=16,
    epochs=1,
    batch_size=4,
    warmup_steps=0,
    n_batches=2,
)


@pytest.mark.parametrize("strategy", [s.name for s in all_strategies().values() if s.trains])
def test_a_diverged_run_is_an_error(tmp_path, strategy):
    rates = {"learning_rate": 1e30, "head_learning_rate": 1e32}
    with pytest.raises(ValueError, match=r"diverged|not finite|NaN|infinit") as caught:
        run(replace(SMALL, **rates).with_strategy(strategy), output=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("strategy", ["finetune", "random-mask", "replay", "lora"])
def test_any_seed_that_a_person_types(tmp_path, strategy):
    protocol = replace(SMALL, seed=20250101).with_strategy(strategy)
    assert run(protocol, output=tmp_path).protocol["seed"] == 20250101


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": float("inf")}, "epochs is inf, expected a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"seed": -1}, "seed is -1.*at least 0"),
        ({"seed": 2**63}, r"seed is 9223372036854775808.*below 2\*\*63"),
        ({"seed": 0.5}, "seed is 0.5.*whole"),
    ],
)
def test_numbers_that_make_no_run_get_one_line(settings, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **settings)


def test_a_run_has_one_name_however_its_folders_are_written(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    here = ("texts", "texts/", "./texts", "x/../texts", "~/work/texts", f"{tmp_path}/work/texts")
    home = ("~/texts", "../texts", f"{tmp_path}/texts/")
    for spelled in (here, home):
        protocols = [replace(SMALL, model=f"{path}/m", data=path) for path in spelled]
        assert len({protocol.name for protocol in protocols}) == 1
    assert protocols[0].name != replace(SMALL, model="texts/m", data="texts").name
    hub = replace(SMALL, model="a/b", data="hub", learning_rate=2e-3)
    assert hub.name.endswith("88667a93c3")  # as always


def test_a_result_of_other_data_or_weights_is_not_taken(tmp_path, folders):
    write_toy(tmp_path / "data")
    model = shutil.copytree(folders["bert"], tmp_path / "model")
    protocol = replace(SMALL, tasks=(TASK,), data=str(tmp_path / "data"), model=str(model))
    output = tmp_path / "runs"
    result = run(protocol, output=output)
    for file in (tmp_path / "data" / "toy" / "test.parquet", model / "model.safetensors"):
        before = file.read_bytes()
        file.write_bytes(before + b"other")
        with pytest.raises(ValueError, match=f"made with another {file}.*output folder"):
            run(protocol, output=output)
        failed = sweep([protocol], output=output)
        assert f"made with another {file}" in failed[protocol.name]
        file.write_bytes(before)
        assert sweep([protocol], output=output) == {}
        assert run(protocol, output=output) == result
        file.unlink()
        assert run(protocol, output=output) == result


def test_a_result_of_another_tiny_backbone_is_not_taken(tmp_path):
    protocol = replace(SMALL, tasks=("imdb",), epochs=0.1)
    digests = run(protocol, output=tmp_path).provenance["model"]["sha256"]
    file = tmp_path / f"{protocol.name}.json"
    file.write_text(file.read_text().replace(digests["model.safetensors"], "0" * 64))
    with pytest.raises(ValueError, match=r"made with another .*tiny.model\.safetensors"):
        run(protocol, output=tmp_path)


def test_home_is_expanded_for_the_output(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(replace(SMALL, tasks=("imdb",)), output="~/runs")
    assert len([*(tmp_path / "home" / "runs").glob("*.json")]) == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "home"]


def test_a_run_resumed_elsewhere_names_both_environments(tmp_path, monkeypatch, caplog):
    real = sequence.train

    def stop(*args, seed, **kwargs):
        if seed == 1:
            raise KeyboardInterrupt
        return real(*args, seed=seed, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sequence, "train", stop)
        run(SMALL, output=tmp_path)
    (state,) = tmp_path.glob("*.state/stage-1/numbers.json")
    numbers = json.loads(state.read_text())
    numbers["origin"] |= {"gpus": ["Tesla T4"], "git": {"commit": "0" * 40, "dirty": False}}
    first = numbers["origin"]["code"] = "1" * 64
    state.write_text(json.dumps(numbers))
    with caplog.at_level(logging.WARNING):
        origin = run(SMALL, output=tmp_path).provenance
    assert "goes on with another gpus, git, code" in caplog.text
    assert origin["gpus"] == ["Tesla T4"]
    (resumed,) = origin["resumed"]
    assert {"stage", "date", "gpus", "git", "code"} == resumed.keys()
    assert (resumed["stage"], resumed["gpus"]) == (1, [])
    assert origin["code"] == first and resumed["code"] == code_digest(CODE.parent)


def test_a_file_system_without_locks_is_named_with_a_way_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"cannot lock files.*choose an output folder") as caught:
        run(SMALL, output=tmp_path)
    assert str(tmp_path) in str(caught.value)
