"""Log-probabilities of a prompt's own tokens, each under those before it, for requests that ask for them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from clif.engine.logprobs import to_host
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.staging import send_ints
from clif.models.stack import CausalStack
from clif.types import LEAST_LOGPROB, TokenLogprob

ROWS = 64
"""Rows whose logits are in memory at a time: as many bytes as one step of a large batch has, whatever the prompt."""


@dataclass(frozen=True)
class PromptPart:
    """Tokens [start + 1, start + 1 + count) of a sequence's prompt, told by as many rows of the step."""

    sequence: Sequence
    start: int
    count: int


@dataclass(frozen=True)
class PromptScoring:
    """The rows of a step that tell a prompt's next token, part after part. rows, targets: on the device."""

    parts: Seq[PromptPart]
    rows: torch.Tensor
    targets: torch.Tensor
    most: int

    @classmethod
    def of(cls, chunks: Seq[Chunk], device: torch.device) -> PromptScoring | None:
        """None: no chunk belongs to a request that asks for it."""
        parts, rows, targets = list[PromptPart](), list[int](), list[int]()
        row = 0
        for sequence, start, stop, _ in chunks:
            count = min(stop, len(sequence.request.prompt) - 1) - start
            if sequence.scored is not None and count > 0:
                parts.append(PromptPart(sequence, start, count))
                rows += range(row, row + count)
                targets += sequence.request.prompt[start + 1 : start + 1 + count]
            row += stop - start
        if not parts:
            return None
        most = max(part.sequence.request.sampling.logprobs or 0 for part in parts)
        return cls(parts, send_ints(rows, device), send_ints(targets, device), most)


@dataclass(frozen=True)
class PromptLogprobs:
    """values [rows, 1 + most]: of the prompt's token, then of the likeliest ones; top [rows, most]: ids of these."""

    scoring: PromptScoring
    values: torch.Tensor
    top: torch.Tensor

    def keep(self) -> None:
        """Give the sequences what belongs to them, once it is on the host. A preempted one starts over."""
        values, top, at = self.values.tolist(), self.top.tolist(), 0
        for part in self.scoring.parts:
            scored, asked = part.sequence.scored, part.sequence.request.sampling.logprobs
            if scored is not None:
                tokens = part.sequence.request.prompt[part.start + 1 :]
                del scored[part.start :]
                for token, (value, *others), ids in zip(tokens, values[at:], top[at : at + part.count], strict=False):
                    scored.append(TokenLogprob(token, value, tuple(zip(ids, others, strict=True))[:asked]))
            at += part.count


def prompt_logprobs(stack: CausalStack, hidden: torch.Tensor, scoring: PromptScoring) -> PromptLogprobs:
    """hidden [rows of the step, hidden size], of the last layer. Collective; the host does not wait for the copies."""
    values, tops = list[torch.Tensor](), list[torch.Tensor]()
    for rows, targets in zip(scoring.rows.split(ROWS), scoring.targets.split(ROWS), strict=True):
        logits = stack.head.whole(stack.head(stack.norm(hidden.index_select(0, rows)))).float()
        best = logits.topk(min(scoring.most, logits.shape[1]))
        of_rows = torch.cat((logits.gather(1, targets[:, None]), best.values), 1) - logits.logsumexp(1, keepdim=True)
        # The request fails where they are not finite; what is reported of it must still be numbers.
        values.append(of_rows.nan_to_num(LEAST_LOGPROB).clamp_(LEAST_LOGPROB, 0.0))
        tops.append(best.indices)
    return PromptLogprobs(scoring, to_host(torch.cat(values)), to_host(torch.cat(tops)))
