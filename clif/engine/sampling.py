"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

import torch

from clif.models.head import Head, or_none, top
from clif.types import NO_TOKEN, Request, Sampling


def make_rng(request: Request, device: torch.device, drawn: int = 0, vocabulary: int = 1) -> torch.Generator | None:
    """A request's own random numbers, so that its answer does not depend on its neighbours; None when greedy.

    drawn: tokens of a vocabulary of this size that it has drawn already, on another replica.
    """
    if request.sampling.temperature == 0:
        return None
    seed = request.sampling.seed if request.sampling.seed is not None else request.id
    rng = torch.Generator(device=device).manual_seed(seed)
    even = torch.ones(vocabulary, device=device) if drawn else None
    for _ in range(drawn):
        # How many numbers a draw takes depends on the size of the vocabulary alone.
        torch.multinomial(even, 1, generator=rng)  # type: ignore[arg-type]
    return rng


def choose(head: Head, logits: torch.Tensor, params: list[Sampling], rngs: list[torch.Generator | None]) -> list[int]:
    """One token id per sequence, the same on all peers. logits: [sequences, this rank's columns]. Collective.

    NO_TOKEN where the logits are not finite. While all are greedy, only each rank's best cross the wire. Else all peers
    get whole rows, and the leader's draws count.
    """
    if not params:
        return []
    if all(rng is None for rng in rngs):
        tokens: list[int] = head.best(logits).tolist()
        return tokens
    return head.tp_group.broadcast_ints(sample(head.whole(logits), params, rngs), logits.device)


def sample(logits: torch.Tensor, params: list[Sampling], rngs: list[torch.Generator | None]) -> list[int]:
    """logits: [sequences, vocabulary]. Returns one token id per sequence, NO_TOKEN where they are not finite."""
    tokens: list[int] = or_none(*top(logits)).tolist()
    for i, (p, rng) in enumerate(zip(params, rngs, strict=True)):
        if rng is not None and tokens[i] != NO_TOKEN:
            probabilities = distribution(logits[i].float(), p)
            tokens[i] = int(torch.multinomial(probabilities, 1, generator=rng))
    return tokens


def distribution(logits: torch.Tensor, params: Sampling) -> torch.Tensor:
    """Probabilities [vocabulary] after temperature, then top_k, then top_p (the order of transformers).

    logits: float32, the largest finite. Finite and of sum 1 for any temperature above 0 and any top_p: in float32 a
    temperature of 1e-300 is 0, and a top_p of 1e-300 would leave no token.
    """
    limits = torch.finfo(logits.dtype)
    # The largest becomes 0 first: a tiny temperature would else make it infinite.
    logits = (logits - logits.max()) / min(max(params.temperature, limits.tiny), limits.max)
    if 0 < params.top_k < logits.numel():
        smallest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if params.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        # A token stays if those before it do not yet reach top_p: the one that crosses the line stays too.
        outside = ordered.cumsum(0) - ordered >= params.top_p
        outside[0] = False
        probabilities = probabilities.index_fill(0, index[outside], 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities
