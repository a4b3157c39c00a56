"""Choosing the next token of each sequence from its logits. See clif.types.Sampling for the order of its steps."""

from __future__ import annotations

import time

import torch

from clif.engine.changes import Changes
from clif.engine.draws import ONE, Draws
from clif.engine.logprobs import Logprobs
from clif.engine.prompt_logprobs import PromptLogprobs
from clif.models.head import Head, or_none, top
from clif.types import NO_TOKEN, TokenLogprob


def draw_(
    head: Head, tokens: torch.Tensor, logits: torch.Tensor, draws: Draws, changes: Changes | None = None
) -> torch.Tensor:
    """Overwrite greedy tokens [rows] where `draws` says so. Collective.

    logits: [rows, this rank's columns], which are read only. Returns the tokens, NO_TOKEN where the logits are not
    finite. All peers get whole rows of those that draw, and the leader's choices count. The number of launches does not
    depend on the number of rows, and nothing waits for the device. The shapes do depend on it: no captured graph holds
    this, but what a graph left may be read here, and its tokens overwritten.
    """
    whole = head.whole(logits.index_select(0, draws.rows))
    if changes is not None:
        whole = changes.apply(whole)
    return head.tp_group.broadcast_(tokens.index_copy_(0, draws.rows, choose(whole, draws)))


def choose(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token id, or NO_TOKEN, for each row [rows, vocabulary] of the draws: drawn ones, then the likeliest ones."""
    drawn = len(draws.temperature)
    if drawn == len(logits):
        return sample(logits, draws)
    likeliest = or_none(*top(logits[drawn:]))
    return torch.cat((sample(logits[:drawn], draws), likeliest)) if drawn else likeliest


def sample(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token id, or NO_TOKEN, for each row [drawing, vocabulary], in the order of `draws`.

    It is the first token at which the sum of all weights so far exceeds the random share of the row's total. A token
    without weight is never chosen. A row's token does not depend on the rows beside it. Temporaries: 20 bytes for each
    token of each row, 50 in rows with top_p, besides what the device's sort takes.
    """
    weights, broken = weigh(logits, draws)
    sums = weights.cumsum(1)
    total = sums[:, -1:]
    # Rounding must not reach the total: behind it lies no token.
    share = torch.minimum((draws.uniform[:, None] * total).long(), total - 1)
    return torch.searchsorted(sums, share, right=True)[:, 0].masked_fill(broken, NO_TOKEN)


def weigh(logits: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [drawing, vocabulary], in proportion to the probabilities; and which rows [drawing] are not finite.

    After temperature, top_k, top_p and min_p, in the order of transformers. They are whole numbers: sums of these are
    exact in any order, so that neither rows beside nor a device's way to add up change what is drawn. The likeliest
    token has ONE, so that no row is without weight; one of less than 2^-42 of its probability has none. Rows that are
    not finite have some weights, too: NaN allows no draw.
    """
    logits = logits.float()
    largest = logits.amax(1, keepdim=True)
    broken = ~largest.isfinite()
    # The largest becomes 0 first: a tiny temperature would make it infinite otherwise.
    scaled = (logits - largest).div_(draws.temperature.float()[:, None]).masked_fill_(broken, 0.0)
    weights = scaled.exp().mul_(ONE).long()
    if draws.largest_k:
        rows = draws.with_top_k
        outside = _outside_top_k(scaled[rows], draws)
        weights[rows].masked_fill_(outside, 0)
        # For the sort below, which is faster where many are equal.
        scaled[rows].masked_fill_(outside, float("-inf"))
    if len(draws.top_p):
        rows = draws.with_top_p
        weights[rows].masked_fill_(_outside_top_p(scaled[rows], weights[rows], draws), 0)
    if draws.with_min_p:
        # The likeliest token has passed all filters.
        weights.masked_fill_(weights < draws.least_weight[:, None], 0)
    return weights, broken[:, 0]


def _outside_top_k(scaled: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens less likely than the k-th: what is equally likely stays."""
    best = scaled.topk(draws.largest_k).values
    return scaled < best.gather(1, draws.top_k[:, None] - 1)


def _outside_top_p(scaled: torch.Tensor, weights: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens before which likelier ones reach top_p already: the one that crosses the line stays.

    Of equally likely ones those with the smaller ids come first.
    """
    index = scaled.sort(dim=1, descending=True, stable=True).indices
    ordered = weights.gather(1, index)
    sums = ordered.cumsum(1)
    enough = draws.top_p[:, None] * sums[:, -1:]
    outside = sums.sub_(ordered) >= enough
    return torch.empty_like(outside).scatter_(1, index, outside)


class SampledTokens:
    """The tokens of one step, on the device and on their way to the host, with what is reported of them; and how long
    it computed.

    prompts: of the prompts' own tokens, if a request asks for them.

    Made when the step begins. Neither the host nor other work on the device delays what is read here.
    """

    def __init__(self, device: torch.device) -> None:
        self._host: torch.Tensor | None = None
        self._known: list[int] = []
        self._logprobs: Logprobs | None = None
        self.prompts: PromptLogprobs | None = None
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(torch.cuda.current_stream(device))
        self._start_s, self._seconds = time.perf_counter(), 0.0

    def send(self, tokens: torch.Tensor, logprobs: Logprobs | None = None) -> None:
        """The step ends: tokens [sequences that sample] and logprobs follow it to the host."""
        self._logprobs = None if logprobs is None else logprobs.to_host()
        if self._events is None:
            # At once: the step's own tensor may be that of the next one as well.
            self._known, self._seconds = tokens.tolist(), time.perf_counter() - self._start_s
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._events[1].record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[int]:
        """Wait for the step, and no other work, and return its tokens: one or NO_TOKEN per sequence.

        The sequences get what is reported of their prompts.
        """
        if self._events is not None and self._host is not None:
            self._events[1].synchronize()
            self._known, self._host = self._host.tolist(), None
        prompts, self.prompts = self.prompts, None
        if prompts is not None:
            prompts.keep()
        return self._known

    def logprobs(self) -> dict[int, TokenLogprob]:
        """Of the requests that ask for them, by id, once the tokens have been read."""
        return {} if self._logprobs is None else self._logprobs.by_request(self._known)

    def seconds(self) -> float:
        """How long the device took, once the tokens have been read."""
        if self._events is None:
            return self._seconds
        return self._events[0].elapsed_time(self._events[1]) / 1000
