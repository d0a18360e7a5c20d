"""Time and memory that locking costs beside plain training."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CostReport": "report",
        "bank_table": "bank",
        "cost_table": "report",
        "measure_bank": "bank",
        "cost_findings": "report",
        "measure_costs": "report",
        "measure_growth": "report",
        "measure_recall": "report",
        "cost_growth": "plots",
        "cost_ratios": "plots",
        "write_cost_figures": "plots",
    },
)
