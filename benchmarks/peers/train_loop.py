"""The loop around a trainer's model: batches, backward, clipping and AdamW, the same for all drivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from protocol import Work

IGNORED = -100


def training_turn(
    job: dict[str, Any], model: Any, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, Any]], Work]:
    """loss_of: of token ids [samples, length] and labels of the same shape, IGNORED where there is no target."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=job["weight_decay"], fused=True)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> float:
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def turn(asked: dict[str, Any]) -> Work:
        batches = [_batch(samples) for samples in asked["steps"]]
        return lambda: sum(step(*batch) for batch in batches) / len(batches)

    return turn


def _batch(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([sample["ids"] for sample in samples])
    labels = ids.clone()
    for row, sample in zip(labels, samples, strict=True):
        row[: sample["target_start"]] = IGNORED
    return ids, labels
