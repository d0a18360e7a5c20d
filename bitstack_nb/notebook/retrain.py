"""Benchmark runs in a process of their own, with their progress, end, and a way to stop them.

A process leaves the notebook's random numbers and threads alone. Stopping it is safe: finished
tasks are kept, and the same run goes on from there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.figures.methods import method
from bitstack_nb.results.result import Result, ResultError

_RUN = (
    "import json, sys; from bitstack_nb import Protocol, run\n"
    "for settings in json.loads(sys.argv[1]):\n"
    "    print('strategy', settings['strategy'], file=sys.stderr)\n"
    "    run(Protocol.from_dict(settings), output=sys.argv[2], progress=True)"
)
_running: Retraining | None = None


class Retraining:
    """Runs, one after the other, that have just been started; former ones are stopped.

    The process does not outlive this one: it writes its progress into a pipe, and ends when nobody
    is left to read it.

    Args:
        protocols: the runs; one that is in ``output`` already is read from there.
        output: folder for their results, and their state until then.
        on_progress: called with a run's strategy, its batches done and in all.
        on_end: called once, with the results, or none and the reason why there are none.

    Both are called from a thread that reads the pipe.
    """

    def __init__(
        self,
        protocols: Sequence[Protocol],
        *,
        output: str | os.PathLike[str],
        on_progress: Callable[[str, int, int], None],
        on_end: Callable[[Sequence[Result], str], None],
    ) -> None:
        global _running
        stop_running()
        self._files = [
            Path(output).expanduser() / f"{protocol.name}.json" for protocol in protocols
        ]
        self._on_progress, self._on_end = on_progress, on_end
        self._stopped = False
        # A clone that was not installed is found by its path.
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, json.dumps([p.to_dict() for p in protocols]), str(output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        _running = self
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """End the process if it still runs, and wait until it has ended."""
        if self.process.poll() is None:
            self._stopped = True
            self.process.terminate()
        self.process.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until ``on_end`` has returned, at most ``timeout`` seconds; whether it has."""
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def _follow(self) -> None:
        last = strategy = ""
        for line in self.process.stderr:  # a carriage return of tqdm ends a line too
            if found := re.search(r" (\d+)/(\d+) \[", line):
                self._on_progress(strategy, *map(int, found.groups()))
            elif line.startswith("strategy "):
                strategy = method(line.split()[1]).label
            last = line.strip() or last
        self.process.wait()
        self._on_end(*self._outcome(last))

    def _outcome(self, last: str) -> tuple[Sequence[Result], str]:
        if self._stopped:
            return [], "stopped; the same settings go on after the last finished task"
        if self.process.returncode:
            return [], f"the run failed: {last}"
        try:
            return [Result.load(file) for file in self._files], ""
        except ResultError as error:
            return [], str(error)


def stop_running() -> None:
    """Stop the run that was started last, if it has not ended."""
    if _running is not None:
        _running.stop()
