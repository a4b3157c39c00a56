"""Which weights of a model stay packed, and in which forms: what a dry run counts with. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clif.config import ConfigError, ModelConfig
from clif.models.checkpoint_scheme import Scheme, scheme_of
from clif.models.weights.files import PACKED, RANDOM, as_plain, gguf_name, is_gguf, locate, read_model, tensors_of
from clif.models.weights.forms import GGUF_FORMS, Form
from clif.models.weights.gguf_header import read_header

FormOf = Callable[[str], Form | None]
"""Name of a weight -> its form; None: it is plain."""
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
KEPT = "file"
"""The value of model.weight_dtype that keeps what a file has."""


def check_kept(model: ModelConfig, scheme: Scheme | None) -> None:
    """Raises ConfigError for a model.weight_dtype that does not go with the weights of its files. scheme: of theirs."""
    if model.weight_dtype == KEPT and scheme is None and not is_gguf(model.path):
        raise ConfigError(
            f"model.weight_dtype {KEPT} keeps quantised weights, and those of model.path {model.path} are plain: set "
            "model.weight_dtype=auto"
        )
    if scheme is not None and model.weight_dtype not in ("auto", KEPT):
        raise ConfigError(
            f"model.weight_dtype {model.weight_dtype} quantises plain weights, and those of model.path {model.path} "
            f"are quantised ({scheme.method}, {scheme.bits} bits): set model.weight_dtype=auto"
        )


def kept_forms(model: ModelConfig) -> FormOf | None:
    """Of the weights of linear layers, the head's, and the embedding's for a head that is tied; None: all are plain."""
    local = locate(model.path)
    if local is None or model.path.startswith(RANDOM):
        return None
    if is_gguf(local.name):
        return _of_gguf(local) if model.weight_dtype == KEPT else None
    scheme = scheme_of(read_model(local))
    return None if scheme is None else _of_folder(local, scheme)


def _of_folder(folder: Path, scheme: Scheme) -> FormOf:
    tensors = dict(tensors_of(folder))
    packed = {name for name, (dtype, _) in as_plain(tensors, scheme) if dtype == PACKED}

    def form_of(name: str) -> Form | None:
        if name not in packed:
            return None
        module = name.removesuffix(".weight")
        dtype = next(tensors[scale][0] for scale in (f"{module}.scales", f"{module}.weight_scale") if scale in tensors)
        return Form(scheme.bits, scheme.group, BYTES[dtype], 1 if scheme.zeros else 0, scheme.ordered)

    return form_of


def _of_gguf(file: Path) -> FormOf:
    # Late: a machine that serves no GGUF file need not have the package.
    from gguf.constants import GGMLQuantizationType

    extents = read_header(file).extents

    def form_of(name: str) -> Form | None:
        extent = extents.get(gguf_name(name) or "")
        return None if extent is None else GGUF_FORMS.get(GGMLQuantizationType(extent.kind).name)

    return form_of
