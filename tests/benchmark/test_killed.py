"""Kill -9 at random moments of a run: each time it resumes to an unbroken run's result.

A moment is a phase of the run and a number of calls and returns counted in it, which does not
depend on how busy the machine is. A forked life that reaches it kills itself with SIGKILL there:
nothing is cleaned up, nothing flushed. Then another life resumes the run.
"""

import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bitstack_nb import Protocol, Result, load_results, run
from bitstack_nb.benchmark.sequence import TaskSequence

SMALL = Protocol(
    tasks=("imdb", "ag_news"), train_size=16, test_size=12, max_length=12, epochs=1, batch_size=8
)
# The phases that a life can die in, and how often it does, once in each part of all moments.
PHASES = {
    "training": (TaskSequence.train_stage, 1),
    "locking": (TaskSequence.lock, 1),
    "evaluation": (TaskSequence.evaluate, 1),
    "saving": (TaskSequence.save_stage, 3),
    "saving the result": (Result.save, 1),
}
SAME = ("matrix", "metrics", "predictions", "locks", "lock_stats", "importance", "storage", "drift")


class Clock:
    """A profile function that counts by phase, and kills the process at a moment if there is one.

    It sees calls of C functions too, so a moment may lie between two writes of a file.
    """

    def __init__(self, last: tuple[str, int] | None = None) -> None:
        self.counts = dict.fromkeys(PHASES, 0)
        self._last, self._phase = last, None
        self._begins = {id(method.__code__): phase for phase, (method, _) in PHASES.items()}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and (phase := self._begins.get(id(frame.f_code))):
            self._phase = phase if event == "call" else None
        if self._phase is not None:
            self.counts[self._phase] += 1
            if (self._phase, self.counts[self._phase]) == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(protocol: Protocol, folder: Path, moment: tuple[str, int] | None = None) -> int:
    """A run in a process of its own, killed at a moment: the signal it died of, or 0."""
    child = os.fork()
    if child == 0:
        try:
            sys.setprofile(moment and Clock(moment))
            run(protocol, output=folder)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), "a life ended in an error"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize("strategy", ["bitstack", "recall"])
def test_killed_at_random_moments_ends_like_an_unbroken_run(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what a killed Trainer leaves
    protocol = SMALL.with_strategy(strategy, sparsity=0.3, n_batches=2)
    unbroken = run(protocol, output=tmp_path / "unbroken")  # which imports what is imported late
    clock = Clock()
    sys.setprofile(clock)
    run(protocol, output=tmp_path / "counted")
    sys.setprofile(None)
    generator, left = random.Random(strategy), []
    for phase, (_, deaths) in PHASES.items():
        for part in range(deaths):
            number = 1 + int(clock.counts[phase] * (part + generator.random()) / deaths)
            moment, folder = (phase, number), tmp_path / f"{phase} {part}"
            assert forked(protocol, folder, moment) == signal.SIGKILL
            left.append(sorted(stage.name for stage in folder.glob("*.state/*")))
            assert not list(folder.glob("*.json"))
            assert forked(protocol, folder) == 0
            (resumed,) = load_results(folder)
            for name in SAME:
                assert getattr(resumed, name) == getattr(unbroken, name), (name, moment)
            assert not list(folder.glob("*.state")), moment
    # Else this shows less than it says: before any stage was saved, after, and in between.
    assert [] in left and ["stage-1"] in left and left[-1] == ["stage-1", "stage-2"]
    assert any(name.endswith(".tmp") for names in left for name in names), left
