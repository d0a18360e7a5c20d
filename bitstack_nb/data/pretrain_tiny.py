"""Pretraining of the tiny GPT-2: ``python -m bitstack_nb.data.pretrain_tiny`` writes its folder.

Scope: language modelling on unlabelled synthetic texts (``embedded_corpus``), none of which is a
row of a task. Another machine or torch gives the same weights within rounding.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bitstack_nb.data.embedded import embedded_corpus, embedded_vocabulary
from bitstack_nb.pretrained import TINY_FOLDER

STEPS, BATCH_SIZE, LEARNING_RATE, MAX_LENGTH = 2000, 64, 4e-3, 64

logger = logging.getLogger(__name__)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that splits at spaces and knows every word of the synthetic texts."""
    words = ["<pad>", "<unk>", *embedded_vocabulary()]
    vocabulary = {word: number for number, word in enumerate(words)}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>", model_input_names=inputs
    )


def tiny_config(vocabulary: int) -> transformers.GPT2Config:
    """The settings of a GPT-2 of 2 layers, without dropout: so small a model needs none."""
    return transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def pretrain(steps: int = STEPS, *, seed: int = 0) -> transformers.GPT2Model:
    """Train the tiny GPT-2 to predict each next word, and round its weights to float16.

    Args:
        steps: batches of new texts, with a cosine schedule.
        seed: of the first weights; the global random state is left as found.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(tiny_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 20, steps)
    texts = embedded_corpus(steps * BATCH_SIZE)
    for step in range(1, steps + 1):
        own = texts[(step - 1) * BATCH_SIZE : step * BATCH_SIZE]
        cut = {"padding": True, "truncation": True, "max_length": MAX_LENGTH}
        batch = tokenizer(own, return_tensors="pt", **cut)
        # The loss leaves out the label -100.
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            logger.info("step %d of %d: loss %.3f", step, steps, loss.item())
    return model.transformer.half()


def write(folder: Path, model: transformers.GPT2Model) -> None:
    """Write the model and its tokenizer as transformers reads them."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def main() -> None:
    """Pretrain and write; ``--output`` names another folder than the package's."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny GPT-2.")
    text = "folder; the package's if not given"
    parser.add_argument("--output", type=Path, default=TINY_FOLDER, help=text)
    folder = parser.parse_args().output
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(folder, pretrain())
    logger.info("written to %s", folder)


if __name__ == "__main__":
    main()
