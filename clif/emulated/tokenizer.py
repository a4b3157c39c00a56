"""The tokenizer of a model's folder, read without transformers. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from clif.errors import ConfigError
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.models.hf_config import read_tree
from clif.models.weights.files import RANDOM, is_gguf, locate
from clif.tokenizer import TOKENIZER_FILE, ChatTokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(path: str) -> ChatTokenizer:
    """The tokenizer of what model.path names: a folder, or `random:` and a config.json.

    Raises ConfigError where there is none that can be read without transformers.
    """
    local = locate(path)
    if local is None or is_gguf(path):
        raise ConfigError(
            f"engine.emulated takes the tokenizer of a folder, and model.path {path} is none: name a folder with "
            f"{TOKENIZER_FILE}, or {RANDOM} and a config.json"
        )
    folder = local if local.is_dir() else local.parent
    if (folder / TOKENIZER_FILE).is_file():
        return _read(folder)
    if not path.startswith(RANDOM):
        raise ConfigError(f"{folder} holds no {TOKENIZER_FILE}: engine.emulated needs one")
    return byte_tokenizer(int(read_tree(local)["vocab_size"]))


def _read(folder: Path) -> ChatTokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        settings, special = _json(folder / "tokenizer_config.json"), _json(folder / "special_tokens_map.json")
        named = {name: _text(settings.get(name, special.get(name))) for name in SPECIAL}
        given = {name: text for name, text in named.items() if text}
        eos = tokenizer.token_to_id(given["eos_token"]) if "eos_token" in given else None
        ids = [id for id in (eos, *_eos_ids(folder)) if id is not None]
        return ChatTokenizer(tokenizer, _template(folder, settings), ids, given)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers has no class of its own for a damaged file.
        raise ConfigError(f"{folder} holds no tokenizer that can be read ({error}): get it again") from error


def _eos_ids(folder: Path) -> list[int]:
    ids = _json(folder / "generation_config.json").get("eos_token_id")
    ids = _json(folder / "config.json").get("eos_token_id") if ids is None else ids
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((str(named["template"]) for named in template if named.get("name") == "default"), None)
    return template


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _text(token: Any) -> str | None:
    """A special token is a string, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token
