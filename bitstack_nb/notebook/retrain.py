"""A benchmark run in a process of its own, with its progress, its end, and a way to stop it.

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
from collections.abc import Callable
from pathlib import Path

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.results.result import Result, ResultError

_RUN = (
    "import json, sys; from bitstack_nb import Protocol, run; "
    "run(Protocol.from_dict(json.loads(sys.argv[1])), output=sys.argv[2], progress=True)"
)
_running: Retraining | None = None


class Retraining:
    """A run that has just been started; one at a time, the former is stopped.

    The process does not outlive this one: it writes its progress into a pipe, and ends when nobody
    is left to read it.

    Args:
        protocol: the run.
        output: folder for its result, and its state until then.
        on_progress: called with batches done and batches in all.
        on_end: called once, with the result, or None and the reason why there is none.

    Both are called from a thread that reads the pipe.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        output: str | os.PathLike[str],
        on_progress: Callable[[int, int], None],
        on_end: Callable[[Result | None, str], None],
    ) -> None:
        global _running
        stop_running()
        self._file = Path(output) / f"{protocol.name}.json"
        self._on_progress, self._on_end = on_progress, on_end
        self._stopped = False
        # A clone that was not installed is found by its path.
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, json.dumps(protocol.to_dict()), str(output)],
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
        last = ""
        for line in self.process.stderr:  # a carriage return of tqdm ends a line too
            if found := re.search(r" (\d+)/(\d+) \[", line):
                self._on_progress(*map(int, found.groups()))
            last = line.strip() or last
        self.process.wait()
        self._on_end(*self._outcome(last))

    def _outcome(self, last: str) -> tuple[Result | None, str]:
        if self._stopped:
            return None, "stopped; the same settings go on behind the last finished task"
        if self.process.returncode:
            return None, f"the run failed: {last}"
        try:
            return Result.load(self._file), ""
        except ResultError as error:
            return None, str(error)


def stop_running() -> None:
    """Stop the run that was started last, if it has not ended."""
    if _running is not None:
        _running.stop()
