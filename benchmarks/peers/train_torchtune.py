"""torchtune: its LoRA model of Llama 3.2 (tied embeddings), everything in bfloat16 as its recipes have it.

The loss is its CEWithChunkedOutputLoss, as in its recipes; their `compile` is an option of the job, activation
checkpointing is off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protocol import answer_turns, versions


def prepare(job: dict[str, Any]) -> Any:
    import torch
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3_2 import lora_llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import set_default_dtype
    from train_loop import IGNORED, training_turn

    folder = Path(job["model"])
    shape = json.loads((folder / "config.json").read_text())
    heads, kv_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["hidden_size"]
    rope = shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"]
    with set_default_dtype(torch.bfloat16):
        model = lora_llama3_2(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=shape["vocab_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            embed_dim=width,
            max_seq_len=256,
            intermediate_dim=shape["intermediate_size"],
            norm_eps=shape["rms_norm_eps"],
            rope_base=rope,
            lora_rank=job["r"],
            lora_alpha=job["lora_alpha"],
            scale_factor=1,
        )
    weights = hf_to_tune(load_file(folder / "model.safetensors"), heads, kv_heads, width)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    set_trainable_params(model, get_adapter_params(model))
    loss = CEWithChunkedOutputLoss(ignore_index=IGNORED)
    model.set_num_output_chunks(loss.num_output_chunks)
    model.train()
    compiled = job.get("compile", False)
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=False)

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # As its recipe: labels are shifted by one, the last has none.
        shifted = torch.hstack((labels[:, 1:], torch.full((len(labels), 1), IGNORED)))
        outcome: torch.Tensor = loss(model(ids), shifted)
        return outcome

    said = f"r={job['r']}, all linear layers, bfloat16, CEWithChunkedOutputLoss, fused AdamW, compile={compiled}"
    return f"{versions('torchtune', 'torch', 'torchao')}; {said}", training_turn(job, model, loss_of)


if __name__ == "__main__":
    answer_turns(prepare)
