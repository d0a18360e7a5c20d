"""The smoke benchmark in a process of its own: its progress, its end, and a way to stop it.

A process, so that neither the notebook's random numbers nor its threads are touched, and stopping
is safe: what was finished is kept, and the same run goes on from there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from bitstack_nb.results.result import Result, ResultError

SETTINGS = ("--preset", "smoke")
# A line of tqdm: what: 12%|bar| done/total [time so far<time left, ...
_PROGRESS = re.compile(
    r"(?P<what>.*?): +\d+%\|.*\| (?P<done>\d+)/(?P<total>\d+) \[.*?<(?P<left>.*?),"
)
_running: Retraining | None = None


class Retraining:
    """A run of BitStack that has just been started; one at a time, the former is stopped.

    The process does not outlive this one: it writes its progress into a pipe, and ends when nobody
    is left to read it.

    Args:
        sparsity, budget: of the run.
        output: folder for its result, and its state until then.
        on_progress: called with batches done, batches in all and what is being done, in words.
        on_end: called once, with the result, or None and why there is none.

    Both are called from a thread that reads the pipe.
    """

    def __init__(
        self,
        sparsity: float,
        budget: str,
        *,
        output: str | os.PathLike[str],
        on_progress: Callable[[int, int, str], None],
        on_end: Callable[[Result | None, str], None],
    ) -> None:
        global _running
        stop_running()
        self._on_progress, self._on_end = on_progress, on_end
        self._stopped = False
        command = [sys.executable, "-m", "bitstack_nb", "run", *SETTINGS, "--strategy", "bitstack"]
        command += ["--sparsity", f"{sparsity:g}", "--budget", budget, "--output", str(output)]
        # A clone that was not installed is found by its path.
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        _running = self
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """End the process if it still runs, and wait until it has ended."""
        if self._process.poll() is None:
            self._stopped = True
            self._process.terminate()
        self._process.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until ``on_end`` has returned, at most ``timeout`` seconds; whether it has."""
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def _follow(self) -> None:
        last = deque(maxlen=5)
        # tqdm ends its lines with a carriage return, which reads as an end of line.
        for line in self._process.stderr:
            if found := _PROGRESS.match(line):
                what = f"{found['what']}, {found['left']} left"
                self._on_progress(int(found["done"]), int(found["total"]), what)
            elif line.strip():
                last.append(line.strip())
        shown = self._process.stdout.read()
        self._process.wait()
        self._on_end(*self._outcome(shown.strip().splitlines(), list(last)))

    def _outcome(self, shown: list[str], errors: list[str]) -> tuple[Result | None, str]:
        if self._process.returncode != 0:
            if self._stopped or self._process.returncode == 130:
                return None, "stopped; the same settings go on behind the last finished task"
            reason = errors[-1] if errors else f"exit status {self._process.returncode}"
            return None, f"the run failed: {reason.removeprefix('error: ')}"
        try:
            # The command line ends with the path of each result.
            return Result.load(shown[-1].strip()), ""
        except ResultError as error:
            return None, str(error)


def stop_running() -> None:
    """Stop the run that was started last, if it has not ended."""
    if _running is not None:
        _running.stop()
