"""A smoke run killed at random moments: ``python -m tests.killing FOLDER``.

One process imports everything, then forks a life for each run, so that twenty deaths cost seconds.
A moment is a phase of the run and a number of calls and returns counted in it, which does not
depend on how busy the machine is. The life that reaches it kills itself with SIGKILL there: nothing
is cleaned up, nothing flushed. Then another life resumes the run. ``report.json`` says what was
done; the results lie in FOLDER.
"""

import gc
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bitstack_nb import Protocol, Result, run
from bitstack_nb.benchmark.inputs import load_inputs
from bitstack_nb.benchmark.sequence import TaskSequence

# For models this small a second thread only waits, for minutes on a machine that is busy.
torch.set_num_threads(1)

SMALL = Protocol(
    tasks=("imdb", "ag_news"), train_size=16, test_size=12, max_length=12, epochs=1, batch_size=8
)
PROTOCOLS = [
    SMALL.with_strategy("bitstack", sparsity=0.3, n_batches=2),
    SMALL.with_strategy("recall", sparsity=0.3, n_batches=2),
]
# What a life can die in, and how often it does, for each strategy.
PHASES = {
    "training": (TaskSequence._train, 3),
    "locking": (TaskSequence._lock, 1),
    "evaluation": (TaskSequence._evaluate, 2),
    "saving": (TaskSequence._checkpoint, 3),
    "saving the result": (Result.save, 1),
}


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


def forked(life: Callable[[], None]) -> int:
    """Run ``life`` in a process of its own: the signal it died of, or 0."""
    child = os.fork()
    if child == 0:
        try:
            life()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a life ended in an error")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def counted(protocol: Protocol, folder: Path) -> dict[str, int]:
    """An unbroken run, and how many moments each of its phases has."""

    def life() -> None:
        clock = Clock()
        sys.setprofile(clock)
        run(protocol, output=folder)
        sys.setprofile(None)
        (folder / "counts").write_text(json.dumps(clock.counts))

    forked(life)
    return json.loads((folder / "counts").read_text())


def broken(protocol: Protocol, folder: Path, moment: tuple[str, int]) -> dict[str, Any]:
    """A run killed at a moment and resumed: what was there between, and the signals."""

    def life() -> None:
        sys.setprofile(Clock(moment))
        run(protocol, output=folder)

    first = forked(life)
    left = sorted(p.name for p in folder.glob("*.state/stage-*"))
    second = forked(lambda: run(protocol, output=folder) and None)
    return {"moment": moment, "left": left, "signals": [first, second], "folder": str(folder)}


def main(folder: Path) -> None:
    """All lives, one after the other."""
    # Also what a Trainer does not clean up when it is killed.
    tempfile.tempdir = str(folder)
    load_inputs(SMALL, torch.device("cpu"))  # imports what transformers imports late
    gc.freeze()  # or every Trainer of every life goes through all that was imported
    generator = random.Random(0)
    report = {}
    for protocol in PROTOCOLS:
        home = folder / protocol.strategy
        counts = counted(protocol, home / "unbroken")
        moments = [
            (phase, generator.randint(1, counts[phase]))
            for phase, (_, deaths) in PHASES.items()
            for _ in range(deaths)
        ]
        report[protocol.strategy] = [
            broken(protocol, home / str(number), moment) for number, moment in enumerate(moments)
        ]
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
