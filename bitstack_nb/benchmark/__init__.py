"""The benchmark: one run is a strategy on a sequence of tasks."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Protocol": "protocol",
        "PRESETS": "protocol",
        "default_preset": "protocol",
        "all_strategies": "strategies",
        "strategy_names": "strategies",
        "run": "runner",
        "estimate": "estimates",
        "sweep": "sweeps",
        "find_device": "training",
        "LockCurves": "curves",
    },
)
