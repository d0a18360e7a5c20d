"""Plain references of the published method and of exact recall, to compare the real ones with.

Bool masks, one concatenated and sorted copy of all scores, boolean-index restore: everything
that `bitstack_nb` avoids for memory or speed, written so that it can be checked by eye. They hold
their own list of eligible names and hook into nothing: `train` masks and restores by hand.
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


class RecallReference(Reference):
    """Exact recall: a bool mask and a full copy of the backbone per task."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        *,
        sparsity: float,
        heads: list[str],
        importance: str = "gradient",
    ) -> None:
        super().__init__(model, names, sparsity=sparsity, budget="fresh")
        self.heads = [model.get_parameter(name) for name in heads]
        self.base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in heads}
        self.owned = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.parameters.items()}
        self.models: list[dict[str, Tensor]] = []
        self.random = importance == "random"

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)

    def begin(self, loader: list, *, steps: int, learning_rate: float) -> None:
        self.put(self.base)
        optimizer = torch.optim.Adam(self.heads, lr=learning_rate)
        self.model.eval()
        for step in range(steps):
            optimizer.zero_grad()
            self.model(**loader[step % len(loader)]).loss.backward()
            optimizer.step()
        scores = self.drawn() if self.random else self.importance(loader)
        for name, score in scores.items():
            score[self.owned[name]] = 0
        everything = torch.cat([score.flatten() for score in scores.values()])
        k = round(self.sparsity * everything.numel())
        chosen = torch.zeros_like(everything, dtype=torch.bool)
        chosen[torch.sort(everything, descending=True, stable=True).indices[:k]] = True
        chosen &= everything > 0
        for name, parameter in self.parameters.items():
            own, chosen = chosen[: parameter.numel()], chosen[parameter.numel() :]
            self.masks[name] = own.view(parameter.shape)
            self.owned[name] |= self.masks[name]

    def drawn(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: torch.rand(p.shape, generator=generator) for n, p in self.parameters.items()}

    def train(self, optimizer: torch.optim.Optimizer, loader: list, *, seed: int = 0) -> None:
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for batch in loader:
                optimizer.zero_grad()
                self.model(**batch).loss.backward()
                for name, frozen in self.frozen().items():
                    gradient = self.model.get_parameter(name).grad
                    if gradient is not None:
                        gradient[frozen] = 0
                optimizer.step()
                with torch.no_grad():
                    for name, frozen in self.frozen().items():
                        self.model.get_parameter(name)[frozen] = self.base[name][frozen]

    def frozen(self) -> dict[str, Tensor]:
        everywhere = {n: torch.ones_like(v, dtype=torch.bool) for n, v in self.base.items()}
        return everywhere | {name: ~mask for name, mask in self.masks.items()}

    def update(self) -> None:
        self.models.append({n: self.model.get_parameter(n).detach().clone() for n in self.base})
