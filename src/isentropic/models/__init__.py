"""Models by name: built-in ones, which are built or fetched once, local directories, and hub ids.

:mod:`~isentropic.models.loading` loads them, :mod:`~isentropic.models.generation` samples answers from them and
:mod:`~isentropic.models.episodes` plays environments with them. Importing this package imports no torch and builds
nothing.
"""

import json
import os
from importlib import import_module
from pathlib import Path

from .. import lazy
from ..control.names import suggest

__getattr__, *_ = lazy(
    __name__, {"generation": ("encode", "sample"), "episodes": ("play",), "loading": ("load_model", "load_tokenizer")}
)

MODELS: dict[str, str] = {
    "tiny": "isentropic.models.tiny:tiny_model",
    "smollm2": "isentropic.models.smollm2:smollm2_model",
}
# Endings of the names of transformers' classes that have a head over the vocabulary.
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def resolve_model(name: str, *, rebuild: bool = False) -> str:
    """Return what `from_pretrained` takes: a directory for a built-in name, any other name unchanged.

    Args:
        name: a key of `MODELS` (`tiny` is built if it is not in the cache yet), a directory, or a hub id.
        rebuild: build a built-in model even if it is in the cache.

    Raises:
        ValueError: the name is a local path, and there is no model; or `smollm2`, before it was fetched.

    Example:
        >>> resolve_model("Qwen/Qwen3-0.6B")
        'Qwen/Qwen3-0.6B'
    """
    if name in MODELS:
        module, _, attribute = MODELS[name].partition(":")
        return str(getattr(import_module(module), attribute)(rebuild=rebuild))
    path = Path(name).expanduser()
    if not _is_local(name):
        return name
    if not (path / "config.json").is_file():
        got = "a directory without it" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise ValueError(
            f"model {name!r} must be a directory with a config.json, got {got}; "
            f"point at one that save_pretrained wrote, use a hub id, or a built-in name: {', '.join(MODELS)}"
        )
    # A hub id of the same spelling must not take precedence over the directory, and transformers does not expand ~.
    return str(path)


def cache_root() -> Path:
    """Return the directory of built models; it need not exist."""
    if root := os.environ.get("ISENTROPIC_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isentropic"


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).exists()


def check_saved(name: str) -> None:
    """Refuse a model that cannot work, judged by its name and its directory, without torch and without a hub.

    Raises:
        ValueError: not a built-in name, directory or hub id; a directory without config.json, or a model without a
            head.
    """
    if name in MODELS:
        return
    if not _is_local(name):
        if "/" not in name:
            raise ValueError(
                f"model: got {name!r}{suggest(name, MODELS)}; allowed: {', '.join(MODELS)}, a directory, or a hub id "
                "such as ORG/NAME"
            )
        return
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        adapter = path.with_name("adapter_config.json").is_file()
        hint = "merge the adapter into its base model first, or " if adapter else ""
        raise ValueError(f"model: {name} has no config.json; {hint}name a saved model's directory or a hub id")
    try:
        classes = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    except (ValueError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"model: {path} is not a JSON object; save the model again") from None
    check_head(name, classes)


def check_head(name: str, classes: list[str] | None) -> None:
    """Refuse a model that was not saved with a head over the vocabulary.

    Args:
        name: for the message.
        classes: `architectures` of its config, or None if the config has none.

    Raises:
        ValueError: none of the classes has such a head.

    Example:
        >>> check_head("mine", ["Qwen3ForCausalLM"])
    """
    if classes and not any(c.endswith(_HEADS) for c in classes):
        raise ValueError(
            f"model: {name} is a {', '.join(classes)}, which has no causal head over the vocabulary; "
            "name a causal language model (...ForCausalLM)"
        )
