"""Linear probe: heads alone, on the mean-pooled features of the backbone as it came."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from bitstack_nb.benchmark.strategy import Batches, Strategy
from bitstack_nb.features import mean_pooled

L2 = (1e-3, 1e-2, 1e-1, 1.0)  # strengths to choose from
_FOLDS = 5


class Probe(Strategy):
    """Each head is a softmax regression on features that no task changes: 0 bytes, no training.

    Its classifier reads mean-pooled features, whatever ``pooling`` says. The strength of the L2
    penalty is chosen for each task by cross-validation within its training rows.
    """

    name, label, order, colour = "probe", "linear probe", 10, "#949494"
    settings = ()
    drifts = trains = False
    pooling = "mean"

    def before_stage(self, number: int, loader: Batches) -> None:
        """Put the solution into the head that is in the model."""
        batches = list(loader)
        features = mean_pooled(self.model, batches).double().cpu()
        labels = torch.cat([batch["labels"] for batch in batches])
        head = self.model.head
        seed = self.protocol.stage_seed(number)
        weight, bias = best_regression(features, labels, head.out_features, seed=seed)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)


def best_regression(
    features: torch.Tensor, labels: torch.Tensor, classes: int, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The :func:`regression` of the strength in ``L2`` with the least loss on held-out rows.

    Five random parts of the rows, by the seed, are held out in turn. The result is fitted on all.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(labels), generator=generator).tensor_split(_FOLDS)
    losses = dict.fromkeys(L2, 0.0)
    for out in filter(len, parts):
        left = torch.ones(len(labels), dtype=torch.bool)
        left[out] = False
        for strength in L2:
            weight, bias = regression(features[left], labels[left], classes, l2=strength)
            logits = features[out] @ weight.T + bias
            losses[strength] += float(cross_entropy(logits, labels[out], reduction="sum"))
    return regression(features, labels, classes, l2=min(L2, key=losses.get))


def regression(
    features: torch.Tensor, labels: torch.Tensor, classes: int, *, l2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax regression by L-BFGS: weight ``[classes, features]`` and bias of the raw features.

    The least mean cross-entropy plus ``l2 / 2`` times the squared weights of the standardised
    features, in float64. The standardisation is then folded into weight and bias.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = deviation.where(deviation > 0, 1)
    scaled = (features - mean) / deviation
    weight = scaled.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = scaled.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        found = cross_entropy(scaled @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        found.backward()
        return found

    solver.step(loss)
    weight = weight.detach() / deviation
    return weight, bias.detach() - weight @ mean
