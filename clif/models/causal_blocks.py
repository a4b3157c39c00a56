"""Causal attention of long sequences, a block of queries at a time: no matrix of length x length exists.

Sources: query blocks without kept probabilities (Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clif.models.scores import Scores, cap_, cap_gradient_

LONG = 1024
"""Longest sequence whose probabilities exist all at once."""
BLOCK_NUMBERS = 1 << 20
"""Probabilities of a block: 4 MiB in float32, which stay in a core's caches. 4,096 tokens with 9 heads take half the
time of blocks of 64 MiB."""
SMALLEST_BLOCK = 16
"""Queries of a block at least."""


def causal_mask(start: int, stop: int, device: torch.device, window: int | None = None, first: int = 0) -> torch.Tensor:
    """What is added to the scores of queries [start, stop) and keys [first, stop): float32 [stop - start, keys]."""
    hidden = torch.full((stop - start, stop - first), -torch.inf, device=device)
    mask = hidden.triu(start - first + 1)
    return mask if window is None else mask.add_(hidden.tril(start - first - window))


def products(q: torch.Tensor, k: torch.Tensor, scores: Scores) -> torch.Tensor:
    """q k^T scale, capped; shapes as below."""
    return cap_(torch.matmul(q * scores.scale, k.transpose(-1, -2)), scores.softcap)


def probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    """softmax(q k^T scale + mask), the products capped before.

    q [s, kv_heads, g * queries, d], k [s, kv_heads, keys, d], mask [queries, keys]: [s, kv_heads, g * queries, keys].
    """
    made = products(q, k, scores)
    by_head = made.unflatten(2, (-1, len(mask))).add_(mask)
    return scores.softmax(by_head, 2, 1).flatten(2, 3)


def score_gradients(
    p: torch.Tensor, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Gradient of q k^T, from that of what attention gives, `grad`."""
    of_scores: torch.Tensor = torch._softmax_backward_data(grad @ v.transpose(-1, -2), p, -1, p.dtype)
    if scores.softcap is not None:
        cap_gradient_(of_scores, products(q, k, scores), scores.softcap)
    return of_scores.mul_(scores.scale)


def block_rows(sequences: int, heads: int, longest: int) -> int:
    """Queries of a block, for sequences padded to `longest` tokens."""
    return max(SMALLEST_BLOCK, BLOCK_NUMBERS // (sequences * heads * longest))


def block_bytes(heads: int, longest: int) -> int:
    """What a backward holds of a block of one sequence at a time, in float32: probabilities, gradients of them and of
    the scores, and a product of the keys' size."""
    return 4 * block_rows(1, heads, longest) * heads * longest * torch.float32.itemsize


def attend_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """q [s, kv_heads, g * longest, d], k and v [s, kv_heads, longest, d] -> as q."""
    out = torch.empty_like(q)
    for part, keys, mask in _blocks(q, k, scores.window):
        p = probabilities(_of(q, k, part), k[:, :, keys], mask, scores)
        _set(out, k, part, p @ v[:, :, keys])
    return out


def attend_blocks_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, from that of what attend_blocks gives, `grad`. Sums over queries are in float32."""
    of_q = torch.empty_like(q)
    of_k, of_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
    for part, keys, mask in _blocks(q, k, scores.window):
        mine, go = _of(q, k, part), _of(grad, k, part)
        p = probabilities(mine, k[:, :, keys], mask, scores)
        of_v[:, :, keys] += p.transpose(-1, -2) @ go
        gs = score_gradients(p, go, mine, k[:, :, keys], v[:, :, keys], scores)
        del p
        _set(of_q, k, part, gs @ k[:, :, keys])
        of_k[:, :, keys] += gs.transpose(-1, -2) @ mine
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype)


def _blocks(q: torch.Tensor, k: torch.Tensor, window: int | None) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks of queries, the keys that they see, and their mask."""
    sequences, kv_heads, longest, _ = k.shape
    rows = block_rows(sequences, kv_heads * (q.shape[2] // longest), longest)
    for start in range(0, longest, rows):
        stop = min(start + rows, longest)
        first = 0 if window is None else max(0, start + 1 - window)
        yield slice(start, stop), slice(first, stop), causal_mask(start, stop, q.device, window, first)


def _of(x: torch.Tensor, k: torch.Tensor, part: slice) -> torch.Tensor:
    """Queries `part` of [s, kv_heads, g * longest, d]: [s, kv_heads, g * queries, d]."""
    return x.unflatten(2, (-1, k.shape[2]))[:, :, :, part].flatten(2, 3)


def _set(x: torch.Tensor, k: torch.Tensor, part: slice, values: torch.Tensor) -> None:
    """The other way round."""
    x.unflatten(2, (-1, k.shape[2]))[:, :, :, part] = values.unflatten(2, (-1, part.stop - part.start))
