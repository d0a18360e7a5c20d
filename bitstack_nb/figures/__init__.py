"""Figures of results and of a stack's locks, and the summary table."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "accuracy_matrices": "accuracy",
        "comparison": "accuracy",
        "forgetting_per_task": "accuracy",
        "paired_differences": "accuracy",
        "task_differences": "accuracy",
        "accuracy_for_storage": "accuracy",
        "drift_attribution": "accuracy",
        "ablation": "locks",
        "capacity": "locks",
        "lock_heatmaps": "locks",
        "mask_weight": "locks",
        "task_overlap": "locks",
        "own_weights": "locks",
        "mechanism": "picture",
        "chosen_tasks": "routing",
        "named": "report",
        "summary": "report",
        "write_figures": "report",
        "brief": "words",
        "conclusions": "words",
    },
)
