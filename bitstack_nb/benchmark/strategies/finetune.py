"""Fine-tuning: one backbone, task after task, and nothing against forgetting."""

from bitstack_nb.benchmark.strategy import Strategy


class FineTune(Strategy):
    """Plain fine-tuning: every hook does nothing."""

    name, label, order, colour = "finetune", "fine-tuning", 20, "#0173B2"
