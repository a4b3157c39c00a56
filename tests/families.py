"""Every family of models that CLIF serves, as one small random model each: what tests prove them by, and what
docs/models.md lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WINDOW = 24
"""Of small models: several blocks of a test's cache, and less than its prompts."""
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.1,
    "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


@dataclass(frozen=True)
class Family:
    """One family in one shape. models: what people know it by. fields: of its config.json, beside SIZES.

    tp: numbers of ranks that tests share it among; none: its parts are Llama's. targets: linear layers that an adapter
    may belong to.
    """

    name: str
    models: str
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    tp: tuple[int, ...] = ()
    targets: str = "attention and MLP"

    @property
    def config(self) -> dict[str, Any]:
        """The fields of a config.json."""
        return {**SIZES, "model_type": self.model_type, **self.fields}


LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0] * 8}
MINISTRAL = _rope("yarn", factor=2.0, original_max_position_embeddings=256, llama_4_scaling_beta=0.1)
BOTH = (2, 4)
FAMILIES = (
    Family("llama", "Llama 2 and 3", "llama", tp=BOTH),
    Family("llama-linear", "rope scaling: linear", "llama", _rope("linear", factor=4.0)),
    Family("llama-dynamic", "rope scaling: dynamic", "llama", _rope("dynamic", factor=4.0)),
    Family(
        "llama-yarn", "rope scaling: yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    Family(
        "llama-longrope",
        "rope scaling: longrope",
        "llama",
        _rope("longrope", **LONG, original_max_position_embeddings=256),
    ),
    Family(
        "llama-llama3",
        "Llama 3.1 and later",
        "llama",
        _rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    Family("mistral", "Mistral 7B", "mistral", {"sliding_window": None}),
    Family("mistral-window", "Mistral 7B v0.1", "mistral", {"sliding_window": WINDOW}, tp=BOTH),
    Family("ministral3", "Ministral 3", "ministral3", MINISTRAL),
    Family(
        "ministral", "Ministral 8B", "ministral",
        {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING, SLIDING]},
    ),
    Family("internlm3", "InternLM 3", "internlm3"),
    Family("seed_oss", "Seed-OSS", "seed_oss"),
    Family("smollm3", "SmolLM 3", "smollm3"),
    Family("qwen2", "Qwen 2 and 2.5", "qwen2", tp=BOTH),
    Family(
        "qwen2-window",
        "Qwen 2 with windows switched on",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    Family("qwen3", "Qwen 3", "qwen3", tp=BOTH),
    Family("gemma", "Gemma", "gemma", {"tie_word_embeddings": True}),
    Family(
        "gemma2",
        "Gemma 2",
        "gemma2",
        {
            "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
        },
        tp=BOTH,
    ),
    Family(
        "gemma3",
        "Gemma 3 (text)",
        "gemma3_text",
        {
            "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "tie_word_embeddings": True,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        tp=BOTH,
    ),
    Family(
        "granite",
        "Granite 3",
        "granite",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
        tp=(2,),
    ),
    Family("olmo2", "OLMo 2", "olmo2", tp=BOTH),
    Family("olmo3", "OLMo 3", "olmo3", {"sliding_window": WINDOW}, tp=BOTH),
    Family("phi3", "Phi 3 and Phi 4", "phi3", tp=(2,)),
    Family(
        "phi3-partial",
        "Phi 4 mini: half of each head is turned",
        "phi3",
        {
            "original_max_position_embeddings": 256, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                "short_factor": [1.0 + 0.1 * i for i in range(4)], "long_factor": [4.0] * 4,
            },
        },
        tp=(2,),
    ),
    Family(
        "mixtral", "Mixtral", "mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}, targets="attention",
        tp=(2,),
    ),
    Family(
        "qwen3_moe",
        "Qwen 3 with experts",
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
        targets="attention",
        tp=(4,),
    ),
    Family(
        "qwen3_moe-unscaled",
        "Qwen 3 with experts whose weights do not add up to 1",
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": False},
        targets="attention",
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        "gpt_oss",
        {
            "num_local_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 1.5, "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 64,
            },
        },
        targets="attention",
        tp=(2,),
    ),
)  # fmt: skip
"""Of each family every way in which its models are built."""
