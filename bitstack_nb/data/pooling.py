"""A classifier with one linear head on pooled hidden states, the same for every architecture."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from bitstack_nb.features import mean_of_tokens


class Pooled(nn.Module):
    """The backbone of a classifier under a linear head, which reads one vector per text.

    A pooler of the backbone, which this head does not read, is taken out. The head has the name
    that it has in the classifier: ``score`` in decoders, else ``classifier``.

    Args:
        model: a classifier of transformers; its backbone is used, not copied.
        pooling: ``"mean"`` of the tokens that are no padding, or ``"cls"``, the first token (in
            decoders, which are padded on the left, the last).
    """

    base_model_prefix = "backbone"
    accepts_loss_kwargs = False  # else the Trainer would pass more than the batch

    def __init__(self, model: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.config, self.num_labels = model.config, model.num_labels
        self.backbone = model.base_model
        if isinstance(getattr(self.backbone, "pooler", None), nn.Module):
            self.backbone.pooler = None
        self._pooling, self._head = pooling, "score" if hasattr(model, "score") else "classifier"
        # Zeros, because every task gets a head of its own from this one's shape.
        head = nn.utils.skip_init(nn.Linear, model.config.hidden_size, model.num_labels)
        setattr(self, self._head, head.requires_grad_(True))
        with torch.no_grad():
            head.weight.zero_(), head.bias.zero_()

    @property
    def base_model(self) -> PreTrainedModel:
        """The backbone, by the name that it has in transformers' models."""
        return self.backbone

    @property
    def head(self) -> nn.Linear:
        """The head that is in the model now."""
        return getattr(self, self._head)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of each text, and the mean loss if there are labels."""
        others = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        given = {name: column for name, column in others.items() if column is not None}
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **given)
        logits = self.head(self._pooled(states.last_hidden_state, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pooled(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self._pooling == "mean":
            return mean_of_tokens(hidden, attention_mask)
        return hidden[:, -1 if self._head == "score" else 0]
