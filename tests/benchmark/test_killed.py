"""Kill -9 at twenty random moments of a smoke run: each resumes to an unbroken run's result."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitstack_nb import load_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """Every killed and resumed run by strategy, and where the unbroken ones are."""
    if not hasattr(os, "fork"):
        pytest.skip("lives are forked")
    folder = tmp_path_factory.mktemp("lives")
    command = [sys.executable, "-m", "tests.killing", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("strategy", ["bitstack", "recall"])
def test_killed_at_random_moments_ends_like_an_unbroken_run(lives, strategy):
    folder, report = lives
    (unbroken,) = load_results(folder / strategy / "unbroken")
    for life in report[strategy]:
        assert life["signals"] == [signal.SIGKILL, 0], life
        (resumed,) = load_results(life["folder"])
        for part in ("matrix", "metrics", "locks", "lock_stats", "importance", "storage", "drift"):
            assert getattr(resumed, part) == getattr(unbroken, part), (part, life)
        assert not [*Path(life["folder"]).glob("*.state")], life


def test_the_moments_lie_in_every_part_of_a_run(lives):
    """Else the test above shows less than it says: some died before a stage was saved, some after,
    some with a stage half written."""
    _, report = lives
    every = [life for strategy in report.values() for life in strategy]
    assert len(every) == 20
    assert {life["moment"][0] for life in every} >= {"training", "evaluation", "saving"}
    left = {tuple(life["left"]) for life in every}
    assert () in left and ("stage-1",) in left
    assert any(name.endswith(".tmp") for names in left for name in names)
