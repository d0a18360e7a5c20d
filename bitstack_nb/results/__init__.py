"""Recorded runs: results, tables with intervals over seeds, paired comparisons and tests."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Result": "result",
        "ResultError": "result",
        "load_results": "result",
        "frame": "frames",
        "task_frame": "frames",
        "table": "tables",
        "readable": "tables",
        "format_table": "tables",
        "provenance_table": "tables",
        "paired_table": "pairs",
        "paired_tasks": "pairs",
        "verdict": "pairs",
        "forward_transfers": "pairs",
        "contrasts": "significance",
        "confusion": "predictions",
        "macro_f1": "predictions",
        "mcnemar": "predictions",
    },
)
