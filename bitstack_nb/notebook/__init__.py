"""What notebooks need beside the package: the first cell, parameters, and the explorer."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "to_install": "first_cell",
        "describe": "first_cell",
        "batches_of": "texts",
        "learn": "texts",
        "answers": "texts",
        "three_texts": "texts",
        "report": "checks",
        "plan": "planning",
        "duration": "planning",
        "default_output": "first_cell",
        "output_folder": "first_cell",
        "several": "parameters",
        "nearest_runs": "parameters",
        "explore": "explorer",
    },
)
