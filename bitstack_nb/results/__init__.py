"""What runs gave: results, metrics, tables with intervals, paired comparisons."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Result": "result",
        "ResultError": "result",
        "load_results": "result",
        "table": "tables",
        "readable": "tables",
        "format_table": "tables",
        "provenance_table": "tables",
        "paired_table": "pairs",
        "paired_tasks": "pairs",
        "verdict": "pairs",
    },
)
