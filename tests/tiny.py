"""Tiny models, batches and bitwise comparisons shared by the tests of the method.

Every builder makes its model from a small configuration with a seed of its own; nothing is
downloaded. The transformers builders are imported only when they are called.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bitstack_nb import BitStack

# For tensors this small a second thread only waits, for seconds on a machine that is busy.
torch.set_num_threads(1)

VOCABULARY, CLASSES, LENGTH, WIDTH = 40, 3, 10, 16
INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Block(nn.Module):
    """A residual block with the shapes that catch mistakes: 0-dim, transposed, 1-dim, 2-dim."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Parameter(0.3 * torch.randn(width, width + 1).t()[:width])  # not contiguous
        self.gain = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.2)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.down(nn.functional.gelu(self.up(hidden))) + hidden @ self.mix
        return self.norm(hidden + self.gain * self.dropout(inner))


class Plain(nn.Module):
    """A classifier without transformers: embed, blocks, norm, classifier; returns `.loss`."""

    head = "classifier"

    def __init__(self, *, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        loss_scale: float = 1.0,
    ) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (self.norm(hidden) * weights).sum(1) / weights.sum(1)
        logits = getattr(self, self.head)(pooled)
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits.float(), labels) * loss_scale, logits=logits
        )


class Wrapper(nn.Module):
    """A model in a module that trains it, as LightningModules are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))  # a buffer, no parameter
        self.inner = inner

    def forward(self, **batch: Tensor):
        return self.inner(**batch)


class Body(nn.Module):
    """`function(self)` is the loss; one eligible 20x10 weight, one head."""

    def __init__(self, function):
        super().__init__()
        self.body = nn.Linear(10, 20, bias=False)
        self.classifier = nn.Linear(20, 3)
        self.function = function

    def forward(self, x, labels):
        return self.function(self)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def plain(seed: int = 0, *, width: int = WIDTH, depth: int = 2) -> Plain:
    return seeded(lambda: Plain(width=width, depth=depth), seed)


def renamed(head: str, *, first: bool = False) -> Plain:
    """The plain model with another name for its head; `first` registers it before the rest."""
    model = plain()
    layer, model.head = model._modules.pop("classifier"), head
    model._modules = {head: layer} | model._modules if first else model._modules | {head: layer}
    return model


def _classifier(config_class: str, model_class: str, seed: int, **config) -> nn.Module:
    import transformers

    settings = getattr(transformers, config_class)(
        vocab_size=VOCABULARY, num_labels=CLASSES, pad_token_id=0, **config
    )
    return seeded(lambda: getattr(transformers, model_class)(settings), seed)


def gpt2(seed: int = 0, *, model_class: str = "GPT2ForSequenceClassification") -> nn.Module:
    return _classifier(
        "GPT2Config", model_class, seed, n_layer=2, n_embd=16, n_head=2, n_positions=32
    )


_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def bert(seed: int = 0) -> nn.Module:
    return _classifier("BertConfig", "BertForSequenceClassification", seed, **_ENCODER)


def roberta(seed: int = 0) -> nn.Module:
    return _classifier("RobertaConfig", "RobertaForSequenceClassification", seed, **_ENCODER)


def modernbert(seed: int = 0) -> nn.Module:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return _classifier(
        "ModernBertConfig", "ModernBertForSequenceClassification", seed, **_ENCODER, **special
    )


def distilbert(seed: int = 0) -> nn.Module:
    return _classifier(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        seed,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
    )


def llama(seed: int = 0) -> nn.Module:
    return _classifier("LlamaConfig", "LlamaForSequenceClassification", seed, **_ENCODER)


def t5(seed: int = 0) -> nn.Module:
    """An encoder and a decoder; its batches would need a token for the end of a text."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return _classifier("T5Config", "T5ForSequenceClassification", seed, **sizes)


# Builder, and the start of every name that `exclude=None` leaves eligible, written out by hand.
ARCHITECTURES: dict[str, tuple[Callable[[int], nn.Module], tuple[str, ...]]] = {
    "plain": (plain, ("blocks.",)),
    "gpt2": (gpt2, ("transformer.h.",)),
    "bert": (bert, ("bert.encoder.", "bert.pooler.")),
    "distilbert": (distilbert, ("distilbert.transformer.",)),
    "roberta": (roberta, ("roberta.encoder.",)),
    "modernbert": (modernbert, ("model.layers.",)),
    "llama": (llama, ("model.layers.",)),
}


def expected_eligible(architecture: str, model: nn.Module) -> list[str]:
    prefixes = ARCHITECTURES[architecture][1]
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def batches(count: int, *, seed: int, size: int = 6) -> list[dict[str, Tensor]]:
    """`count` right-padded batches of int64: ids and mask [size, LENGTH], labels [size]."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (size, LENGTH), generator=generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (size, 1), generator=generator)
        attention = (torch.arange(LENGTH) < lengths).long()
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        made.append({"input_ids": ids * attention, "attention_mask": attention, "labels": labels})
    return made


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: list, *, seed: int = 0):
    """One plain training step per batch, dropout on and seeded, the global RNG left as found."""
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()


def as_bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns as integers: tells -0.0 from 0.0 and compares NaN equal."""
    return tensor.detach().contiguous().view(INTEGER_VIEW[tensor.element_size()])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> bool tensor: the weights whose bits differ from the snapshot's."""
    return {
        name: as_bits(tensor) != as_bits(before[name])
        for name, tensor in model.state_dict().items()
    }


def unhooked_copy(model: nn.Module) -> nn.Module:
    """A deep copy; torch does not copy gradient hooks, so it trains as if never masked."""
    return copy.deepcopy(model)


def record_curves(stack: BitStack, loaders: list):
    """A CurveRecorder that has watched an update on each loader, in this order."""
    from bitstack_nb.benchmark.curves import CurveRecorder

    recorder = CurveRecorder(stack.masks)
    for loader in loaders:
        stack.update(loader, observe=recorder.add)
    return recorder
