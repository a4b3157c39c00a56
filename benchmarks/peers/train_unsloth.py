"""Unsloth on a CPU: FastLanguageModel with its LoRA, in bfloat16, by its own fast paths; no gradient checkpointing."""

from __future__ import annotations

import os
from typing import Any

from protocol import answer_turns, versions


def prepare(job: dict[str, Any]) -> Any:
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", **job.get("environment", {})}
    # First: it changes transformers and peft.
    import unsloth  # isort: skip  # noqa: F401
    import torch
    from train_loop import training_turn
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=256, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["r"],
        lora_alpha=job["lora_alpha"],
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
    )
    model.train()
    half = next(p.dtype for p in model.parameters() if p.requires_grad)

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outcome: torch.Tensor = model(input_ids=ids, labels=labels).loss
        return outcome

    said = f"r={job['r']}, all linear layers, adapter in {half}, autocast, fused AdamW"
    return f"{versions('unsloth', 'torch', 'peft', 'transformers')}; {said}", training_turn(job, model, loss_of)


if __name__ == "__main__":
    answer_turns(prepare)
