"""A task's text and label out of a row, or an error that says what the row holds instead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.tasks import Task, is_integer

HELD_OUT = "evaluate on held-out training rows (evaluate_on='heldout', --evaluate-on heldout)"
OTHER_SPLIT = "name another split (Task(test_split=...))"


class TaskColumns:
    """Reads the rows of one split for a task.

    Args:
        task: names the columns and the labels.
        split: "train" or "test".
        place: says in words where the row of a number is.
    """

    def __init__(self, task: Task, split: str, place: Callable[[int], str]) -> None:
        self.task, self.split, self._place = task, split, place
        self._known = task.num_labels if task.relabel is None else len(task.relabel)

    def texts(self, number: int, row: Mapping[str, Any]) -> dict[str, str]:
        """`text` of a row, and `text_pair` for a pair; they are empty where the columns are."""
        parts = [self._text(number, name, row[name]) for name in self.task.text]
        if self.task.pair:
            return {"text": parts[0], "text_pair": parts[1]}
        return {"text": " ".join(part for part in parts if part)}

    def _text(self, number: int, column: str, value: Any) -> str:
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.task.dataset}: column {column!r} is not UTF-8 in "
                    f"{self._place(number)}: save the data as UTF-8"
                ) from error
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{self.task.dataset}: column {column!r} holds {type(value).__name__}, not text, "
                f"in {self._place(number)}: name another column, or make it text"
            )
        return value or ""

    def label(self, value: Any) -> int | None:
        """The task's label for a label of the dataset; None if the task leaves it out.

        A boolean, a whole float and digits are read as the integer that they stand for.
        """
        number = value if is_integer(value) else self._whole(value)
        if number is None or not 0 <= number < self._known:
            raise DataError(f"{self.task.dataset}: {self._wrong_label(value)}")
        return int(number) if self.task.relabel is None else self.task.relabel[int(number)]

    def _whole(self, value: Any) -> int | None:
        if isinstance(value, bool):
            return int(value) if self._known == 2 else None
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return int(value) if isinstance(value, str | bytes) and value.isdigit() else None

    def _wrong_label(self, value: Any) -> str:
        column, labels = self.task.label, f"0 to {self._known - 1}"
        if value in (None, -1):  # a benchmark that keeps its labels secret has -1
            what = f"column {column!r} of the {self.split} split has rows without a label ({value})"
            way_out = f"{HELD_OUT}, or {OTHER_SPLIT}" if self.split == "test" else "remove them"
            return f"{what}: {way_out}"
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, str) and not value.lstrip("-").isdigit():
            return (
                f"the labels in column {column!r} are text, such as {value!r}: make them {labels}, "
                f"for example by class_encode_column({column!r}) of datasets"
            )
        return (
            f"label {value!r} in column {column!r}, but task {self.task.name} expects {labels}: "
            "correct label, num_labels or relabel"
        )


def check_columns(where: str, wanted: Collection[str], there: Collection[str]) -> None:
    """Raise DataError if a column is absent."""
    absent = [column for column in wanted if column not in there]
    if absent:
        raise DataError(f"{where} has no column {absent[0]!r}: use its columns, {', '.join(there)}")
