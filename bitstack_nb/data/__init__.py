"""Tasks, their samples, and backbones: from the Hub, from folders, or built without a download."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AG_NEWS_BINARY": "tasks",
        "FIVE_TASKS": "tasks",
        "Task": "tasks",
        "find_task": "tasks",
        "load_task": "loading",
        "DataError": "errors",
        "BackboneError": "backbones",
        "load_backbone": "backbones",
        "encode": "backbones",
        "collate": "backbones",
    },
)
