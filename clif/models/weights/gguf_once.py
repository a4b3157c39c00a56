"""Transformers reads the header of a GGUF file once, where it would do so for each part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

from clif.models.weights.files import is_gguf

SLOW = ("GGUFReader", "get_tensor_name_map")
"""Of the package gguf: what reads a whole vocabulary, and what lists the names of all tensors of an architecture."""


@contextmanager
def read_once(path: str) -> Iterator[None]:
    """Inside, the results of SLOW are kept; they depend on their arguments and the file alone.

    Transformers asks for a header for the configuration, the tokenizer and the weights, several times each, and for
    the names again for each module: of 29 s of a core that a model of 135M parameters with 49,152 words takes to be
    loaded, 17 are spent on that. Nothing happens for a model that is no GGUF file.
    """
    if not is_gguf(path):
        yield
        return
    gguf = import_module("gguf")
    plain = {name: getattr(gguf, name) for name in SLOW}
    for name, function in plain.items():
        setattr(gguf, name, cache(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)
