"""Models from disk or the hub, checked: a problem with what the user named is one line, before anything is trained."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import check_head

SMALL_MODEL = 10_000_000  # parameters
HUB_TIMEOUT = 10  # seconds


def load_model(path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, padded on the left.

    Raises:
        ValueError: what could not be loaded, and why, in one line.
    """
    tokenizer = load_tokenizer(path)
    return load_weights(path, dtype), tokenizer


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, padded on the left.

    Args:
        path: directory or hub id.

    Raises:
        ValueError: what could not be loaded, and why, in one line.
    """
    _check_hub(path)
    with _one_line_errors(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_weights(path: str, dtype: str = "float32") -> Any:
    """A causal language model, whose head must be among the saved weights; an adapter is merged into its base model.

    Args:
        path: directory or hub id.
        dtype: a name of torch's, or `auto`, as it was saved.

    Raises:
        ValueError: what could not be loaded, and why, in one line.
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapter(path, dtype)
    with _one_line_errors(path):
        check_head(path, AutoConfig.from_pretrained(path).architectures)
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model: {path!r} was saved without {', '.join(missing[:3])}, which would be random; "
            "name a causal language model that was saved whole"
        )
    return model


def _load_adapter(path: str, dtype: str) -> Any:
    """The base model of a saved adapter, with the adapter's weights merged into it."""
    from peft import PeftConfig, PeftModel

    with _one_line_errors(path):
        base = load_weights(str(PeftConfig.from_pretrained(path).base_model_name_or_path), dtype)
        return PeftModel.from_pretrained(base, path).merge_and_unload()  # type: ignore[operator]


@contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """Reduce the error of a loader to its first line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model: {path!r} cannot be loaded: {reason}; name a saved model's directory or a hub id"
        ) from None


def _check_hub(name: str) -> None:
    """Ask the hub once about a model that is not on this machine: its own loader retries for more than a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: {name!r} is neither a directory nor in the hub's cache, and the hub does not give it: {reason}; "
            "check the name and the network, or name a saved model's directory"
        ) from None


def suit_threads(model: Any) -> None:
    """Use one thread for a tiny model, unless OMP_NUM_THREADS is set.

    Threads that synchronize at every small operation make a tiny model many times slower on a busy machine.
    """
    if "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)


def quiet() -> None:
    """Keep messages and progress bars of the libraries off the terminal; warnings of isentropic stay."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
