"""What the requests that wait at the dispatcher leave for training: they too have their first token to lose.

A replica is told of them (clif/wire/messages.py, Backlog). Pure: data in, the slack and its reason out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from clif.config import SloConfig
from clif.types import SlackLimit, TrainingSlack, Waiting

STALE_S = 3.0
"""A backlog of longer ago says nothing any more: the control process repeats it every second."""


@dataclass(frozen=True)
class Backlog:
    """Requests that wait for a slot in the batch of any replica. heard_s: when this one was told, on its own clock.

    waiting: how many are this replica's share. oldest: the first of them, oldest first.
    """

    waiting: int = 0
    oldest: tuple[Waiting, ...] = ()
    heard_s: float = math.inf

    def is_fresh(self, now: float) -> bool:
        return now - self.heard_s <= STALE_S


NO_BACKLOG = Backlog()
"""The backlog of an engine without a dispatcher."""


@dataclass(frozen=True)
class BatchSlots:
    """When the slots of a batch become free if serving goes on alone.

    free: slots at once; negative: so many sequences have to end first. tokens_left: of each sequence at most, fewest
    first. step_s: seconds of a step that decodes for all of them; chunk_s: of one that has tokens of prompts as well,
    each of which adds row_s to it. chunk: tokens of prompts in one step, at most.
    """

    free: int
    tokens_left: Seq[int]
    step_s: float
    chunk_s: float
    row_s: float
    chunk: int

    def first_token_s(self, ahead: int, prompt_tokens: int) -> float:
        """Seconds until the first token of a request with so many ahead of it. prompt_tokens: with those of theirs.

        An upper bound: every answer gets as long as it may. A request behind more others than there are slots waits for
        the longest answer, once for each batch of them.
        """
        steps, chunks = 0, -(-prompt_tokens // self.chunk)
        if ahead >= self.free:
            if not self.tokens_left:
                return math.inf
            batches, slot = divmod(ahead - self.free, len(self.tokens_left))
            steps = batches * self.tokens_left[-1] + self.tokens_left[slot]
        return steps * self.step_s + chunks * self.chunk_s + prompt_tokens * self.row_s


def backlog_slack(now: float, backlog: Backlog, slots: BatchSlots, slo: SloConfig) -> TrainingSlack:
    """What training may take so that every waiting request still gets its first token in time, less the margin.

    Its deadline counts as well, unless it is lost anyway. The requests that are not listed are younger than the last
    one that is: the last of them counts as if it were as old. Infinite if none waits.
    """
    worst, limiting, prompt_tokens = math.inf, -1, 0
    for ahead, request in _in_line(backlog):
        prompt_tokens += request.prompt_tokens
        slack = _slack(now - backlog.heard_s, request, slots.first_token_s(ahead, prompt_tokens), slots.step_s, slo)
        if slack < worst:
            worst, limiting = slack, request.id
    return TrainingSlack(worst, SlackLimit.NO_REQUEST if limiting < 0 else SlackLimit.QUEUED, limiting)


def _in_line(backlog: Backlog) -> list[tuple[int, Waiting]]:
    """The listed requests, each with how many are ahead of it; then one in place of those that are not listed."""
    line = list(enumerate(backlog.oldest))
    unlisted = backlog.waiting - len(line)
    if line and unlisted > 0:
        last = line[-1][1]
        rest = Waiting(last.id, last.wait_s, unlisted * last.prompt_tokens, last.max_tokens, last.slo)
        line.append((backlog.waiting - 1, rest))
    return line


def _slack(since_s: float, request: Waiting, first_s: float, step_s: float, slo: SloConfig) -> float:
    """since_s: since the replica was told. first_s: until the first token."""
    age_s, kept = request.wait_s + since_s, 1 - slo.margin
    ttft_s = slo.ttft_ms / 1000 if request.slo.ttft_s is None else request.slo.ttft_s
    first = ttft_s * kept - age_s - first_s
    deadline_s = request.slo.deadline_s
    if deadline_s is None:
        deadline_s = math.inf if slo.deadline_ms is None else slo.deadline_ms / 1000
    last = deadline_s * kept - age_s - first_s - (request.max_tokens - 1) * step_s
    return min(first, last) if last >= 0 else first
