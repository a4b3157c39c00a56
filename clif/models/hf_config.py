"""A model's config.json, and what in it cannot be honoured. Free of torch.

One function checks the file in a dry run and transformers' reading of it in a start. What no field says is proved by
computing, in clif/models/proof.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clif.errors import ConfigError, InputError
from clif.models.checkpoint_scheme import UnreadSchemeError, scheme_of

Tree = dict[str, Any]
LARGEST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 12,
}  # fmt: skip
"""Sizes of a model, each with a limit that no real model exceeds: 10^9 layers would take days to build."""
FILE_BYTES = 16 << 20
"""More than any real config.json has."""
OWN_CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def read_tree(file: Path) -> Tree:
    """The fields of a config.json. Raises ConfigError, with the file's name, for a file that is none."""
    try:
        if file.stat().st_size > FILE_BYTES:
            raise ConfigError(f"{file} is too large for a config.json: correct model.path")
        tree = json.loads(file.read_text())
    except InputError:
        raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): correct model.path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error}): correct it or get it again") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model_type"), str):
        raise ConfigError(f"{file} is not a transformers configuration: it names no model_type")
    return tree


def check_tree(tree: Tree, name: str, max_context: int) -> None:
    """Raises ConfigError for a model that cannot be served as it is named, or not at every position of max_context.

    tree: of a config.json, with or without the fields that transformers has defaults for. name: of the model.
    """
    for problem in _problems(tree, max_context):
        raise ConfigError(f"model.path {name} {problem}")


def _problems(tree: Tree, max_context: int) -> Iterator[str]:
    yield from _code_and_weights(tree)
    yield from _sizes(tree)
    yield from _context(tree, max_context)


def _code_and_weights(tree: Tree) -> Iterator[str]:
    own = tree.get("auto_map")
    if isinstance(own, dict) and any(key in own for key in OWN_CODE):
        yield (
            "names code of its own (auto_map in its config.json), and CLIF runs no code from model folders: if "
            "transformers' own model is meant, remove auto_map"
        )
    try:
        scheme_of(tree)
    except UnreadSchemeError as error:
        yield (
            f"holds quantised weights ({error}), which CLIF does not compute with: choose the model "
            "with plain weights, or as a GGUF file, which is unpacked"
        )


def _sizes(tree: Tree) -> Iterator[str]:
    for field, most in LARGEST.items():
        size = tree.get(field)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most):
            yield f"has {field} {str(size)[:40]} in its config.json: correct it, sizes are from 1 to {most}"
    heads, hidden = tree.get("num_attention_heads"), tree.get("hidden_size")
    if heads and hidden and not tree.get("head_dim") and hidden % heads:
        yield f"cannot have {heads} attention heads in hidden_size {hidden}: correct its config.json"
    kv_heads = tree.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        yield f"cannot share {kv_heads} key/value heads among {heads} attention heads: correct its config.json"


def _context(tree: Tree, max_context: int) -> Iterator[str]:
    limit = tree.get("max_position_embeddings")
    if limit is not None and not isinstance(limit, int):
        yield f"has max_position_embeddings {str(limit)[:40]} in its config.json: correct it to a number of tokens"
        return
    if limit is not None and max_context > limit:
        yield f"takes {limit} tokens: model.max_context {max_context} exceeds the model's own {limit}, lower it"
    yield from _rope(tree, max_context)


def longest_context(tree: Tree) -> int | None:
    """Tokens up to which check_tree() takes a model that it takes at all; None: it names no limit."""
    limits = (tree.get("max_position_embeddings"), _same_rope(tree))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _same_rope(tree: Tree) -> int | None:
    """Tokens up to which positions are computed in one way; None: at all of them."""
    limits = [_first_context(tree, rope) for rope in _ropes(tree) if _changes(rope)]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def rope_of(tree: Tree) -> str:
    """The kind of rotary embedding; where layers have several, that of those that see the whole context."""
    ropes = list(_ropes(tree))
    return str(ropes[0].get("rope_type", ropes[0].get("type", "default"))) if ropes else "default"


def rotary_dim_of(tree: Tree, head_dim: int) -> int:
    """Numbers at the front of each head that are turned."""
    factors = [rope.get("partial_rotary_factor") for rope in _ropes(tree)] + [tree.get("partial_rotary_factor")]
    return int(head_dim * float(next((factor for factor in factors if factor is not None), 1.0)))


def _ropes(tree: Tree) -> Iterator[Tree]:
    """The parameters of each rotary embedding, that of layers that see the whole context first."""
    rope = tree.get("rope_parameters") or tree.get("rope_scaling")
    if isinstance(rope, dict):
        each = [rope[kind] for kind in ("full_attention", "sliding_attention") if isinstance(rope.get(kind), dict)]
        yield from each or [rope]


def _changes(rope: Tree) -> bool:
    """Whether positions are computed in another way beyond the first context."""
    return rope.get("rope_type", rope.get("type")) in ("longrope", "su") or bool(rope.get("llama_4_scaling_beta"))


def _first_context(tree: Tree, rope: Tree) -> Any:
    return rope.get("original_max_position_embeddings") or tree.get("original_max_position_embeddings")


def _rope(tree: Tree, max_context: int) -> Iterator[str]:
    whole = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    if not isinstance(whole, dict):
        yield f"has rope_parameters {str(whole)[:40]} in its config.json: correct it, that is a mapping"
        return
    for rope in _ropes(tree):
        first = _first_context(tree, rope) or tree.get("max_position_embeddings")
        if isinstance(first, int) and max_context > first and _changes(rope):
            scaled = rope.get("llama_4_scaling_beta")
            what = f"a query scale that grows (llama_4_scaling_beta {scaled})" if scaled else "other rotary embeddings"
            yield (
                f"has {what} beyond {first} tokens, which is not supported: lower model.max_context {max_context} to "
                f"{first}, within which it makes no difference"
            )
