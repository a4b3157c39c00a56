"""Which weights of a model stay packed, and in which forms: what a dry run counts with. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clif.config import ModelConfig
from clif.models.weights.files import gguf_name, is_gguf, locate
from clif.models.weights.forms import GGUF_FORMS, Form
from clif.models.weights.gguf_header import read_header

FormOf = Callable[[str], Form | None]
"""Name of a weight -> its form; None: it is plain."""
KEPT = "file"
"""The value of model.weight_dtype that keeps what a file has."""


def kept_forms(model: ModelConfig) -> FormOf | None:
    """Of the weights of linear layers, the head's, and the embedding's for a head that is tied; None: all are plain."""
    local = locate(model.path)
    if model.weight_dtype != KEPT or local is None or not is_gguf(local.name):
        return None
    return _of_gguf(local)


def _of_gguf(file: Path) -> FormOf:
    # Late: a machine that serves no GGUF file need not have the package.
    from gguf.constants import GGMLQuantizationType

    extents = read_header(file).extents

    def form_of(name: str) -> Form | None:
        extent = extents.get(gguf_name(name) or "")
        return None if extent is None else GGUF_FORMS.get(GGMLQuantizationType(extent.kind).name)

    return form_of
