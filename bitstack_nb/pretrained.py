"""A pretrained sequence classifier and its tokenizer: from the Hub, a folder or the package.

Scope: finding the files, loading them quietly, and recording which bytes they were; padding and
loss set up for one label per text; encoded rows padded into batches.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import nn
from transformers.utils import logging as transformers_logging

from bitstack_nb.files import sha256
from bitstack_nb.hub import TIMEOUT, first_line, hub_errors
from bitstack_nb.settings import TINY

CONFIG = "config.json"
TINY_FOLDER = Path(__file__).parent / "data" / "tiny"  # written by data/pretrain_tiny.py
# The files that transformers reads, all at the top level of a repository.
_SETTINGS = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)")
_WEIGHTS = (  # the first kind that a repository has
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
)
_BANK = re.compile(r"bank\.safetensors|base/[^/]+")  # what a bank has beside its settings

logger = logging.getLogger(__name__)


class BackboneError(ValueError):
    """A backbone cannot be loaded or used as asked."""


def load_pretrained(
    name: str, *, revision: str | None = None, tokenizer: Path | None = None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, dict[str, Any]]:
    """Load a sequence classifier in float32 on the CPU, and its tokenizer.

    Weights that the files lack are initialised from torch's global generator.

    Args:
        name: ``"tiny-gpt2"``, a local folder, or a name on the Hub.
        revision: the commit or branch on the Hub; the newest commit if not given.
        tokenizer: the folder of its tokenizer, if that is another.

    Returns:
        Model, tokenizer, and their provenance (as in :class:`bitstack_nb.data.backbones.Backbone`).

    Raises:
        BackboneError: see :func:`bitstack_nb.data.backbones.load_backbone`.
    """
    folder = locate(name, revision=revision)
    source = {"source": "hub", "revision": folder.name}
    if name == TINY or Path(name).expanduser().is_dir():
        kind = "package" if name == TINY else "folder"
        source = {"source": kind, "sha256": _weight_digests(folder)}
    safe = {"trust_remote_code": False}  # else transformers asks whether to run the model's code
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **safe)
            if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                raise BackboneError(
                    f"{name}: transformers has no sequence classifier for {config.model_type!r};"
                    " take an encoder such as distilbert-base-uncased or a decoder such as gpt2"
                )
            tokenizer = _load_tokenizer(tokenizer or folder, name)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **safe
            )
            _check_tokens(model, tokenizer, name)
    except BackboneError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, ... by version
        raise BackboneError(
            f"{name}: transformers cannot load it ({first_line(error)}); check its files"
        ) from error
    prefix = f"{model.base_model_prefix}."
    absent = sorted(key for key in report["missing_keys"] if key.startswith(prefix))
    if absent:
        # transformers' own report is silenced because it names the new head every time.
        logger.warning("%s: absent from the files, so random: %s", name, ", ".join(absent))
    return model, tokenizer, source


def prepare(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    name: str,
) -> None:
    """Set up padding, the tokenizer's columns and the loss for one integer label per text."""
    # A model saved for regression or several labels would use another loss.
    model.config.problem_type = "single_label_classification"
    taken = _forward_names(model)
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    if not _is_decoder(model):
        return
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(
                f"{name}: the tokenizer has neither a padding nor an end token, and a decoder"
                " needs one in batches; save one with the tokenizer (tokenizer.pad_token = ...)"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
        config.use_cache = False  # each text is read once, so a cache only costs memory


def positions(model: transformers.PreTrainedModel) -> int | None:
    """The number of tokens that the model has positions for; None if there is no limit."""
    for name, module in model.named_modules():
        # RoBERTa and models like it count positions from the padding index on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return module.num_embeddings - module.padding_idx - 1
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet's -1 means none


def tokenized(
    tokenizer: transformers.PreTrainedTokenizerBase, *texts: Sequence[str], max_length: int
) -> dict[str, list[list[int]]]:
    """The tokenizer's columns of texts, or of pairs, cut at ``max_length`` and not padded.

    The longer text of a pair is cut first.

    Raises:
        BackboneError: ``max_length`` leaves no room for the special tokens.
    """
    cut = {"truncation": "longest_first", "max_length": max_length}
    columns = dict(tokenizer(*map(list, texts), **cut))
    full_stop = tokenizer(".", **cut)
    for row, tokens in enumerate(columns["input_ids"]):
        # A decoder gives NaN for a row of padding only: an empty text is read as a full stop.
        if set(tokens) <= {tokenizer.pad_token_id}:
            for name, column in columns.items():
                column[row] = full_stop[name]
    if max(map(len, columns["input_ids"])) > max_length:
        raise BackboneError(
            f"max_length {max_length} leaves no room for the special tokens of a text or pair: "
            "use more"
        )
    return columns


def collator(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase
) -> Callable[[list[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """Return a function that pads encoded rows into a batch, see :func:`data.backbones.collate`."""
    position_ids = _is_decoder(model) and "position_ids" in _forward_names(model.base_model)
    # A partial of a module's function can be pickled for the workers of a data loader.
    return partial(_pad, tokenizer=tokenizer, position_ids=position_ids)


def _pad(
    rows: list[Mapping[str, Any]],
    *,
    tokenizer: transformers.PreTrainedTokenizerBase,
    position_ids: bool,
) -> dict[str, torch.Tensor]:
    inputs = [name for name in tokenizer.model_input_names if name in rows[0]]
    columns = {name: [row[name] for row in rows] for name in inputs}
    batch = dict(tokenizer.pad(columns, return_tensors="pt"))
    if position_ids:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for name in ("labels", "task"):
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.int64)
    return batch


def _is_decoder(model: nn.Module) -> bool:
    # transformers calls the head `score` in the classifiers that pool the last token.
    return hasattr(model, "score")


def _forward_names(model: nn.Module) -> Collection[str]:
    return inspect.signature(model.forward).parameters


def _load_tokenizer(folder: Path, name: str) -> transformers.PreTrainedTokenizerBase:
    way_out = "save one beside the model (tokenizer.save_pretrained(folder))"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, ... by architecture
        if lacking := _lacking_packages(folder):
            raise BackboneError(
                f"{name}: its tokenizer is a SentencePiece file; install what reads it (pip install"
                f" {' '.join(lacking)}) and start Python again"
            ) from error
        raise BackboneError(
            f"{name}: the tokenizer cannot be loaded ({first_line(error)}); {way_out}"
        ) from error
    # Without tokenizer files transformers makes a tokenizer of nothing but special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise BackboneError(f"{name}: there are no tokenizer files; {way_out}")
    return tokenizer


def _lacking_packages(folder: Path) -> list[str]:
    """The packages that are not installed, but read a tokenizer of a ``.model`` file alone."""
    if (folder / "tokenizer.json").exists() or not list(folder.glob("*.model")):
        return []
    return [name for name in ("sentencepiece", "protobuf") if not _installed(name)]


def _installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def _check_tokens(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, name: str
) -> None:
    """Raise a BackboneError if the tokenizer gives a number that no embedding has."""
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # CANINE hashes characters
        return
    token, last = max(tokenizer.get_vocab().items(), key=itemgetter(1))
    if last >= rows:
        raise BackboneError(
            f"{name}: the tokenizer has token {token!r} with number {last}, but the model has"
            f" {rows} embeddings; take the model's own tokenizer, or save the model after"
            " resize_token_embeddings(len(tokenizer))"
        )


def locate(name: str, *, revision: str | None = None, marks: Sequence[str] = (CONFIG,)) -> Path:
    """The local folder of a model or a bank, downloaded if it is a Hub name.

    Args:
        name: ``"tiny-gpt2"`` (in the package), a local folder, or a name on the Hub.
        revision: the commit or branch on the Hub; the newest commit if not given.
        marks: the files of which it has at least one.

    Raises:
        BackboneError: there is no such folder or name, or it has none of the files.
    """
    folder = TINY_FOLDER if name == TINY else Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / mark).is_file() for mark in marks):
            raise BackboneError(
                f"{name}: the folder has no {' and no '.join(marks)}; give one that "
                "model.save_pretrained wrote"
            )
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BackboneError(f"{name}: no such folder; give a folder or a Hub name (owner/model)")
    return _download(name, revision, marks)


def _download(name: str, revision: str | None, marks: Sequence[str]) -> Path:
    """The folder .../snapshots/<commit> of a Hub model in the local cache, completed if need be."""
    instead = "give a folder that model.save_pretrained wrote"
    with hub_errors("model", name, raises=BackboneError, instead=instead):
        try:
            # Asked first: without a network, a download retries for 20 s.
            info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        except Exception:
            tried = (try_to_load_from_cache(name, mark, revision=revision) for mark in marks)
            cached = next((path for path in tried if isinstance(path, str)), None)
            if cached is None:
                raise
            return Path(cached).parent
        files = [sibling.rfilename for sibling in info.siblings]
        mark = next((mark for mark in marks if mark in files), marks[-1])
        # By branch, so that the cache can find it without a network; the others by that commit.
        folder = Path(hf_hub_download(name, mark, revision=revision)).parent
        for file in _needed(files):
            hf_hub_download(name, file, revision=folder.name)
    return folder


def _needed(files: list[str]) -> list[str]:
    """The settings and the weights of one kind, safetensors if there are any; all of a bank."""
    weights = ([file for file in files if kind.fullmatch(file)] for kind in _WEIGHTS)
    own = [file for file in files if _SETTINGS.fullmatch(file) or _BANK.fullmatch(file)]
    return own + next(filter(None, weights), [])


def _weight_digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return {path.name: sha256(path) for path in files}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading reports and progress bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # also those of huggingface_hub
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()
