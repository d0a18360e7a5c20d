"""What a failed request to the Hugging Face Hub means, in one line.

Scope: models (`pretrained.py`), banks (`bank.py`) and datasets (`data/sources.py`) share these
errors. Retries, downloads
and caches are left to huggingface_hub and datasets.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

TIMEOUT = 10.0  # seconds until the Hub counts as out of reach
_NO_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, LocalEntryNotFoundError)


@contextmanager
def hub_errors(
    kind: str, name: str, *, raises: type[ValueError], instead: str = ""
) -> Iterator[None]:
    """Turn any error that the Hub's clients raise in the block into one of one line.

    Args:
        kind: "model" or "dataset".
        name: its name on the Hub.
        raises: the error to raise.
        instead: what works without the Hub.
    """
    try:
        yield
    except raises:  # one of one line already
        raise
    except Exception as error:  # httpx, fsspec and datasets each raise errors of their own
        raise raises(_explain(error, kind, name, instead)) from error


def first_line(error: BaseException) -> str:
    """The kind and the first sentence of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:160]}" if lines else repr(error)


def _explain(error: Exception, kind: str, name: str, instead: str) -> str:
    causes = _causes(error)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    # datasets replaces the GatedRepoError by an error of its own.
    if isinstance(answer, GatedRepoError) or "is a gated dataset" in str(error):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"{name} is gated: accept its licence on {page} and log in (hf auth login)"
    if answer is not None and answer.response.status_code == 401:
        # The Hub says 401 for an unknown name, too; only its own words tell a bad token.
        said = (answer.server_message or "").partition("\n")[0]
        if "token" in said.lower() or "credentials" in said.lower():
            return f"{name}: the Hub refused your token ({said}): renew it or unset HF_TOKEN"
    if isinstance(answer, RepositoryNotFoundError) or isinstance(error, HFValidationError):
        return (
            f"no {kind} {name!r} on the Hub, or a private one: check the name on "
            f"https://huggingface.co/{kind}s, or log in (hf auth login)"
        )
    if answer is not None:
        status = answer.response.status_code
        return f"{name}: the Hub answered HTTP {status}: try again later, or {instead}"
    # datasets says so in three lines, the names in the second.
    names = re.search(r"(?:available configs|Available): \[([^\]]+)\]", str(error))
    if names:
        return f"{name} has several configurations: choose with Task(config=...) one of {names[1]}"
    if decoding := next((cause for cause in causes if isinstance(cause, UnicodeDecodeError)), None):
        found = first_line(decoding)
        return f"{name}: a file on the Hub is not UTF-8 ({found}): save it as UTF-8, or {instead}"
    if any(isinstance(cause, _NO_NETWORK) for cause in causes):
        return f"{name}: no connection to the Hub and no copy in the cache: connect, or {instead}"
    return f"{name}: cannot be read from the Hub ({first_line(error)}): {instead}"


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and the errors that led to it."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
