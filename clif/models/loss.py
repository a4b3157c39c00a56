"""Cross-entropy of the output head without autograd: logits of a large vocabulary are made once and thrown away."""

from __future__ import annotations

import torch

from clif.models.stack import CausalStack


def head_loss(
    stack: CausalStack, normed: torch.Tensor, targets: torch.Tensor, divisor: float | None = None
) -> tuple[float, torch.Tensor | None]:
    """Summed cross-entropy in nats, and the gradient [rows, hidden] of (that sum / divisor); None without a divisor.

    normed: [rows, hidden], what the head reads; targets: [rows]. d loss / d logits = softmax(logits) - one_hot.
    """
    with torch.no_grad():
        logits = stack.logits(normed)
        p = torch.softmax(logits, -1, dtype=torch.float32)
        # log sum exp = largest logit - log(largest probability), which cannot underflow.
        total = logits.amax(-1).float() - p.amax(-1).log() - logits.gather(1, targets[:, None])[:, 0].float()
        loss = float(total.sum())
        if divisor is None:
            return loss, None
        p[torch.arange(len(targets), device=p.device), targets] -= 1.0
        return loss, p.mul_(1.0 / divisor).to(normed.dtype) @ stack.head.weight
