"""Cross-entropy of the output head without autograd: logits of a large vocabulary exist once, and not for long.

Sources: vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al. 2019).
"""

from __future__ import annotations

import torch

from clif.models.head import Head

PIECE_ROWS = {"cpu": 64, "cuda": 1024}
"""Rows whose logits are held at a time, by type of device. With a large vocabulary the logits are the largest tensor
there is (1.3 GB for 1,024 rows of 128k, with softmax and gradient). Every piece reads the whole head: on a GPU fewer
rows take as long."""


def head_bytes(device: torch.device, columns: int, itemsize: int) -> int:
    """Memory of one piece, with this rank's columns: logits and gradient in the model's dtype, softmax in float32."""
    return PIECE_ROWS[device.type] * columns * (2 * itemsize + torch.float32.itemsize)


def head_loss(
    head: Head, normed: torch.Tensor, targets: torch.Tensor, divisor: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed cross-entropy in nats [], and the gradient [rows, hidden] of (that sum / divisor); None without a divisor.

    The sum stays on the device: reading it would wait for all that was launched before.

    normed: [rows, hidden], what the head reads; targets: [rows]. d loss / d logits = softmax(logits) - one_hot.
    Collective over the head's peers, of which none sees another's logits: one sum of two numbers per row and rank,
    and with a divisor one of the gradient.
    """
    with torch.no_grad():
        logits = head(normed)
        if head.training is not None and head.tp_group.size == 1:
            losses = head.training.cross_entropy_(logits, targets, divisor)
            return losses.sum(), None if divisor is None else head.backward(logits)
        p = torch.softmax(logits, -1, dtype=torch.float32)
        # log sum exp = largest logit - log(largest probability), which cannot underflow.
        own_sum = logits.amax(-1).float() - p.amax(-1).log()
        columns = (targets - head.shard.start)[:, None]
        mine = (columns >= 0) & (columns < head.shard.size)
        columns = columns.clamp(0, head.shard.size - 1)
        log_sum, wanted = _joined(head, own_sum, torch.where(mine, logits.gather(1, columns).float(), 0.0)[:, 0])
        loss = (log_sum - wanted).sum()
        if divisor is None:
            return loss, None
        # Softmax over this rank's columns differs from that over all by their share of the whole sum.
        p.mul_((own_sum - log_sum).exp_().div_(divisor)[:, None])
        p.scatter_add_(1, columns, mine.float().mul_(-1.0 / divisor))
        return loss, head.tp_group.all_reduce_(head.backward(p.to(normed.dtype), logits))


def _joined(head: Head, log_sum: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log of the sum of exponentials over all columns, and the target's logit, which is 0 on all ranks but one."""
    rank, size = head.tp_group.rank, head.tp_group.size
    both = head.tp_group.all_gather_columns(torch.stack((log_sum, wanted), 1), 2 * rank, 2 * size).unflatten(
        1, (size, 2)
    )
    return both[..., 0].logsumexp(1), both[..., 1].sum(1)
