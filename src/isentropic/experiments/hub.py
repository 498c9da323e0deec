"""The Hugging Face hub: it refuses before a model loads, and a push that fails does not fail a run that has ended."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .config import ConfigError


def check_hub(name: str) -> None:
    """Create the repository that a run is pushed to, unless it is there; the main process alone asks the hub.

    Args:
        name: NAME, of the user who is logged in, or OWNER/NAME.

    Raises:
        ConfigError: no client, no login, no connection, or no right to write there.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        import huggingface_hub as hub
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError:
        raise ConfigError("--push-to-hub needs huggingface_hub; pip install 'isentropic[trl]'") from None
    if HF_HUB_OFFLINE:
        raise ConfigError(f"--push-to-hub: got {name}, and HF_HUB_OFFLINE is set; unset it, or leave the push out")
    if hub.get_token() is None:
        raise ConfigError(f"--push-to-hub: got {name} without a login; run `hf auth login`, or set HF_TOKEN")
    try:
        hub.create_repo(name, exist_ok=True)
    except Exception as error:  # of the connection, of the server, of the name
        raise ConfigError(f"--push-to-hub: {name} cannot be created: {error}; name another, or leave it out") from None


def push(trainer: Any, name: str, say: Callable[[str], None]) -> None:
    """Push the trained model and its run directory, without the checkpoints; every process calls this.

    Args:
        trainer: that has trained.
        name: of the repository.
        say: called with the line that says where it is, or why it is not there.
    """
    try:
        trainer.push_to_hub(commit_message="The end of training")
    except Exception as error:
        say(f"not pushed to {name}: {error}; push it by `hf upload {name} {trainer.args.output_dir}`")
    else:
        say(f"pushed: https://huggingface.co/{name}")
