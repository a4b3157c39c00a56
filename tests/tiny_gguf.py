"""A small GGUF file with random weights in blocks of eight bits, as llama.cpp packs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 96, 2, 6, 3, 192
CONTEXT = 256


def write_gguf(
    path: Path,
    seed: int = 0,
    freqs: bool = False,
    scaling: str | None = None,
    window: int = 0,
    experts: int = 0,
    turned: int = HIDDEN // HEADS,
    kinds: Mapping[str, str] | None = None,
) -> str:
    """A Llama with tied embeddings and a byte-level tokenizer; returns the path.

    freqs: with factors of its rotary frequencies, as files of Llama 3.1 have them; scaling: kind of their scaling;
    window: of its attention, tokens; experts: how many it says that it has; turned: numbers of a head that are rotated;
    kinds: types of weights by the middle of their names, Q8_0 by default.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(turned)
    if experts:
        writer.add_expert_count(experts)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(8.0)
    if window:
        writer.add_sliding_window(window)
    tokens = [*_letters(), "th", "<|end|>"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id, writer.add_unk_token_id):
        add(257)

    def packed(name: str, rows: int, columns: int) -> None:
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name.split(".")[-2], "Q8_0")]
        blocks = gguf.quants.quantize(rng.normal(0, 0.1, (rows, columns)).astype(np.float32), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, rng.normal(1, 0.1, HIDDEN).astype(np.float32))

    kv = HIDDEN // HEADS * KV_HEADS
    packed("token_embd.weight", len(tokens), HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            norm(f"blk.{layer}.{name}.weight")
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            packed(f"blk.{layer}.{name}.weight", rows, columns)
    norm("output_norm.weight")
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.full(HIDDEN // HEADS // 2, 8.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _letters() -> list[str]:
    """A letter that can be seen for each byte, as GPT-2 chose them."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in seen]
    return [chr(b) if b in seen else chr(256 + others.index(b)) for b in range(256)]
