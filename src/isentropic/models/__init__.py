"""Models by name: those that are built on the spot, and the local directories and hub ids that everyone knows.

Importing this file imports no torch and builds nothing.
"""

from importlib import import_module
from pathlib import Path

MODELS: dict[str, str] = {"tiny": "isentropic.models.tiny:tiny_model"}


def resolve_model(name: str, *, rebuild: bool = False) -> str:
    """Return what `from_pretrained` takes: a directory for a built-in name, and any other name as it is.

    Args:
        name: a key of `MODELS` (built if it is not in the cache yet), a directory, or a hub id.
        rebuild: build a built-in model even if it is in the cache.

    Raises:
        ValueError: the name can only be a local path, and there is no model.

    Example:
        >>> resolve_model("Qwen/Qwen3-0.6B")
        'Qwen/Qwen3-0.6B'
    """
    if name in MODELS:
        module, _, attribute = MODELS[name].partition(":")
        return str(getattr(import_module(module), attribute)(rebuild=rebuild))
    path = Path(name).expanduser()
    if not (name.startswith((".", "/", "~")) or path.exists()):
        return name
    if not (path / "config.json").is_file():
        got = "a directory without it" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise ValueError(
            f"model {name!r} must be a directory with a config.json, got {got}; "
            f"point at one that save_pretrained wrote, use a hub id, or a built-in name: {', '.join(MODELS)}"
        )
    # A hub id of the same spelling must not win over the directory, and nobody below expands ~.
    return str(path)
