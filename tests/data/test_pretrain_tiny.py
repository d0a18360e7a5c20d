"""The tiny GPT-2 of the package: the file that is shipped, and the script that makes it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from bitstack_nb import TaskBank
from bitstack_nb.data import load_backbone
from bitstack_nb.data.embedded import embedded_corpus, embedded_split
from bitstack_nb.data.pretrain_tiny import pretrain, tiny_config, tiny_tokenizer, write
from bitstack_nb.data.tasks import FIVE_TASKS
from bitstack_nb.files import sha256
from bitstack_nb.pretrained import TINY_FOLDER

DIGEST = "25af1ea3ddbec0d114c2297a3f7015de48531ebf0df0d57abd0739f93025b199"


def test_the_shipped_file_is_the_one_that_was_tuned_on_and_loads_exactly():
    file = TINY_FOLDER / "model.safetensors"
    assert sha256(file) == DIGEST
    assert file.stat().st_size < 500_000
    backbone = load_backbone("tiny-gpt2", max_length=48, seed=0)
    assert backbone.provenance["source"] == "package"
    assert backbone.provenance["sha256"] == {file.name: DIGEST}
    loaded = backbone.model.base_model.state_dict()
    assert loaded.keys() == (stored := load_file(file)).keys()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


def test_the_script_makes_the_same_model_again_and_leaves_the_random_state():
    before = torch.get_rng_state()
    first, second = (pretrain(steps=2).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    shipped = load_file(TINY_FOLDER / "model.safetensors")
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in shipped.items()}
    assert any(not torch.equal(first[name], shipped[name]) for name in first)


def test_the_scripts_files_are_those_of_the_package(tmp_path):
    write(tmp_path, pretrain(steps=1))
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in TINY_FOLDER.iterdir()}
    tokenizer = (TINY_FOLDER / "tokenizer.json").read_text()
    assert (tmp_path / "tokenizer.json").read_text() == tokenizer
    config = tiny_config(len(tiny_tokenizer())).to_dict()
    shipped = load_backbone("tiny-gpt2", max_length=48, seed=0).model.config.to_dict()
    same = ("vocab_size", "n_layer", "n_embd", "n_head", "n_positions", "resid_pdrop")
    assert [shipped[name] for name in same] == [config[name] for name in same]


def test_no_text_of_the_corpus_is_a_row_of_a_task():
    corpus = embedded_corpus(20_000)
    assert corpus == embedded_corpus(20_000)
    rows = {
        " ".join(filter(None, (row[column] for column in task.text)))
        for task in FIVE_TASKS
        for split in ("train", "test")
        for row in embedded_split(task.name, split)
    }
    assert not rows.intersection(corpus)


def test_a_task_bank_knows_it_by_name_wherever_the_package_is(tmp_path):
    bank = TaskBank.from_pretrained("tiny-gpt2", device="cpu")
    bank.learn("words", [("good", "yes"), ("bad", "no"), ("slow", "no")], epochs=1, progress=False)
    bank.save_pretrained(tmp_path)
    assert '"name": "tiny-gpt2"' in (tmp_path / "bank.json").read_text()
    assert str(TINY_FOLDER) not in (tmp_path / "bank.json").read_text()
    again = TaskBank.from_pretrained(tmp_path, device="cpu")
    assert again.predict(["bad"], task="words") == bank.predict(["bad"], task="words")
