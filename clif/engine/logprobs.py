"""Log-probabilities of chosen tokens and of the likeliest ones, for the rows of a step that report them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clif.kernels.staging import send_ints
from clif.models.head import Head
from clif.types import LEAST_LOGPROB, NO_TOKEN, Request, TokenLogprob


@dataclass(frozen=True)
class Reporting:
    """The rows that report: indices among those that choose a token. requests: theirs. most: alternatives, at most."""

    rows: Sequence[int]
    requests: Sequence[Request]
    most: int
    on_device: torch.Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Reporting | None:
        """Of the requests of a step, in the order of their rows. None: no row reports."""
        rows = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
        if not rows:
            return None
        asked = [requests[row] for row in rows]
        return cls(rows, asked, max(r.sampling.logprobs or 0 for r in asked), send_ints(rows, device))


@dataclass(frozen=True)
class Logprobs:
    """values [reporting, 1 + most]: of the token, then of the likeliest ones; top [reporting, most]: ids of these."""

    reporting: Reporting
    values: torch.Tensor
    top: torch.Tensor

    def to_host(self) -> Logprobs:
        """Copies that follow the step; the host does not wait for them here."""
        return Logprobs(self.reporting, to_host(self.values), to_host(self.top))

    def by_request(self, tokens: Sequence[int]) -> dict[int, TokenLogprob]:
        """By request id; tokens: of all rows that choose one. Those without a token are left out."""
        found = {}
        rows = zip(self.reporting.rows, self.reporting.requests, self.values.tolist(), self.top.tolist(), strict=True)
        for row, request, (value, *values), top in rows:
            if tokens[row] != NO_TOKEN:
                best = tuple(zip(top, values, strict=True))[: request.sampling.logprobs]
                found[request.id] = TokenLogprob(tokens[row], value, best)
        return found


def logprobs_of(head: Head, logits: torch.Tensor, tokens: torch.Tensor, reporting: Reporting) -> Logprobs:
    """logits: [rows that choose a token, this rank's columns], the model's own. tokens: what they chose. Collective.

    Temporaries: 12 bytes for each token of each row.
    """
    whole = head.whole(logits.index_select(0, reporting.on_device)).float()
    best = whole.topk(min(reporting.most, whole.shape[1]))
    chosen = whole.gather(1, tokens.index_select(0, reporting.on_device).clamp_min(0)[:, None])
    values = torch.cat((chosen, best.values), 1) - whole.logsumexp(1, keepdim=True)
    return Logprobs(reporting, values.clamp_(LEAST_LOGPROB, 0.0), best.indices)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy that follows the step; the host does not wait for it here."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
