"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

import time

import torch

from clif.models.head import Head, or_none, top
from clif.types import NO_TOKEN, Request, Sampling


def make_rng(request: Request, device: torch.device, drawn: int = 0, vocabulary: int = 1) -> torch.Generator | None:
    """A request's own random numbers: its answer does not depend on the rest of the batch. None when greedy.

    drawn: tokens of a vocabulary of this size that it has drawn already, on another replica.
    """
    if request.sampling.temperature == 0:
        return None
    seed = request.sampling.seed if request.sampling.seed is not None else request.id
    rng = torch.Generator(device=device).manual_seed(seed)
    even = torch.ones(vocabulary, device=device) if drawn else None
    for _ in range(drawn):
        # The numbers that a draw takes depend on the size of the vocabulary alone.
        torch.multinomial(even, 1, generator=rng)  # type: ignore[arg-type]
    return rng


def choose(
    head: Head, logits: torch.Tensor, params: list[Sampling], rngs: list[torch.Generator | None]
) -> torch.Tensor:
    """One token id per sequence, the same on all peers. logits: [sequences, this rank's columns]. Collective.

    NO_TOKEN where the logits are not finite. While all are greedy, only the best of each rank crosses the wire.
    Otherwise all peers get whole rows, and the leader's draws count. Nothing here waits for the device.
    """
    if not params:
        return logits.new_zeros(0, dtype=torch.int64)
    if all(rng is None for rng in rngs):
        return head.best(logits)
    return head.tp_group.broadcast_(sample(head.whole(logits), params, rngs))


def sample(logits: torch.Tensor, params: list[Sampling], rngs: list[torch.Generator | None]) -> torch.Tensor:
    """logits: [sequences, vocabulary]. Returns one token id per sequence, NO_TOKEN where they are not finite."""
    tokens = or_none(*top(logits))
    for i, (p, rng) in enumerate(zip(params, rngs, strict=True)):
        if rng is not None:
            broken = tokens[i] == NO_TOKEN
            # NaN allows no draw: zeros stand in, and the request ends without this token.
            probabilities = distribution(logits[i].float().masked_fill(broken, 0.0), p)
            drawn = torch.multinomial(probabilities, 1, generator=rng)[0]
            tokens[i] = torch.where(broken, tokens[i], drawn)
    return tokens


def distribution(logits: torch.Tensor, params: Sampling) -> torch.Tensor:
    """Probabilities [vocabulary] after temperature, then top_k, then top_p (the order of transformers).

    logits: float32, the largest finite. Finite and of sum 1 for any temperature above 0 and any top_p: in float32 a
    temperature of 1e-300 is 0, and a top_p of 1e-300 would leave no token.
    """
    limits = torch.finfo(logits.dtype)
    # The largest becomes 0 first: a tiny temperature would make it infinite otherwise.
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
        # Not index[outside], whose length the host would wait for.
        probabilities = probabilities.scatter(0, index, ordered.masked_fill(outside, 0.0))
        probabilities = probabilities / probabilities.sum()
    return probabilities


class SampledTokens:
    """The tokens of one step, on the device and on their way to the host; and how long it computed.

    Made when the step begins. Neither the host nor other work on the device delays what is read here.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = torch.empty(0, dtype=torch.int64)
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(torch.cuda.current_stream(device))
        self._start_s, self._seconds = time.perf_counter(), 0.0

    def send(self, tokens: torch.Tensor) -> None:
        """The step ends: tokens [sequences that sample] follow it to the host."""
        if self._events is None:
            self._host, self._seconds = tokens, time.perf_counter() - self._start_s
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._events[1].record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[int]:
        """Wait for the step, and no other work, and return its tokens: one or NO_TOKEN per sequence."""
        if self._events is not None:
            self._events[1].synchronize()
        return [int(token) for token in self._host.tolist()]

    def seconds(self) -> float:
        """How long the device took, once the tokens have been read."""
        if self._events is None:
            return self._seconds
        return self._events[0].elapsed_time(self._events[1]) / 1000
