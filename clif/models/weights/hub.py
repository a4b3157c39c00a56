"""Hub names as folders, for reading a model in parts."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from clif.config import ConfigError
from clif.models.weights.files import RANDOM

WANTED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
)
"""Weights in one format only: the hub has many models in several."""


def is_hub_name(path: str) -> bool:
    """Whether model.path is neither random weights nor a place on this machine, as transformers decides it."""
    local = path.startswith((".", "/")) or path.endswith(".gguf") or Path(path).is_dir()
    return not local and not path.startswith(RANDOM)


def snapshot(name: str) -> str:
    """The folder in the hub's cache with a model's safetensors, configuration and tokenizer.

    Downloads what is missing, unless HF_HUB_OFFLINE says otherwise. Raises ConfigError when it cannot be had.
    """
    try:
        return snapshot_download(name, allow_patterns=list(WANTED))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path {name} cannot be had from the hub ({reason}): correct it, or name a folder with the model"
        ) from error
