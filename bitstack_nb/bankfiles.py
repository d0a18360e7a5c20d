"""The folder of a saved task bank, here or on the Hugging Face Hub.

- ``bank.safetensors``: the tasks with everything that answers, as ``ExactRecall.save`` writes them.
- ``bank.json``: format, the base's name, revision and digest, settings, and a readable list of the
  tasks. Of it, loading takes the base, ``max_length`` and what was measured.
- The tokenizer's files, a model card (``README.md``), and ``base/`` if the base is included.

Each file is replaced as a whole, and ``bank.safetensors`` alone holds the tasks. So after a crash
in saving, the folder has the tasks of before or those of after.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import HfApi

from bitstack_nb.files import replacing
from bitstack_nb.hub import hub_errors
from bitstack_nb.maskfile import MaskFileError
from bitstack_nb.pretrained import CONFIG, BackboneError, load_pretrained, locate, prepare, quiet
from bitstack_nb.recall import ExactRecall
from bitstack_nb.settings import TINY

if TYPE_CHECKING:
    from bitstack_nb.bank import TaskBank

RECORD, TASKS, BASE, CARD = "bank.json", "bank.safetensors", "base", "README.md"
FORMAT, VERSION = "bitstack-bank", 1
_LISTED = {"name", "labels", "digest", "measured"}  # what is said of every task
OURS = "<!-- Written by TaskBank. Without this line the next save leaves this page as it is. -->"


@dataclass
class Saved:
    """What ``from_pretrained`` was given.

    Attributes:
        folder: of the bank, or of the backbone.
        record: what ``bank.json`` says; None for a backbone.
        base: the backbone's ``name`` and ``revision``.
        given: where the backbone was loaded from.
    """

    folder: Path
    record: dict[str, Any] | None
    base: dict[str, Any]
    given: str


def load(
    name: str, *, base: str | Path | None, revision: str | None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, Saved]:
    """The backbone and tokenizer of a bank, or those that a name stands for.

    Raises:
        BackboneError: they cannot be found or loaded.
        MaskFileError: ``bank.json`` is damaged.
    """
    folder = locate(name, revision=revision, marks=(RECORD, CONFIG))
    if not (folder / RECORD).is_file():
        model, tokenizer, source = _classifier(name, revision)
        origin = {"name": name, "revision": source.get("revision")}
        return model, tokenizer, Saved(folder, None, origin, name)
    record = _record_in(folder)
    origin = {key: record["base"][key] for key in ("name", "revision")}
    given, commit = origin["name"], origin["revision"]
    if base is not None:
        given, commit = str(base), None
    elif (folder / BASE).is_dir():
        given, commit = str(folder / BASE), None
    try:
        model, tokenizer, _ = _classifier(given, commit, tokenizer=folder)
    except BackboneError as error:
        raise BackboneError(
            f"the base of {name} cannot be loaded: {error}. Its place can be given: base=..."
        ) from error
    return model, tokenizer, Saved(folder, record, origin, given)


def load_tasks(saved: Saved, model: transformers.PreTrainedModel) -> ExactRecall:
    """The tasks of a saved bank on its base.

    Raises:
        MaskFileError: the file is damaged, or the model is another base.
    """
    try:
        return ExactRecall.load(saved.folder / TASKS, model)
    except MaskFileError as error:
        bank = f"the bank {saved.folder} on {saved.base['name']}"
        raise MaskFileError(f"{bank} cannot be loaded with {saved.given}: {error}") from error


def _classifier(
    name: str, revision: str | None = None, tokenizer: Path | None = None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of weights that the files lack
        found = load_pretrained(name, revision=revision, tokenizer=tokenizer)
    prepare(found[0], found[1], name)
    return found


def read_record(name: str) -> dict[str, Any]:
    """What ``bank.json`` of a bank says, a folder or a Hub name.

    Raises:
        ValueError: there is no such bank, or the file is damaged.
    """
    return _record_in(locate(name, marks=(RECORD,)))


def _record_in(folder: Path) -> dict[str, Any]:
    """What ``bank.json`` says."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        told = {**record["base"]}
        fits = record["format"] == FORMAT and isinstance(record["max_length"], int)
        fits = fits and all(task.keys() >= _LISTED for task in record["tasks"])
        fits = fits and isinstance(told["name"], str) and {"revision", "digest"} <= told.keys()
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise MaskFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not fits:
        raise MaskFileError(f"{path} is damaged, or not written by TaskBank")
    if record["version"] != VERSION:
        raise MaskFileError(f"{path} has version {record['version']}, this package reads {VERSION}")
    return record


# Saving -------------------------------------------------------------------------------------------


def save(bank: TaskBank, folder: Path, *, include_base: bool) -> None:
    """Write a bank; see :meth:`bitstack_nb.bank.TaskBank.save_pretrained`."""
    record = _record(bank)
    if (folder / RECORD).is_file():
        there = _record_in(folder)["base"]
        if there["digest"] != record["base"]["digest"]:
            raise ValueError(
                f"{folder} holds a bank on another base, {there['name']} (here it is "
                f"{bank.base['name']}): choose another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with _beside(folder) as temporary:
        bank.tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            file.replace(folder / file.name)
    if include_base and not (folder / BASE).exists():
        with _beside(folder) as temporary, bank.recall.using(None) as model, quiet():
            model.save_pretrained(temporary / BASE)
            (temporary / BASE).replace(folder / BASE)
    record["base"]["included"] = (folder / BASE).is_dir()
    bank.recall.save(folder / TASKS)
    _write(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if not (folder / CARD).exists() or OURS in (folder / CARD).read_text(encoding="utf-8"):
        _write(folder / CARD, card(record))


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same file system."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
        yield Path(temporary)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _record(bank: TaskBank) -> dict[str, Any]:
    """The content of ``bank.json``."""
    recall, labels = bank.recall, bank.tasks
    tasks = [
        {
            "name": name,
            "digest": digest,
            **recall.notes(name),
            "labels": labels[name],
            "measured": bank.measured(name),
        }
        for name, digest in recall.digests.items()
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": {**bank.base, "digest": recall.base_digest},
        "settings": recall.settings,
        "max_length": bank.max_length,
        "tasks": tasks,
    }


def push(
    bank: TaskBank,
    name: str,
    *,
    include_base: bool,
    private: bool | None,
    token: str | None,
    message: str,
) -> str:
    """Upload a bank; see :meth:`bitstack_nb.bank.TaskBank.push_to_hub`."""
    if not include_base and bank.base["revision"] is None and bank.base["name"] != TINY:
        raise ValueError(
            f"the base {bank.base['name']} was not loaded from the Hub, so others may not have it: "
            "include_base=True copies it"
        )
    api, instead = HfApi(token=token), "save_pretrained(folder) keeps the bank here"
    with hub_errors("model", name, raises=ValueError, instead=instead):
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            save(bank, Path(folder), include_base=include_base)
            uploaded = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(uploaded.commit_url)


# The model card -----------------------------------------------------------------------------------

_CARD = """\
---
library_name: bitstack-nb
pipeline_tag: text-classification
{base_model}tags:
- bitstack
- multi-task
---
{ours}

# A bank of text classifiers

{count} on one backbone, {base}. A task has a head, the names of its labels, and {share} of the
eligible weights as its own. The backbone is the same for all tasks, so learning or removing a task
changes no answer of another, to the last bit.

| task | labels | trained on | held-out accuracy | test accuracy | digest |
| --- | --- | --- | --- | --- | --- |
{rows}

Accuracies are shares of the texts that the bank's owner gave, in percent. A dash means that nothing
was measured. A text's task has to be named, or the bank chooses it by the text's features on the
backbone.

```python
from bitstack_nb import TaskBank

bank = TaskBank.from_pretrained("FOLDER OR HUB NAME")
bank.predict({example}, task={task!r})
bank.verify()  # an error if one bit of the backbone or of a task has changed
```
"""


def card(record: dict[str, Any]) -> str:
    """The model card of a bank that ``bank.json`` describes."""
    base, tasks = record["base"], record["tasks"]
    commit = f" (commit {base['revision'][:12]})" if base["revision"] else ""
    pairs = bool(tasks and tasks[0]["pairs"])
    return _CARD.format(
        # The Hub knows a backbone by its name there only.
        base_model=f"base_model: {base['name']}\n" if base["revision"] else "",
        ours=OURS,
        count=f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}",
        base=f"`{base['name']}`{commit}",
        share=f"{100 * record['settings']['sparsity']:g} %",
        rows="\n".join(map(_row, tasks)),
        example='[("a text", "its second text")]' if pairs else '["a text"]',
        task=tasks[0]["name"] if tasks else "TASK",
    )


def _row(task: dict[str, Any]) -> str:
    labels = ", ".join(task["labels"][:8]) + (", ..." if task["labels"][8:] else "")
    cells = [
        task["name"],
        labels,
        _trained_on(task),
        _percent(task),
        _percent(task["measured"]),
        f"`{task['digest'][:12]}`",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _trained_on(task: dict[str, Any]) -> str:
    if task["text"] is None:
        return "kept as it was"
    return f"{task['texts']} {'pairs' if task['pairs'] else 'texts'}"


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['accuracy']:.1f}" if "accuracy" in found else "-"
