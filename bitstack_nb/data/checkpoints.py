"""Where a pretrained sequence classifier comes from: a folder, or the Hub or its local cache.

Scope: finding a checkpoint, loading its model and tokenizer quietly, and saying which bytes they
were. What a benchmark needs of them beyond that is in ``backbones``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

from bitstack_nb.data import hub
from bitstack_nb.data.errors import BackboneError
from bitstack_nb.files import sha256

# What transformers reads of a repository, at its top level; weights as safetensors if there are.
_SETTINGS = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)")
_WEIGHTS = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
)

logger = logging.getLogger(__name__)


def load_pretrained(
    name: str,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, dict[str, Any]]:
    """Load a sequence classifier in float32 on the CPU, and its tokenizer.

    Weights that the checkpoint lacks are drawn from torch's global generator.

    Args:
        name: a local folder, or a name on the Hub.

    Returns:
        Model, tokenizer, and their provenance (as in :class:`bitstack_nb.data.backbones.Backbone`).

    Raises:
        BackboneError: see :func:`bitstack_nb.data.backbones.load_backbone`.
    """
    folder, source = _locate(name)
    # Said at once: otherwise transformers stops and asks whether to run the checkpoint's code.
    safe = {"trust_remote_code": False}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **safe)
            if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                raise BackboneError(
                    f"{name}: transformers has no sequence classification head for architecture"
                    f" {config.model_type!r}; take an encoder such as distilbert-base-uncased or a"
                    " decoder such as gpt2"
                )
            tokenizer = _load_tokenizer(folder, name)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **safe
            )
    except BackboneError:
        raise
    except Exception as error:  # anything from OSError to SafetensorError, by version
        raise BackboneError(
            f"{name}: transformers cannot load it ({hub.first_line(error)}); check the files, or"
            " take another model, e.g. tiny-gpt2"
        ) from error
    prefix = f"{model.base_model_prefix}."
    drawn = sorted(key for key in report["missing_keys"] if key.startswith(prefix))
    if drawn:
        # transformers' report, silenced because it always names the head, would have said so.
        logger.warning("%s: not in the checkpoint, so random: %s", name, ", ".join(drawn))
    return model, tokenizer, source


def _load_tokenizer(folder: Path, name: str) -> transformers.PreTrainedTokenizerBase:
    way_out = "save one beside the model (tokenizer.save_pretrained(folder))"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, ... by architecture
        raise BackboneError(
            f"{name}: no tokenizer that can be loaded ({hub.first_line(error)}); {way_out}"
        ) from error
    # Without tokenizer files transformers makes one that knows its special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise BackboneError(f"{name}: there are no tokenizer files; {way_out}")
    return tokenizer


def _locate(name: str) -> tuple[Path, dict[str, Any]]:
    """Find a folder or Hub model: its folder here, and its provenance."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(
                f"{name}: the folder has no config.json; give one that model.save_pretrained wrote"
            )
        return folder, {"source": "folder", "sha256": _weight_digests(folder)}
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BackboneError(f"{name}: no such folder; give a folder or a Hub name (owner/model)")
    # Hub models, too, are loaded from a folder, the cache's: transformers may take a request that
    # failed for a file that is not there, and sends some even if told to stay local.
    folder = _fetch(name)
    return folder, {"source": "hub", "revision": folder.name}


def _fetch(name: str) -> Path:
    """Bring a Hub model into the local cache, or find it there: its .../snapshots/<commit>."""
    try:
        # First: it answers at once without a network, where downloads retry for half a minute.
        info = hub.ask(partial(HfApi().model_info, name, timeout=hub.TIMEOUT), name)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BackboneError(
            f"{name}: neither a folder here nor a model on the Hub that you may read; check the"
            " name on https://huggingface.co/models, or take tiny-gpt2"
        ) from error
    except Exception as error:  # the HTTP client, and so its errors, differ between versions
        return _find_cached(name, error)
    try:
        # By its branch and not by the commit: only so can it be found without network next time.
        config = hub.ask(partial(hf_hub_download, name, "config.json"), name)
        folder = Path(config).parent
        for file in _needed([sibling.rfilename for sibling in info.siblings]):
            hub.ask(partial(hf_hub_download, name, file, revision=folder.name), name)
    except Exception as error:
        raise BackboneError(
            f"{name}: cannot be had from the Hub ({hub.first_line(error)}); try again later, or"
            " take a model in the format of transformers that you may read, or tiny-gpt2"
        ) from error
    return folder


def _find_cached(name: str, unreachable: Exception) -> Path:
    try:
        config = hf_hub_download(name, "config.json", local_files_only=True)
    except Exception:
        raise BackboneError(
            f"{name}: not in the local cache, and the Hub cannot be reached"
            f" ({hub.first_line(unreachable)}); connect, or give a model folder, or take tiny-gpt2"
        ) from unreachable
    return Path(config).parent


def _needed(files: list[str]) -> list[str]:
    needed = [file for file in files if _SETTINGS.fullmatch(file)]
    weights = ([file for file in files if form.fullmatch(file)] for form in _WEIGHTS)
    return needed + next(filter(None, weights), [])


def _weight_digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return {path.name: sha256(path) for path in files}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading reports and bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # the Hub's, too
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()
