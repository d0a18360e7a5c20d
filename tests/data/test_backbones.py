"""Backbones: loading, errors, and texts to batches; on tiny random models saved to a folder."""

from __future__ import annotations

import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from tiny_backbones import CONFIGS, DECODERS, POSITIONS, SIZES, make_config, make_tokenizer
from transformers.utils import logging as transformers_logging

from bitstack_nb import pretrained
from bitstack_nb.data.backbones import Backbone, collate, encode, load_backbone
from bitstack_nb.data.embedded import embedded_split, embedded_vocabulary
from bitstack_nb.pretrained import BackboneError


@pytest.fixture(scope="module", params=CONFIGS)
def backbone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders[request.param]), max_length=8, seed=0)


@pytest.fixture
def folder(tmp_path: Path, folders: dict[str, Path]) -> Path:
    """A BERT that a test may spoil."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def load(name: object, *, max_length: int = 8, seed: int = 0) -> Backbone:
    return load_backbone(str(name), max_length=max_length, seed=seed)


def rows(texts: list[str], labels: list[int] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, "label": labels or [0] * len(texts)})


def batch_of(texts: list[str], backbone: Backbone) -> dict[str, torch.Tensor]:
    return collate(backbone)(list(encode(rows(texts), backbone)))


@torch.no_grad()
def logits(backbone: Backbone, *texts: str) -> torch.Tensor:
    return backbone.model.eval()(**batch_of(list(texts), backbone)).logits


# --- loading ---------------------------------------------------------------------------------


def test_a_folder_gives_its_weights_in_float32_and_says_which(backbone: Backbone) -> None:
    base = backbone.model.base_model
    stored = transformers.AutoModel.from_pretrained(backbone.name).state_dict()
    assert all(torch.equal(stored[key], value) for key, value in base.state_dict().items())
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert backbone.provenance["source"] == "folder"
    assert list(backbone.provenance["sha256"]) == ["model.safetensors"]
    assert backbone.provenance["backbone_parameters"] == sum(p.numel() for p in base.parameters())


def test_half_precision_weights_become_float32(folder: Path) -> None:
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {parameter.dtype for parameter in load(folder).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["tiny-gpt2", "gpt2"])
def test_the_seed_decides_the_head_and_global_state_is_left_as_found(
    name: str, folders: dict[str, Path]
) -> None:
    def state() -> list[object]:
        generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()
        logs = transformers_logging.get_verbosity(), are_progress_bars_disabled()
        return [*generators[:2], generators[2][1].tolist(), *logs]

    before = state()
    heads = [load(folders.get(name, name), seed=seed).model.score.weight for seed in (3, 3, 4)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert state() == before


def test_loading_says_nothing_but_names_absent_weights(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    transformers.BertModel(make_config("bert"), add_pooling_layer=False).save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "bert.pooler.dense.weight" in caplog.text
    assert "classifier" not in caplog.text


def test_a_model_saved_for_regression_is_used_for_classification(folder: Path) -> None:
    config = make_config("bert", num_labels=2, problem_type="regression")
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    backbone = load(folder)
    batch = collate(backbone)(list(encode(rows(["red", "sun"], [1, 0]), backbone)))
    output = backbone.model.eval()(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)


def test_tiny_gpt2_knows_every_embedded_word() -> None:
    backbone = load("tiny-gpt2", max_length=256, seed=1)
    assert backbone.provenance["source"] == "package"
    texts = list(embedded_split("imdb", "test")["text"])[:50] + embedded_vocabulary()
    tokens = encode(rows(texts), backbone)["input_ids"]
    assert backbone.tokenizer.unk_token_id not in {token for row in tokens for token in row}


# --- errors ----------------------------------------------------------------------------------


def assert_refused(name: object, *parts: str, **options: object) -> None:
    with pytest.raises(BackboneError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    for part in (str(name), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("length", [0, 1.5, True])
def test_a_length_that_is_none(length: object) -> None:
    with pytest.raises(BackboneError, match=f"positive whole number, got {length}"):
        load("tiny-gpt2", max_length=length)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_longest_text_fits_and_one_token_more_is_an_error(
    architecture: str, folders: dict[str, Path]
) -> None:
    # RoBERTa's positions begin after its padding index, 1.
    limit = POSITIONS - 2 if architecture == "roberta" else POSITIONS
    backbone = load(folders[architecture], max_length=limit)
    assert batch_of(["sun " * 100], backbone)["input_ids"].shape == (1, limit)
    assert logits(backbone, "sun " * 100).isfinite().all()
    said = f"max_length {limit + 1} is more than the model's {limit} positions"
    assert_refused(folders[architecture], said, max_length=limit + 1)


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path, "no config.json")
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        assert_refused(name, "no such folder")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert_refused(folder, "cannot load it", "check its files")
    weights.unlink()
    assert_refused(folder, "cannot load it", "check its files")
    weights.write_bytes(whole)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert_refused(folder, "tokenizer", "save one beside the model")
    transformers.CLIPTextConfig().save_pretrained(folder)
    assert_refused(folder, "no sequence classifier for 'clip_text_model'")


def test_a_decoder_without_padding_and_end_token(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gpt2"], tmp_path, dirs_exist_ok=True)
    tokenizer = make_tokenizer(encoder=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert_refused(tmp_path, "neither a padding nor an end token")


def test_a_token_beyond_the_embeddings(folder: Path) -> None:
    tokenizer = make_tokenizer(encoder=True)
    tokenizer.add_tokens(["volcano"])
    tokenizer.save_pretrained(folder)
    assert_refused(folder, "token 'volcano' with number 13", "13 embeddings")


def test_a_sentencepiece_tokenizer_names_the_packages_it_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    transformers.XLMRobertaConfig(**SIZES).save_pretrained(folder)
    (folder / "sentencepiece.bpe.model").write_bytes(b"no tokenizer at all")
    monkeypatch.setattr(pretrained, "_installed", lambda name: False)
    assert_refused(folder, "SentencePiece", "pip install sentencepiece protobuf")


def test_code_in_pickled_weights_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return Path.mkdir, (tmp_path / "was run",)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")
    assert_refused(folder, "cannot load it")
    assert not (tmp_path / "was run").exists()


# --- texts to batches ------------------------------------------------------------------------


def test_encode_keeps_rows_cuts_and_leaves_no_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    backbone = load(folders["distilbert"], max_length=4)
    encoded = encode(rows(["red", "sun moon rain snow wind", ""], [2, 0, 1]), backbone)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels", "length"]
    assert list(encoded["length"]) == [3, 4, 2]
    assert [len(row) for row in encoded["input_ids"]] == [3, 4, 2]
    assert list(encoded["labels"]) == [2, 0, 1]
    assert not list(tmp_path.iterdir())


def test_a_pair_is_cut_at_its_longer_text_and_its_second_text_is_marked(
    folders: dict[str, Path],
) -> None:
    backbone = load(folders["bert"])
    data = rows(["red sun moon rain snow", ""]).add_column("text_pair", ["blue green", "wind"])
    encoded = encode(data, backbone)
    texts = backbone.tokenizer.batch_decode(encoded["input_ids"][:])
    assert texts == ["<s> red sun moon </s> blue green </s>", "<s> </s> wind </s>"]
    assert encoded["token_type_ids"][:] == [[0] * 5 + [1] * 3, [0] * 2 + [1] * 2]
    assert backbone.model(**collate(backbone)(list(encoded))).loss.isfinite()
    with pytest.raises(BackboneError, match="max_length 2 leaves no room for the special tokens"):
        encode(data, replace(backbone, max_length=2))


@pytest.mark.parametrize("data", [{"text": [], "label": []}, {"content": ["a"], "label": [1]}])
def test_encode_wants_texts_and_labels(data: dict[str, list]) -> None:
    with pytest.raises(BackboneError, match="columns text and label, got"):
        encode(datasets.Dataset.from_dict(data), load("tiny-gpt2"))


def test_a_batch_has_what_the_model_takes_and_the_task(backbone: Backbone) -> None:
    encoded = list(encode(rows(["red sun moon", "rain"], [1, 0]), backbone))
    batch = collate(backbone)([{**row, "task": 3 - i} for i, row in enumerate(encoded)])
    architecture = Path(backbone.name).name
    assert ("position_ids" in batch) == (architecture in DECODERS)
    assert ("token_type_ids" in batch) == (architecture in ("bert", "roberta"))
    assert "length" not in batch
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["labels"].tolist() == [1, 0]
    assert batch.pop("task").tolist() == [3, 2]
    padded = batch["attention_mask"][1].tolist()
    assert padded == sorted(padded, reverse=architecture not in DECODERS)
    assert backbone.model(**batch).loss.isfinite()


def test_logits_do_not_depend_on_padding(backbone: Backbone) -> None:
    short, long = "red sun", "moon rain snow wind . blue"
    alone, together = logits(backbone, short), logits(backbone, short, long)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    # ... and do depend on the text.
    assert not torch.allclose(together[0], together[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny-gpt2", *DECODERS])
def test_a_text_without_tokens_does_not_poison_a_decoder(
    name: str, folders: dict[str, Path]
) -> None:
    backbone = load(folders.get(name, name))
    for text in ("", "   ", "</s>"):
        alone, together = logits(backbone, text), logits(backbone, text, "rain snow wind .")
        assert alone.isfinite().all()
        torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
