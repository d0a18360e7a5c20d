"""A run whose disk fills up or whose folder cannot be written: a clear error, nothing lost."""

import os
from pathlib import Path

import pytest

from bitstack_nb import Protocol, run
from bitstack_nb.benchmark import sequence

PROTOCOL = Protocol(
    strategy="bitstack",
    n_batches=2,
    tasks=("imdb", "ag_news"),
    train_size=16,
    test_size=12,
    max_length=12,
    epochs=1,
)


@pytest.mark.parametrize(
    ("full_in", "message", "trained_again"),
    [
        ("train", "cannot write the state after stage 2.*room", 1),
        ("Result", "cannot write the result.*room", 0),
    ],
)
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, full_in, message, trained_again):
    """It fills up while the last stage is trained, or when only the result is left to write."""
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    unbroken = run(PROTOCOL, output=tmp_path / "unbroken")
    earlier = tmp_path / "earlier.json"
    unbroken.save(earlier)
    whole, real, calls = earlier.read_bytes(), getattr(sequence, full_in), []

    def filling(*args, **kwargs):
        calls.append(args)
        if full_in == "Result" or len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return real(*args, **kwargs)

    try:
        with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
            patch.setattr(sequence, full_in, filling)
            run(PROTOCOL, output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert earlier.read_bytes() == whole
    assert not [*tmp_path.rglob("*.tmp")]  # room is short
    trained, real = [], sequence.train
    monkeypatch.setattr(sequence, "train", lambda *a, **k: trained.append(a) or real(*a, **k))
    resumed = run(PROTOCOL, output=tmp_path)
    assert (resumed.matrix, resumed.locks) == (unbroken.matrix, unbroken.locks)
    assert len(trained) == trained_again


@pytest.mark.parametrize("where", ["a file", "read-only", "/proc"])
def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, monkeypatch, where):
    monkeypatch.setattr(sequence, "train", lambda *args, **kwargs: pytest.fail("too late"))
    folder = Path(where) if where == "/proc" else tmp_path / "out"  # not even root writes there
    if where == "a file":
        folder.write_text("mine")
    elif where == "read-only":
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("root may write anywhere")
    with pytest.raises(OSError, match=f"cannot write to {folder}.*choose another"):
        run(PROTOCOL, output=folder)
    assert where != "a file" or folder.read_text() == "mine"
