"""The header of a GGUF file, read within the bounds of the file. Free of torch.

transformers reads the file by a library that trusts its counts: a damaged or hostile file keeps it busy for ever.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from clif.errors import ConfigError
from clif.models.hf_config import Tree, check_tree

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEEPEST = 4
WINDOWED = ("gemma2", "gemma3_text")
"""Families whose windows transformers reads from such a file."""
KINDS = {"gemma3": "gemma3_text"}
"""Architectures whose name here is not the model_type of their config.json."""
SIZES = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
}  # fmt: skip
"""Fields of a config.json and their names here, which follow the name of the architecture."""


class _DamagedError(Exception):
    """The header does not fit the file."""


class Extent(NamedTuple):
    """Where the numbers of a tensor lie in the file. kind: number of their type; start, size: bytes."""

    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """values: metadata by key, None for an array; tensors: shape [out, in] by name; extents: the same for where they
    lie."""

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    extents: dict[str, Extent]

    def tree(self) -> Tree:
        """The fields of a config.json that the metadata gives."""
        kind = str(self.values.get("general.architecture"))
        found = {field: self.values.get(f"{kind}.{name}") for field, name in SIZES.items()}
        vocab = self.tensors.get("token_embd.weight", (None,))[0]
        tied = "output.weight" not in self.tensors
        window = self.values.get(f"{kind}.attention.sliding_window")
        kind = KINDS.get(kind, kind)
        return {"model_type": kind, "vocab_size": vocab, "tie_word_embeddings": tied, "sliding_window": window, **found}

    def check_tree(self, name: str, max_context: int) -> None:
        """Raises ConfigError for what transformers does not read from such a file, and all that tree() tells."""
        kinds = [str(value) for key, value in self.values.items() if key.endswith("rope.scaling.type")]
        scaled = [tensor for tensor in self.tensors if tensor.startswith("rope_")]
        scaled += [f"scaling {kind}" for kind in kinds if kind != "none"]
        if scaled:
            raise ConfigError(
                f"model.path {name} has scaled rotary frequencies ({scaled[0]}), which transformers does not read from "
                "GGUF files: choose the model as a folder with safetensors"
            )
        tree = self.tree()
        for what in self._unread(tree):
            raise ConfigError(f"model.path {name} {what}: choose the model as a folder with safetensors")
        window = tree["sliding_window"]
        if isinstance(window, int) and 0 < window < max_context and tree["model_type"] not in WINDOWED:
            raise ConfigError(
                f"model.path {name} has sliding-window attention over {window} tokens, which transformers does not "
                f"read from such GGUF files: choose the model as a folder with safetensors, or lower "
                f"model.max_context to {window}"
            )
        check_tree(tree, name, max_context)

    def _unread(self, tree: Tree) -> Iterator[str]:
        """What of the model is not read from such a file."""
        kind = str(self.values.get("general.architecture"))
        if self.values.get(f"{kind}.expert_count"):
            yield "has experts, which CLIF does not read from GGUF files"
        turned, heads, hidden = (
            self.values.get(f"{kind}.rope.dimension_count"), tree["num_attention_heads"], tree["hidden_size"]
        )  # fmt: skip
        if not all(isinstance(size, int) and size > 0 for size in (turned, heads, hidden)):
            return
        head_dim = tree["head_dim"] or hidden // heads
        if turned != head_dim:
            yield (
                f"turns {turned} of the {head_dim} numbers of each head (partial rotary embedding), which transformers "
                "does not read from GGUF files"
            )


def read_header(file: Path) -> GgufHeader:
    """Raises ConfigError for a file that is not a GGUF file, or not a whole one."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (_DamagedError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a whole GGUF file ({error}): get it again") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size = data, 0, len(data)

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF" or (version := self._number("I")) not in (2, 3):
            raise _DamagedError("it does not begin as one of version 2 or 3")
        del version
        count, pairs = self._number("Q"), self._number("Q")
        values = {self._string(): self._value(self._number("I")) for _ in self._times(pairs)}
        found = [self._tensor() for _ in self._times(count)]
        step = values.get("general.alignment", 32)
        if not isinstance(step, int) or not 0 < step <= 1 << 20:
            raise _DamagedError(f"its alignment is {step}")
        start = -(-self._at // step) * step
        extents = {name: Extent(kind, start + offset, size) for name, _, kind, offset, size in found}
        for name, extent in extents.items():
            if extent.start + extent.size > self._size:
                raise _DamagedError(f"tensor {name} ends at byte {extent.start + extent.size} of {self._size}")
        return GgufHeader(values, {name: shape for name, shape, *_ in found}, extents)

    def _times(self, count: int) -> range:
        # No entry takes less than a byte.
        if count > self._size:
            raise _DamagedError(f"it counts {count} entries in {self._size} bytes")
        return range(count)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        """Name, shape [out, in], kind, offset and bytes."""
        name = self._string()
        shape = tuple(self._number("Q") for _ in self._times(self._number("I")))
        kind, offset = self._number("I"), self._number("Q")
        # Late: a machine that serves no GGUF file need not have the package.
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(each): size for each, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes or not shape or 0 in shape:
            raise _DamagedError(f"tensor {name} of type {kind} and shape {list(shape)[:4]}")
        block, bytes_ = sizes[kind]
        return name, shape[::-1], kind, offset, prod(shape) // block * bytes_

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(NUMBERS.get(kind, ""))
        inner, length = self._number("I"), self._number("Q")
        if inner in NUMBERS:
            self._take(length * struct.calcsize(NUMBERS[inner]))
        elif depth == DEEPEST:
            raise _DamagedError("arrays in arrays in arrays")
        else:
            for _ in self._times(length):
                self._value(inner, depth + 1)
        return None

    def _number(self, code: str) -> Any:
        if not code:
            raise _DamagedError("a value of an unknown type")
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode(errors="replace")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise _DamagedError(f"{count} bytes wanted at byte {self._at} of {self._size}")
        self._at += count
        return self._data[self._at - count : self._at]
