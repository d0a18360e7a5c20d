"""The errors of this room; each message is one line that says what to do."""


class DataError(ValueError):
    """A task or dataset cannot be loaded or used as asked."""


class BackboneError(ValueError):
    """A backbone cannot be loaded or used as asked."""
