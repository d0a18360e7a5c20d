"""A plain reference of the published method, for the tests to compare the real one with.

Bool masks, one concatenated and sorted copy of all scores, boolean-index restore: everything
that `bitstack_nb` avoids for memory or speed, written so that it can be checked by eye. It holds
its own list of eligible names and hooks into nothing: `train` masks and restores by hand.
"""

import torch
from torch import Tensor, nn


class Reference:
    """The method on `model`; `names` are the eligible parameters, masks are bool tensors."""

    def __init__(self, model: nn.Module, names: list[str], *, sparsity: float, budget: str) -> None:
        named = dict(model.named_parameters())
        self.model, self.sparsity, self.budget = model, sparsity, budget
        self.parameters = {name: named[name] for name in names}
        self.masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.parameters.items()}
        self.values = {n: p.detach().clone() for n, p in self.parameters.items()}

    def importance(self, loader: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sum over batches of |gradient|, dropout off, float32."""
        scores = {n: torch.zeros_like(p).float() for n, p in self.parameters.items()}
        self.model.eval()
        for batch in loader:
            self.model.zero_grad()
            self.model(**batch).loss.backward()
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    scores[name] += parameter.grad.abs().float()
        self.model.zero_grad()
        return scores

    def update(self, loader: list[dict[str, Tensor]], n_batches: int = 32) -> None:
        scores = self.importance(loader[:n_batches])
        if self.budget == "fresh":
            for name, score in scores.items():
                score[self.masks[name]] = 0
        everything = torch.cat([score.flatten() for score in scores.values()])
        k = round(self.sparsity * everything.numel())
        if k > 0:
            threshold = torch.sort(everything, descending=True).values[k - 1]
            for name, score in scores.items():
                self.masks[name] |= (score >= threshold) & (score > 0)
        self.values = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self.parameters.items():
            parameter[self.masks[name]] = self.values[name][self.masks[name]]

    def train(self, optimizer: torch.optim.Optimizer, loader: list, *, seed: int = 0) -> None:
        """As `tiny.train`, with gradients zeroed and values put back where locked."""
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for batch in loader:
                optimizer.zero_grad()
                self.model(**batch).loss.backward()
                for name, parameter in self.parameters.items():
                    parameter.grad[self.masks[name]] = 0
                optimizer.step()
                self.restore()
