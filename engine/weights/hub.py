"""Checkpoints by their hub id, such as deepseek-ai/Janus-Pro-1B."""

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from engine.settings.errors import UserError
from engine.weights.files import has_weights, one_line

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SETTINGS = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHTS = (["*.safetensors"], ["*.bin"])


def is_hub_id(path: str) -> bool:
    """Whether a --model value has the form owner/name and is no folder here."""
    return _ID.fullmatch(path) is not None and not Path(path).exists()


@cache
def hub_folder(name: str) -> Path:
    """The folder of a hub checkpoint, fetched if it is not in huggingface_hub's cache.

    Args:
        name: owner/name. Its safetensors are preferred to its pickles.
    Raises: UserError naming it: offline, unknown, or not open to this user.
    """
    folder = Path()
    for weights in _WEIGHTS:
        try:
            folder = Path(snapshot_download(name, allow_patterns=_SETTINGS + weights))
        # Offline, unknown, gated, interrupted, disk full: each its own class of several libraries.
        except Exception as error:
            raise UserError(
                f"{name}: no such folder, and the hub does not give it: {one_line(error)}"
            ) from None
        if has_weights(folder):
            break
    return folder
