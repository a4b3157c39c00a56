"""The files that model.path names: where they lie, and whether they hold all weights. Free of torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clif.errors import ConfigError
from clif.models.checkpoint_scheme import MARKS, Scheme
from clif.models.expert_spec import Experts
from clif.models.hf_config import Tree, read_tree
from clif.models.layer_spec import ModelSpec
from clif.models.weights.gguf_header import GgufHeader, read_header

RANDOM = "random:"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PACKED = "packed"
"""Stands for the dtype of a weight that is whole numbers and scales."""
PLAIN = ("F64", "F32", "F16", "BF16", PACKED)
INDEX_BYTES = 64 << 20
DERIVED = re.compile(r"rotary_emb\.|\.masked_bias$")
"""Tensors of older files that are computed, not loaded."""
Sizes = tuple[int, ...]
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip


def is_gguf(path: str) -> bool:
    """Whether a model path names a GGUF file."""
    return path.endswith(".gguf")


def locate(path: str) -> Path | None:
    """The config.json of random weights, the GGUF file or the folder that model.path names; None: a name of the hub.

    Raises ConfigError, with what to change, where there is none.
    """
    if path.startswith(RANDOM):
        local = Path(path.removeprefix(RANDOM))
        file = local / "config.json" if local.is_dir() else local
        if not file.is_file():
            raise ConfigError(f"model.path {path}: there is no {file}; name a config.json or a folder with one")
        return file
    local = Path(path)
    if is_gguf(path):
        if not local.is_file():
            hint = "run `clif fetch`" if local.parts[:1] == ("assets",) else "correct it"
            raise ConfigError(f"model.path {path} does not exist: {hint}")
        return local
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"model.path {path} has no config.json: name a folder with one{_of_adapter(local)}")
        return local
    if local.exists():
        raise ConfigError(f"model.path {path} is not a folder: name one, a .gguf file or {RANDOM}<config.json>")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path {path} is not a folder: correct it")
    return None


def read_model(local: Path) -> Tree:
    """The fields of a config.json, of what locate() found. Raises ConfigError for files that cannot be read."""
    if is_gguf(local.name):
        return read_header(local).tree()
    return read_tree(local / "config.json" if local.is_dir() else local)


def _of_adapter(folder: Path) -> str:
    return ", not of an adapter" if (folder / "adapter_config.json").is_file() else ""


def check_gguf(header: GgufHeader, spec: ModelSpec, name: str) -> None:
    """Raises ConfigError for a file without all tensors of a model of this spec, as far as their names are known."""
    wanted = {gguf_name(tensor): sizes for tensor, sizes in spec.tensors(tied=True)}
    _compare({tensor: sizes for tensor, sizes in wanted.items() if tensor is not None}, header.tensors, name)


def gguf_name(tensor: str) -> str | None:
    """The name of a weight in GGUF files, where it is known."""
    *where, _ = tensor.split(".")
    block = f"blk.{where[2]}." if where[:2] == ["model", "layers"] else ""
    found = GGUF_NAMES.get(".".join(where[3:] if block else where))
    return None if found is None else f"{block}{found}.weight"


def check_weights(folder: Path, spec: ModelSpec | None, tied: bool | None, scheme: Scheme | None = None) -> None:
    """Raises ConfigError for a folder without all weights of a Llama-style model of this spec.

    spec: None where it is not known; then files and headers are looked at alone. tied: whether the head is the
    embedding; None: not known. scheme: of weights that are packed. Pickled weights are not looked into.
    """
    found = dict(tensors_of(folder))
    if not found or spec is None:
        return
    if scheme is not None:
        check_packed(spec, str(folder))
        found = dict(as_plain(found, scheme))
    packed = sorted({f"{tensor} in {dtype}" for tensor, (dtype, _) in found.items() if dtype not in PLAIN})
    if packed:
        raise ConfigError(f"{folder} holds quantised weights ({packed[0]}): choose the model with plain ones")
    # A folder of the inner model alone has other names, and no head.
    inner = "embed_tokens.weight" in found
    have = {f"model.{tensor}" if inner else tensor: sizes for tensor, (_, sizes) in found.items()}
    _compare(dict(spec.file_shapes(tied is not False, have)), have, str(folder))


def check_packed(spec: ModelSpec, name: str) -> None:
    """Raises ConfigError for a model whose packed weights are not read."""
    if isinstance(spec.layer.mlp, Experts):
        raise ConfigError(f"{name} holds quantised weights of experts, which CLIF does not read: choose plain ones")


def as_plain(found: Mapping[str, tuple[str, Sizes]], scheme: Scheme) -> Iterator[tuple[str, tuple[str, Sizes]]]:
    """Dtypes and shapes of a folder's tensors, by name, with a weight in the place of each packed one."""
    fit, marks = 32 // scheme.bits, MARKS[scheme.method]
    for tensor, (dtype, sizes) in found.items():
        module, _, mark = tensor.rpartition(".")
        if mark == "qweight":
            rows, columns = sizes
            yield (
                f"{module}.weight",
                (PACKED, (columns, rows * fit) if scheme.method == "gptq" else (columns * fit, rows)),
            )
        elif mark == "weight_packed":
            yield f"{module}.weight", (PACKED, (sizes[0], sizes[1] * fit))
        elif mark == "weight" and f"{module}.weight_scale" in found:
            yield tensor, (PACKED, sizes)
        elif mark not in marks or mark == "weight":
            yield tensor, (dtype, sizes)


def check_tensors(name: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises ConfigError for weights that a model lacks, which would be random ones, or has and would not use."""
    if missing:
        raise ConfigError(f"{name} lacks {_some(missing)}, which would be random: get it again")
    unused = [
        tensor for tensor in unexpected if tensor.startswith(("model.", "lm_head.")) and not DERIVED.search(tensor)
    ]
    if unused:
        raise ConfigError(
            f"{name} holds {_some(unused)}, which the model that its config.json describes does not have: "
            "correct that, or get it again"
        )


def _some(tensors: Sequence[str]) -> str:
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return f"the tensors {', '.join(tensors[:3])}{more}"


def _compare(wanted: dict[str, Sizes], have: dict[str, Sizes], name: str) -> None:
    check_tensors(name, [tensor for tensor in wanted if tensor not in have], ())
    for tensor, sizes in wanted.items():
        if have[tensor] != sizes:
            raise ConfigError(
                f"{name}: {tensor} has shape {list(have[tensor])}, and {list(sizes)} by its sizes: correct its "
                "config.json, or get it again"
            )


def tensors_of(folder: Path) -> Iterator[tuple[str, tuple[str, Sizes]]]:
    """Dtype and shape of each tensor of a folder's safetensors, by name; none where the weights are pickled."""
    indexed = read_index(folder)
    if indexed is None:
        if not any((folder / name).is_file() for name in PICKLES):
            raise ConfigError(f"{folder} holds no weights ({SINGLE}): get it again")
        return
    for file in sorted(set(indexed.values())) or [SINGLE]:
        try:
            with safe_open(folder / file, framework="numpy") as opened:
                names = opened.keys()
                for name in names:
                    part = opened.get_slice(name)
                    yield name, (part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder} lacks a part ({file}: {error}): get it again") from error
        lacking = sorted({name for name, holder in indexed.items() if holder == file} - set(names))
        if lacking:
            raise ConfigError(f"{folder}: {file} lacks {lacking[0]}, which {INDEX} names: get it again")


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor of a folder with several; empty where there is one, None where there are no safetensors.

    As transformers chooses, if there is both. Raises ConfigError for an index that is none.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {}
    if not index.is_file():
        return None
    try:
        if index.stat().st_size > INDEX_BYTES:
            raise ValueError("too large")
        found = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index} is not an index of weights ({error}): get it again") from error
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ConfigError(f"{index} is not an index of weights: get it again")
    outside = [file for file in found.values() if Path(file).name != file]
    if outside:
        raise ConfigError(f"{index} names {outside[0]}, which is not a file beside it: get it again")
    return found
