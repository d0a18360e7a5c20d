"""BitStack: continual learning with cumulative 1-bit masks, and the notebooks' benchmark."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BitStack": "stack",
        "ExactRecall": "recall",
        "Protocol": "benchmark.protocol",
        "Result": "results.result",
        "Task": "data.tasks",
        "TaskBank": "bank",
        "load_results": "results.result",
        "run": "benchmark.runner",
        "__version__": "version",
    },
)
