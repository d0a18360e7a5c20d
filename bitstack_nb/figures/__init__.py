"""Figures of results and of a stack's locks."""

from bitstack_nb.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "accuracy_matrices": "accuracy",
        "comparison": "accuracy",
        "forgetting_per_task": "accuracy",
        "paired_differences": "accuracy",
        "accuracy_for_storage": "evidence",
        "drift_attribution": "evidence",
        "task_differences": "evidence",
        "ablation": "locks",
        "capacity": "locks",
        "lock_heatmaps": "locks",
        "mask_weight": "masks",
        "task_overlap": "masks",
        "owned_entries": "masks",
        "ownership": "masks",
        "mechanism": "picture",
        "summary": "reports",
        "write_figures": "figures",
    },
)
