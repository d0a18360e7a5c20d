"""Asking the Hugging Face Hub: what is asked again, after how long, and when to give up.

Scope: what models (`checkpoints`) and datasets (`sources`) have in common. The Hub's clients retry
some requests for ever, others never, and take some failures for a missing file, all of it
differently in each version. Here a busy answer (429, 5xx) ends any request at once, and then, or
where the connection broke, the whole question is put again, a few times within `_PATIENCE`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import datasets
from huggingface_hub.utils import get_session, parse_ratelimit_headers

TIMEOUT = 10.0  # seconds until the Hub counts as out of reach
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second, third, ... try
_PATIENCE = 20.0  # seconds after the first try in which another may begin
_BUSY = {408: "timeout", 429: "too many requests"}  # and all from 500 on
# By name, because the clients took httpx first and then httpx2. A connection that cannot be made is
# not among them: without a network the answer should come at once.
_BROKEN = {"ReadError", "ReadTimeout", "RemoteProtocolError"}
# datasets reads up to 20 times, seconds apart, which adds up to a quarter of an hour and more.
_READ_ONCE = {
    "STREAMING_OPEN_MAX_RETRIES": 1,
    "STREAMING_OPEN_RETRY_INTERVAL": 0,
    "STREAMING_READ_MAX_RETRIES": 1,
    "STREAMING_READ_RETRY_INTERVAL": 0,
}

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class HubBusy(Exception):
    """The Hub failed in a way that may pass; `wait` is how many seconds it asks for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(f"{what}, asks to wait {wait:g} s" if wait else what)
        self.wait = wait


def ask(question: Callable[[], _T], name: str) -> _T:
    """The answer to a question that the Hub's clients put, tried again where that may help.

    Args:
        question: calls one of the clients.
        name: the dataset or model it is about, for the log.

    Raises:
        Exception: of the last try: an error of the clients, or HubBusy.
    """
    start, waits = time.monotonic(), iter(_WAITS)
    while True:
        try:
            with _single_try():
                return question()
        except Exception as error:
            wait = max(next(waits, math.inf), error.wait if isinstance(error, HubBusy) else 0)
            if not _may_pass(error) or time.monotonic() - start + wait > _PATIENCE:
                raise
            logger.info("%s: %s; trying again in %g s", name, first_line(error), wait)
        time.sleep(wait)


def rows(open_at: Callable[[int], Iterable[_T]], name: str) -> Iterator[_T]:
    """The rows of a stream, each once and in order; where it breaks, it is opened again there.

    Args:
        open_at: opens the stream at a row number.
        name: the dataset, for the log.

    Raises:
        Exception: as in :func:`ask`, of which each row is a question.
    """
    done, stream, end = 0, None, object()

    def next_row() -> Any:
        nonlocal stream
        # Put back only after it gave a row: a stream that broke would pretend to be at its end.
        rest, stream = stream, None
        rest = iter(open_at(done)) if rest is None else rest
        row = next(rest, end)
        stream = rest
        return row

    while (row := ask(next_row, name)) is not end:
        yield row
        done += 1


def first_line(error: BaseException) -> str:
    """Kind and first sentence of an error; what the clients advise next is about their own ways."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, HubBusy):
        return lines[0]
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:160]}" if lines else repr(error)


@contextmanager
def _single_try() -> Iterator[None]:
    """Raise HubBusy at a busy answer, past the clients' own retries and what they make of it.

    Broken connections are tried again by huggingface_hub, for some 20 s, but by datasets no more.
    """
    seen: list[HubBusy] = []

    def check(response: Any) -> None:  # an httpx.Response, or httpx2's
        if response.status_code in _BUSY or response.status_code >= 500:
            what = f"HTTP {response.status_code} {_BUSY.get(response.status_code, 'server error')}"
            seen.append(HubBusy(what, _asked_wait(response.headers)))
            raise seen[-1]

    config = vars(datasets.config)
    kept = {name: config[name] for name in _READ_ONCE if name in config}  # datasets 4 lacks some
    hooks = get_session().event_hooks["response"]
    hooks.append(check)
    config.update({name: _READ_ONCE[name] for name in kept})
    try:
        yield
    except Exception as error:
        if seen and error is not seen[-1]:
            raise seen[-1] from error  # they may have made "no such file" of it
        raise
    finally:
        config.update(kept)
        hooks.remove(check)


def _asked_wait(headers: Any) -> float:
    """Seconds that an answer asks to wait; 0 where it does not, or gives a date."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _may_pass(error: BaseException) -> bool:
    """Whether a busy answer or a connection that broke is behind an error."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return any(isinstance(link, HubBusy) or type(link).__name__ in _BROKEN for link in chain)
