"""What locking costs in time and memory."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CostReport": "report",
        "cost_table": "report",
        "measure_costs": "report",
        "measure_padding": "report",
        "cost_growth": "plots",
    },
)
