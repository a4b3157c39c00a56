"""Small models of any make, as a configuration or as a folder with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from clif.models.bytes_tokenizer import byte_tokenizer

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def shaped(folder: Path, fields: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **fields}))
    return f"random:{folder}"


def saved(folder: Path, fields: dict[str, Any]) -> str:
    """A folder as its makers write it, with random weights and a tokenizer."""
    shape = {"model_type": "llama", **SMALL, **fields}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**shape))
    model.save_pretrained(folder)
    byte_tokenizer(300).save(folder)
    return str(folder)
