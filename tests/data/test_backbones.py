"""Backbones and heads: loading, padding, swapping; on tiny random models saved to a folder."""

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from tiny_checkpoints import (
    CONFIGS,
    DECODERS,
    HEAD,
    POSITIONS,
    make_config,
    make_tokenizer,
)
from transformers.utils import logging as transformers_logging

from bitstack_nb.benchmark.heads import Heads
from bitstack_nb.data.backbones import Backbone, collate, encode, load_backbone
from bitstack_nb.data.embedded import embedded_split, embedded_vocabulary
from bitstack_nb.data.errors import BackboneError


@pytest.fixture(params=CONFIGS)
def backbone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders[request.param]), max_length=8, seed=0)


def rows(texts: list[str], labels: list[int] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, "label": labels or [0] * len(texts)})


def batch_of(texts: list[str], backbone: Backbone) -> dict[str, torch.Tensor]:
    return collate(backbone)(list(encode(rows(texts), backbone)))


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def random_states() -> list[bytes]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),
        repr(random.getstate()).encode(),
    ]


# --- loading ---------------------------------------------------------------------------------


def test_a_folder_gives_its_weights_in_float32_and_says_which(backbone: Backbone) -> None:
    folder = Path(backbone.name)
    base = backbone.model.base_model
    stored = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(stored[key], value) for key, value in base.state_dict().items())
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert backbone.provenance["source"] == "folder"
    assert list(backbone.provenance["sha256"]) == ["model.safetensors"]
    assert backbone.provenance["backbone_parameters"] == sum(p.numel() for p in base.parameters())


def test_half_precision_weights_become_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(folders["bert"]).half().save_pretrained(tmp_path)
    make_tokenizer(encoder=True).save_pretrained(tmp_path)
    model = load_backbone(str(tmp_path), max_length=8, seed=0).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["tiny-gpt2", "distilbert"])
def test_the_seed_draws_what_is_missing(name: str, folders: dict[str, Path]) -> None:
    def head(seed: int) -> torch.Tensor:
        model = load_backbone(str(folders.get(name, name)), max_length=8, seed=seed).model
        return next(
            model.get_submodule("score" if name == "tiny-gpt2" else "classifier").parameters()
        )

    assert torch.equal(head(3), head(3))
    assert not torch.equal(head(3), head(4))


@pytest.mark.parametrize("name", ["tiny-gpt2", "bert"])
def test_global_state_is_left_as_found(name: str, folders: dict[str, Path]) -> None:
    before = random_states()
    transformers_logging.set_verbosity_warning()
    settings = transformers_logging.get_verbosity(), are_progress_bars_disabled()
    made = load_backbone(str(folders.get(name, name)), max_length=8, seed=5)
    heads = Heads(made.model, seed=5)
    heads.add("a", 3)
    batch_of(["red sun", "moon"], made)
    assert random_states() == before
    assert (transformers_logging.get_verbosity(), are_progress_bars_disabled()) == settings


def test_loading_says_nothing_but_names_missing_backbone_weights(
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_backbone(str(folders["bert"]), max_length=8, seed=0)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    config = make_config("bert")
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    make_tokenizer(encoder=True).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_backbone(str(tmp_path), max_length=8, seed=0)
    assert "bert.pooler.dense.weight" in caplog.text
    assert "classifier" not in caplog.text


def test_a_regression_checkpoint_is_used_for_classification(tmp_path: Path) -> None:
    config = make_config("bert", num_labels=1, problem_type="regression")
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(encoder=True).save_pretrained(tmp_path)
    made = load_backbone(str(tmp_path), max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    heads.add("a", 3)
    batch = collate(made)(list(encode(rows(["red", "sun"], [2, 1]), made)))
    output = heads.use("a").eval()(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)


def test_tiny_gpt2_knows_every_embedded_word() -> None:
    made = load_backbone("tiny-gpt2", max_length=256, seed=1)
    assert made.provenance["source"] == "built"
    texts = list(embedded_split("imdb", "test")["text"])[:50] + embedded_vocabulary()
    tokens = encode(rows(texts), made)["input_ids"]
    assert made.tokenizer.unk_token_id not in {token for row in tokens for token in row}
    assert logits(made.model, batch_of(texts[:4], made)).shape == (4, 2)


# --- errors ----------------------------------------------------------------------------------


def assert_one_line(message: str, *parts: str) -> None:
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("length", [0, -1, 1.5, True])
def test_a_length_that_is_none(length: object) -> None:
    with pytest.raises(BackboneError, match="positive whole number") as caught:
        load_backbone("tiny-gpt2", max_length=length, seed=0)
    assert_one_line(str(caught.value), repr(length))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_longest_text_fits_and_one_token_more_is_an_error(
    architecture: str, folders: dict[str, Path]
) -> None:
    # RoBERTa's positions begin after its padding index, 1.
    limit = POSITIONS - 2 if architecture == "roberta" else POSITIONS
    made = load_backbone(str(folders[architecture]), max_length=limit, seed=0)
    batch = batch_of(["sun " * 100], made)
    assert batch["input_ids"].shape == (1, limit)
    assert logits(made.model, batch).isfinite().all()
    with pytest.raises(BackboneError, match=f"max_length {limit + 1} is more than.* {limit} pos"):
        load_backbone(str(folders[architecture]), max_length=limit + 1, seed=0)


def test_folders_that_hold_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = {"empty": "config.json", "weights": "cannot load", "words": "tokenizer", "head": "clip"}
    for name in cases:
        (tmp_path / name).mkdir()
    config = make_config("bert")
    config.save_pretrained(tmp_path / "weights")
    make_tokenizer(encoder=True).save_pretrained(tmp_path / "weights")
    transformers.BertModel(config).save_pretrained(tmp_path / "words")
    transformers.CLIPTextConfig().save_pretrained(tmp_path / "head")
    for name, part in cases.items():
        with pytest.raises(BackboneError) as caught:
            load_backbone(str(tmp_path / name), max_length=8, seed=0)
        assert_one_line(str(caught.value), str(tmp_path / name), part)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(BackboneError, match="no such folder"):
            load_backbone(name, max_length=8, seed=0)


def test_broken_weights_are_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["bert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError) as caught:
        load_backbone(str(tmp_path), max_length=8, seed=0)
    assert_one_line(str(caught.value), str(tmp_path), "check the files")


def test_a_decoder_without_padding_and_end_token(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["gpt2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = make_tokenizer(encoder=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError) as caught:
        load_backbone(str(tmp_path), max_length=8, seed=0)
    assert_one_line(str(caught.value), "neither a padding nor an end token")


def test_without_network_a_cached_model_loads_and_another_is_a_quick_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in folders["distilbert"].iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = (
        "import time\n"
        "from bitstack_nb.data.backbones import load_backbone\n"
        "from bitstack_nb.data.errors import BackboneError\n"
        "start = time.monotonic()\n"
        "print(load_backbone('someone/model', max_length=8, seed=0).provenance['revision'])\n"
        "try:\n"
        "    load_backbone('someone/else', max_length=8, seed=0)\n"
        "except BackboneError as error:\n"
        "    print(error)\n"
        "print(time.monotonic() - start)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    revision, message, seconds = done.stdout.splitlines()
    assert revision == commit
    assert_one_line(message, "someone/else", "cannot be reached", "tiny-gpt2")
    assert float(seconds) < 8
    assert done.stderr == ""


# --- texts to batches ------------------------------------------------------------------------


def test_encode_keeps_rows_cuts_and_leaves_no_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    made = load_backbone(str(folders["distilbert"]), max_length=4, seed=0)
    encoded = encode(rows(["red", "sun moon rain snow wind", ""], [2, 0, 1]), made)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels", "length"]
    assert list(encoded["length"]) == [3, 4, 2]
    assert [len(row) for row in encoded["input_ids"]] == [3, 4, 2]
    assert list(encoded["labels"]) == [2, 0, 1]
    assert not list(tmp_path.iterdir())
    assert not encoded.cache_files


def test_token_types_are_there_where_the_model_takes_them(folders: dict[str, Path]) -> None:
    made = load_backbone(str(folders["bert"]), max_length=4, seed=0)
    assert "token_type_ids" in encode(rows(["red"]), made).column_names
    assert "token_type_ids" in batch_of(["red"], made)


@pytest.mark.parametrize(
    "data", [{"text": [], "label": []}, {"text": ["a"]}, {"content": ["a"], "label": [1]}]
)
def test_encode_wants_texts_and_labels(data: dict[str, list]) -> None:
    made = load_backbone("tiny-gpt2", max_length=4, seed=0)
    with pytest.raises(BackboneError, match="columns text and label, got"):
        encode(datasets.Dataset.from_dict(data), made)


def test_a_batch_has_what_the_model_takes_and_the_task(backbone: Backbone) -> None:
    encoded = list(encode(rows(["red sun moon", "rain"], [1, 0]), backbone))
    batch = collate(backbone)([{**row, "task": 3 - i} for i, row in enumerate(encoded)])
    decoder = Path(backbone.name).name in DECODERS
    assert ("position_ids" in batch) == decoder
    assert "length" not in batch
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["labels"].tolist() == [1, 0]
    assert batch.pop("task").tolist() == [3, 2]
    padded = batch["attention_mask"][1].tolist()
    assert padded == sorted(padded, reverse=not decoder)
    assert backbone.model(**batch).loss.isfinite()


def test_logits_do_not_depend_on_padding(backbone: Backbone) -> None:
    short, long = "red sun", "moon rain snow wind . blue"
    alone = logits(backbone.model, batch_of([short], backbone))
    together = logits(backbone.model, batch_of([short, long], backbone))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    # ... and do depend on the text.
    assert not torch.allclose(together[0], together[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["", "   ", "</s>"])
def test_a_text_without_tokens_does_not_poison_a_decoder(
    text: str, folders: dict[str, Path]
) -> None:
    for name in ("tiny-gpt2", *(str(folders[architecture]) for architecture in DECODERS)):
        made = load_backbone(name, max_length=8, seed=0)
        alone = logits(made.model, batch_of([text], made))
        together = logits(made.model, batch_of([text, "rain snow wind ."], made))
        assert alone.isfinite().all()
        torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


# --- heads -----------------------------------------------------------------------------------


def test_heads_swap_and_come_back_bit_for_bit(backbone: Backbone) -> None:
    heads = Heads(backbone.model, seed=0)
    assert heads.current is None
    for name, labels in (("two", 2), ("five", 5)):
        heads.add(name, labels)
    batch = collate(backbone)(list(encode(rows(["red sun", "moon"], [1, 0]), backbone)))
    first = logits(heads.use("two"), batch)
    assert first.shape == (2, 2)
    model = heads.use("five")
    assert heads.current == "five"
    assert (model.num_labels, model.config.num_labels) == (5, 5)
    batch["labels"] = torch.tensor([4, 2])
    output = model(**batch)
    assert output.logits.shape == (2, 5)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    # Training one head leaves the other as it was.
    output.loss.backward()
    with torch.no_grad():
        for parameter in heads.modules()["five"].parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    assert torch.equal(logits(heads.use("two"), batch), first)


def test_a_head_is_all_that_is_outside_the_backbone(backbone: Backbone) -> None:
    architecture = Path(backbone.name).name
    usual = {"score"} if architecture in DECODERS else {"classifier"}
    heads = Heads(backbone.model, seed=0)
    heads.add("a", 4)
    children = {name.split("/")[1].split(".")[0] for name in heads.state_dict()}
    assert children == HEAD.get(architecture, usual)
    heads.use("a")
    own = {id(p) for p in heads.modules()["a"].parameters()}
    base = {id(p) for p in backbone.model.base_model.parameters()}
    assert own | base == {id(p) for p in backbone.model.parameters()}
    assert not own & base


def test_a_head_depends_on_seed_and_name_but_not_on_order(backbone: Backbone) -> None:
    def state(seed: int, *names: str) -> dict[str, torch.Tensor]:
        heads = Heads(backbone.model, seed=seed)
        for name in names:
            heads.add(name, 3)
        return heads.state_dict()

    def last(state: dict[str, torch.Tensor], task: str) -> torch.Tensor:
        return next(v for k, v in state.items() if k.startswith(f"{task}/") and v.shape[0] == 3)

    forward, backward, other = state(1, "a", "b"), state(1, "b", "a"), state(2, "a", "b")
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[key], backward[key]) for key in forward)
    assert not torch.equal(last(forward, "a"), last(forward, "b"))
    assert not torch.equal(last(forward, "a"), last(other, "a"))
    biases = [v for k, v in forward.items() if v.shape == (3,) and k.endswith("bias")]
    assert all(not bias.any() for bias in biases)


def test_heads_follow_the_mode_of_the_model(folders: dict[str, Path]) -> None:
    made = load_backbone(str(folders["roberta"]), max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    for name in ("a", "b"):
        heads.add(name, 2)
    for training in (True, False):
        made.model.train(training)
        for name in ("a", "b"):
            modes = {module.training for module in heads.use(name).modules()}
            assert modes == {training}


def test_heads_follow_the_device_of_the_model() -> None:
    # The meta device is one that every machine has.
    made = load_backbone("tiny-gpt2", max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    heads.add("a", 2)
    made.model.to("meta")
    assert heads.use("a").score.weight.device.type == "meta"
    heads.add("b", 2)
    assert {p.device.type for p in heads.modules()["b"].parameters()} == {"meta"}


def test_head_states_round_trip(backbone: Backbone) -> None:
    source = Heads(backbone.model, seed=0)
    for name, labels in (("z", 2), ("a", 5)):
        source.add(name, labels)
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    target = Heads(backbone.model, seed=9)
    target.add("a", 5)
    kept = target.modules()["a"]
    target.load_state_dict(state)
    assert set(target.names) == {"z", "a"}
    assert target.modules()["a"] is kept  # an optimizer may hold its parameters
    assert all(torch.equal(target.state_dict()[key], state[key]) for key in state)
    assert target.use("z").config.num_labels == 2
    fresh = Heads(backbone.model, seed=9)
    fresh.load_state_dict(state)
    assert fresh.names == ("z", "a")


def test_head_states_that_do_not_fit_change_nothing(folders: dict[str, Path]) -> None:
    model = load_backbone(str(folders["distilbert"]), max_length=8, seed=0).model
    heads = Heads(model, seed=0)
    heads.add("a", 3)
    before = {key: tensor.clone() for key, tensor in heads.state_dict().items()}
    other = {key.replace("a/", "b/", 1): tensor + 1 for key, tensor in before.items()}
    changed = {key: tensor + 1 for key, tensor in before.items()}
    cases = {
        "lacks classifier.weight": other | {"c/score.weight": torch.zeros(2, 16)},
        "classifier.bias is missing": {k: v for k, v in changed.items() if "r.bias" not in k},
        r"pre_classifier.bias is \(3,\)": changed | {"a/pre_classifier.bias": torch.zeros(3)},
        r"classifier.weight is \(4, 16\)": changed | {"a/classifier.weight": torch.zeros(4, 16)},
        "extra.weight is": changed | {"a/extra.weight": torch.zeros(2)},
    }
    for match, state in cases.items():
        with pytest.raises(BackboneError, match=match) as caught:
            heads.load_state_dict(state)
        assert_one_line(str(caught.value))
        assert heads.names == ("a",)
        assert all(torch.equal(heads.state_dict()[key], before[key]) for key in before)


def test_heads_refuse_what_cannot_be(folders: dict[str, Path]) -> None:
    made = load_backbone("tiny-gpt2", max_length=8, seed=0)
    heads = Heads(made.model, seed=0)
    heads.add("a", 2)
    for name, labels, match in (
        ("a", 2, "'a' has a head already"),
        ("b", 1, "two labels or more, got 1"),
        ("b/c", 2, "'b/c'"),
        ("b.c", 2, "'b.c'"),
        ("", 2, "''"),
    ):
        with pytest.raises(BackboneError, match=match):
            heads.add(name, labels)
    with pytest.raises(BackboneError, match="'b' has no head; those that have: a"):
        heads.use("b")
    assert heads.names == ("a",)
    made.model.config.num_labels = 7
    with pytest.raises(BackboneError, match="7 outputs"):
        Heads(made.model, seed=0)
