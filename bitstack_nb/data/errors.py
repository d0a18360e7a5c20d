"""The error of this room; its message is one line that says what to do."""


class DataError(ValueError):
    """A task or dataset cannot be loaded or used as asked."""
