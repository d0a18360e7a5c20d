"""Tiny random backbones of several architectures, in folders that ``from_pretrained`` reads."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["red", "green", "blue", "sun", "moon", "rain", "snow", "wind", "."]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # RoBERTa counts positions from padding index 1 on
POSITIONS = 40
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": POSITIONS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,  # with the usual 0.02 the logits would hardly depend on the text
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "bert": transformers.BertConfig,
    "distilbert": transformers.DistilBertConfig,
    "roberta": transformers.RobertaConfig,
    "modernbert": transformers.ModernBertConfig,
}
DECODERS = ("gpt2", "llama")
HEAD = {"distilbert": {"pre_classifier", "classifier"}, "modernbert": {"head", "classifier"}}


def make_config(architecture: str, **changes: object) -> transformers.PreTrainedConfig:
    sizes = SIZES | changes
    if architecture == "modernbert":
        sizes |= {"cls_token_id": 0, "sep_token_id": 2}
    return CONFIGS[architecture](**sizes)


def make_tokenizer(*, encoder: bool) -> transformers.PreTrainedTokenizerFast:
    """Words at spaces; encoders get <s> ... </s>; decoders have no padding token of their own."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    if encoder:
        rules.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
        names |= {"bos_token": "<s>", "pad_token": "<pad>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"][:: 1 if encoder else 2]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, model_input_names=inputs, **names
    )


def write_backbones(root: Path) -> dict[str, Path]:
    """One folder per architecture: a backbone saved without a head, and its tokenizer."""
    for seed, architecture in enumerate(CONFIGS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModel.from_config(make_config(architecture))
        model.save_pretrained(root / architecture)
        tokenizer = make_tokenizer(encoder=architecture not in DECODERS)
        tokenizer.save_pretrained(root / architecture)
    return {architecture: root / architecture for architecture in CONFIGS}
