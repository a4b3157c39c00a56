"""A tokenizer for models that have none: one token per byte, for random weights in benchmarks."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from clif.config import ConfigError
from clif.tokenizer import ChatTokenizer

EOS = "<|end|>"


def byte_tokenizer(vocab_size: int) -> ChatTokenizer:
    """Ids 0..255 are bytes and 256 ends a text. Raises ConfigError if the model's vocabulary is smaller."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise ConfigError(
            f"a random model without a tokenizer needs a vocab_size above {len(alphabet)}, not {vocab_size}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return ChatTokenizer(tokenizer, None, [len(alphabet)], {"eos_token": EOS})
