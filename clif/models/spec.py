"""The families of models: each is a function from the fields of a Hugging Face config to a ModelSpec. Free of torch.

A further family of models is one more function here, in FAMILIES; what it says is read by whatever loads, cuts, draws,
estimates and runs the model.

Sources: Llama (Touvron et al. 2023); Gemma 2 and 3 (Gemma Team 2024, 2025); OLMo 2 (OLMo Team 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from clif.errors import ConfigError
from clif.models.expert_spec import ExpertFiles, Experts
from clif.models.hf_config import Tree, rope_of, rotary_dim_of
from clif.models.layer_spec import (
    UNTURNED,
    AttentionSpec,
    DenseMlp,
    Features,
    LayerKind,
    LayerSpec,
    LinearGroup,
    LinearModule,
    ModelSpec,
)

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Fields of a Hugging Face config that every family has here."""
FIELDS = (
    *SIZES, "model_type", "head_dim", "tie_word_embeddings", "sliding_window", "use_sliding_window", "layer_types",
    "max_window_layers", "rope_parameters", "rope_scaling", "attn_logit_softcapping", "final_logit_softcapping",
    "partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling", "no_rope_layers",
    "no_rope_layer_interval", "num_local_experts",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
"""All that the functions here read of a transformers configuration."""
NARROW_WINDOW = 8
"""Of a narrow model: less than the tokens of a probe."""
SLIDING = "sliding_attention"
FULL = "full_attention"


def spec_of(config: Any) -> ModelSpec:
    """The description of a model from a config.json's fields, or from a transformers configuration.

    Raises ConfigError for a family that is not known, and for a share of heads that is turned where the family turns
    them whole, KeyError, TypeError, ValueError or ZeroDivisionError for a config that lacks a size.
    """
    tree = dict(config) if isinstance(config, Mapping) else {field: getattr(config, field, None) for field in FIELDS}
    family = str(tree.get("model_type"))
    check_family(family)
    spec = FAMILIES[family](tree)
    attention, turned = spec.layer.attention, rotary_dim_of(tree, spec.layer.attention.head_dim)
    if turned != attention.rotary_dim:
        raise ConfigError(
            f"the model turns {turned} of the {attention.head_dim} numbers of each head (partial rotary embedding), "
            f"which is not supported for the family {family}: choose another model"
        )
    return spec


def check_family(model_type: str, name: str = "the model") -> None:
    """Raises ConfigError, with the list of families, for one that is not known. name: of the model."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{name} is of the family {model_type[:40]}, which is not supported: choose one of {known}")


def narrow_fields(spec: ModelSpec) -> dict[str, int]:
    """Fields of a Hugging Face config for a narrow model with as many layers, and heads of the same size."""
    # Rotary embeddings may depend on the size of a head.
    narrow = {
        "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * spec.layer.attention.head_dim,
        "intermediate_size": 64, "vocab_size": 64,
    }  # fmt: skip
    if isinstance(spec.layer.mlp, Experts):
        count, taken = min(spec.layer.mlp.count, 4), min(spec.layer.mlp.per_token, 2)
        narrow |= {"num_local_experts": count, "num_experts_per_tok": taken, "moe_intermediate_size": 64}
    return narrow if spec.window is None else {**narrow, "sliding_window": NARROW_WINDOW}


def llama(tree: Tree) -> ModelSpec:
    """Llama, and what is built like it: grouped-query attention with rotary embeddings, and a gated MLP.

    Each layer has a window where the config names one and no layer types: Mistral.
    """
    heads, vocab_size = int(tree["num_attention_heads"]), int(tree["vocab_size"])
    hidden, inner = Features(int(tree["hidden_size"])), Features(int(tree["intermediate_size"]))
    kv_heads = int(tree.get("num_key_value_heads") or heads)
    head_dim = int(tree.get("head_dim") or tree["hidden_size"] // heads)
    query, key = Features(heads, head_dim), Features(kv_heads, head_dim)
    norms = ("self_attn.q_norm", "self_attn.k_norm")
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden.size,
        tied=bool(tree.get("tie_word_embeddings", False)),
        layer=LayerSpec(
            linears=(
                LinearGroup("qkv", _modules("self_attn", q=query, k=key, v=key), hidden, "out", "hidden"),
                LinearGroup("out", _modules("self_attn", o=hidden), query, "in", "attended"),
                LinearGroup("gate_up", _modules("mlp", gate=inner, up=inner), hidden, "out", "hidden"),
                LinearGroup("down", _modules("mlp", down=hidden), inner, "in", "gated"),
            ),
            attention=AttentionSpec("self_attn", heads, kv_heads, head_dim, norms, rope_of(tree), head_dim),
            mlp=DenseMlp(inner.size, "mlp.act_fn"),
            norms=("input_layernorm", "post_attention_layernorm"),
        ),
        kinds=tuple(LayerKind(window) for window in _windows(tree)),
    )


def qwen(tree: Tree) -> ModelSpec:
    """Qwen 2 and 3: the layers from max_window_layers on have windows, if they are switched on."""
    first = int(tree.get("max_window_layers") or 0)
    if not tree.get("use_sliding_window", False):
        tree = {**tree, "sliding_window": None}
    return llama(_typed(tree, lambda layer: layer >= first))


def gemma(tree: Tree) -> ModelSpec:
    """Llama whose embedding module and norms multiply by what they have to."""
    return llama({"tie_word_embeddings": True, **tree})


def gemma2(tree: Tree) -> ModelSpec:
    """As Gemma; norms on both sides of attention and of the MLP, soft caps, and a window in every other layer."""
    spec = gemma(_typed(tree, lambda layer: bool((layer + 1) % 2)))
    attention = replace(spec.layer.attention, softcap=tree.get("attn_logit_softcapping", 50.0))
    layer = replace(
        spec.layer,
        attention=attention,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    )
    return replace(spec, layer=layer, logits_softcap=tree.get("final_logit_softcapping", 30.0))


def gemma3(tree: Tree) -> ModelSpec:
    """As Gemma 2 without caps; windows in five of six layers, which have a rotary embedding of their own."""
    every = int(tree.get("sliding_window_pattern") or 6)
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return _two_ropes(gemma2({**uncapped, **_typed(tree, lambda layer: bool((layer + 1) % every))}))


def smollm3(tree: Tree) -> ModelSpec:
    """Llama of which every fourth layer turns nothing; windows, where they are switched on, are in those layers."""
    every, layers = int(tree.get("no_rope_layer_interval") or 4), range(int(tree["num_hidden_layers"]))
    turned = tree.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in layers]
    if not tree.get("use_sliding_window", False):
        tree = {**tree, "sliding_window": None}
    spec = llama(_typed(tree, lambda layer: not turned[layer]))
    kinds = (replace(kind, rope=None if turns else UNTURNED) for kind, turns in zip(spec.kinds, turned, strict=True))
    return replace(spec, kinds=tuple(kinds))


def granite(tree: Tree) -> ModelSpec:
    """Llama with multipliers of embedding, residual and logits; that of scores is told by the attention modules."""
    spec = llama(tree)
    return replace(
        spec,
        layer=replace(spec.layer, residual_scale=float(tree.get("residual_multiplier") or 1.0)),
        embedding_scale=float(tree.get("embedding_multiplier") or 1.0),
        logits_scale=1.0 / float(tree.get("logits_scaling") or 1.0),
    )


def olmo2(tree: Tree) -> ModelSpec:
    """Norms behind attention and MLP alone, and of query and key over the whole projection."""
    spec = llama(tree)
    layer = replace(
        spec.layer,
        attention=replace(spec.layer.attention, norms_over="projection"),
        norms=(None, None),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    )
    return replace(spec, layer=layer)


def olmo3(tree: Tree) -> ModelSpec:
    """As OLMo 2; windows in three of four layers, which have a rotary embedding of their own."""
    return _two_ropes(olmo2(_typed(tree, lambda layer: bool((layer + 1) % 4))))


def phi3(tree: Tree) -> ModelSpec:
    """Phi 3 and 4: query, key and value in one weight, gate and up in another; some turn the front of each head."""
    spec = llama(tree)
    qkv, out, gate_up, down = spec.layer.linears
    linears = (
        replace(qkv, modules=(LinearModule("self_attn.qkv_proj", qkv.outputs),)),
        out,
        replace(gate_up, modules=(LinearModule("mlp.gate_up_proj", gate_up.outputs),)),
        down,
    )
    mlp = DenseMlp(spec.layer.mlp.inner, "mlp.activation_fn")
    attention = replace(spec.layer.attention, rotary_dim=rotary_dim_of(tree, spec.layer.attention.head_dim))
    return replace(spec, layer=replace(spec.layer, linears=linears, mlp=mlp, attention=attention))


def mixtral(tree: Tree) -> ModelSpec:
    """Llama with experts."""
    experts = (f"block_sparse_moe.experts.{{}}.{leaf}" for leaf in ("w1", "w3", "w2"))
    return _with_experts(tree, int(tree["intermediate_size"]), ExpertFiles("block_sparse_moe.gate", *experts))


def qwen3_moe(tree: Tree) -> ModelSpec:
    """Qwen 3 with experts. Layers without them are refused: see check_layer()."""
    experts = (f"mlp.experts.{{}}.{leaf}_proj" for leaf in ("gate", "up", "down"))
    return _with_experts(tree, int(tree["moe_intermediate_size"]), ExpertFiles("mlp.gate", *experts))


def gpt_oss(tree: Tree) -> ModelSpec:
    """Windows in every other layer, sinks of scores, and experts with biases and a gate of their own."""
    tree = _typed(tree, lambda layer: bool((layer + 1) % 2))
    own = {"router": "mlp.router", "activation": "mlp.experts._apply_gate", "paired": True}
    spec = _with_experts(tree, int(tree["intermediate_size"]), None, **own)
    attention = replace(spec.layer.attention, sinks="self_attn.sinks", angles="once")
    return replace(spec, layer=replace(spec.layer, attention=attention))


def _with_experts(tree: Tree, inner: int, files: ExpertFiles | None, **own: Any) -> ModelSpec:
    """Every layer's MLP is one of experts. own: fields of Experts."""
    spec, count = llama(tree), tree.get("num_local_experts") or tree["num_experts"]
    linears = tuple(group for group in spec.layer.linears if group.name in ("qkv", "out"))
    experts = Experts(int(count), int(tree["num_experts_per_tok"]), inner, files, **own)
    return replace(spec, layer=replace(spec.layer, linears=linears, mlp=experts))


def _two_ropes(spec: ModelSpec) -> ModelSpec:
    """Layers with a window have a rotary embedding of their own."""
    kinds = (replace(kind, rope=FULL if kind.window is None else SLIDING) for kind in spec.kinds)
    return replace(spec, kinds=tuple(kinds))


def _typed(tree: Tree, slides: Callable[[int], bool]) -> Tree:
    """The config with the types of its layers, which are left to a default in many a file."""
    if tree.get("layer_types"):
        return tree
    return {**tree, "layer_types": [SLIDING if slides(i) else FULL for i in range(int(tree["num_hidden_layers"]))]}


def _windows(tree: Tree) -> Iterator[int | None]:
    """The window of each layer."""
    window, layers = tree.get("sliding_window"), range(int(tree["num_hidden_layers"]))
    for _, kind in zip(layers, tree.get("layer_types") or [SLIDING] * len(layers), strict=True):
        yield int(window) if window and kind == SLIDING else None


def _modules(block: str, **outputs: Features) -> tuple[LinearModule, ...]:
    return tuple(LinearModule(f"{block}.{name}_proj", (features,)) for name, features in outputs.items())


FAMILIES: dict[str, Callable[[Tree], ModelSpec]] = {
    "gemma": gemma, "gemma2": gemma2, "gemma3_text": gemma3, "gpt_oss": gpt_oss, "granite": granite,
    "internlm3": llama, "llama": llama, "ministral": llama, "ministral3": llama, "mistral": llama, "mixtral": mixtral,
    "olmo2": olmo2, "olmo3": olmo3, "phi3": phi3, "qwen2": qwen, "qwen3": qwen, "qwen3_moe": qwen3_moe,
    "seed_oss": llama, "smollm3": smollm3,
}  # fmt: skip
"""By model_type: families that CLIF's own tests prove to be computed rightly. A model of any other is refused."""
