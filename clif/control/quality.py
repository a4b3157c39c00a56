"""Quality of the answers before and after a run: pooled held-out loss, and exact match of probe answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clif.config import Config
from clif.control.dispatcher import RequestRecord
from clif.data.heldout import probe_rows
from clif.data.instruct import Row, split_rows
from clif.tokenizer import ChatTokenizer
from clif.types import FinishReason, HeldoutLoss, Purpose, Request, Sampling, first_id


@dataclass(frozen=True)
class Quality:
    """One measurement. heldout_loss: nats per answer token; exact_match: share of probes. NaN: not measured."""

    heldout_loss: float
    heldout_tokens: int
    exact_match: float
    probes: int
    version: int


@dataclass(frozen=True)
class Judgement:
    """A probe that ended: the expected answer, and whether it was given; match None: no answer was given."""

    expected: str
    match: bool | None


class QualityCheck:
    """Collects one measurement at a time from the replicas' evaluations and the probes' answers.

    start: number of control processes that used this run's folder before; it keeps the ids of probes unique.
    most_tokens: answer tokens that a replica can judge by, at most: all held-out rows have no more.
    """

    def __init__(self, config: Config, rows: Sequence[Row], tokenizer: ChatTokenizer, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._sampling = Sampling(max_tokens=config.quality.max_tokens)
        self._rows = probe_rows(rows, config)
        held = split_rows(rows, config.data.heldout_split, needed=False)
        self.most_tokens = len(held) * min(config.data.max_sample_tokens, config.model.max_context)
        self._next_id = first_id(1 + start)
        self._evaluating: set[int] = set()
        self._losses: list[HeldoutLoss] = []
        self._answers: dict[int, str] = {}
        self._matches: list[bool] = []

    @property
    def pending(self) -> bool:
        return bool(self._evaluating or self._answers)

    @property
    def result(self) -> Quality:
        tokens = sum(x.tokens for x in self._losses)
        return Quality(
            heldout_loss=sum(x.loss for x in self._losses) / tokens if tokens > 0 else math.nan,
            heldout_tokens=tokens,
            exact_match=sum(self._matches) / len(self._matches) if self._matches else math.nan,
            probes=len(self._matches),
            version=max((x.version for x in self._losses), default=0),
        )

    def begin(self, replicas: Iterable[int]) -> list[Request]:
        """Begin a measurement: these replicas evaluate, and the returned probes are to be submitted."""
        self._evaluating = set(replicas)
        self._losses, self._matches = [], []
        first = self._next_id
        self._next_id += len(self._rows)
        self._answers = {first + i: row.answer for i, row in enumerate(self._rows)}
        return [self._probe(first + i, row) for i, row in enumerate(self._rows)]

    def on_evaluated(self, result: HeldoutLoss) -> None:
        if result.replica in self._evaluating:
            self._evaluating.discard(result.replica)
            self._losses.append(result)

    def give_up(self) -> None:
        """Await nothing any longer."""
        self._evaluating, self._answers = set(), {}

    def on_lost(self, replica: int) -> None:
        """The replica's part of the held-out rows is missing from the pool."""
        self._evaluating.discard(replica)

    def on_probe(self, record: RequestRecord) -> Judgement | None:
        """Judge a probe that ended. None: not a probe of this measurement.

        A probe that failed or was cancelled counts as neither right nor wrong.
        """
        answer = self._answers.pop(record.request.id, None)
        if answer is None:
            return None
        if record.finish not in (FinishReason.STOP, FinishReason.LENGTH):
            return Judgement(answer, None)
        text = record.text if record.text is not None else self._tokenizer.decode(record.tokens)
        self._matches.append(text.strip() == answer.strip())
        return Judgement(answer, self._matches[-1])

    def _probe(self, request_id: int, row: Row) -> Request:
        prompt = tuple(self._tokenizer.encode_chat(row.messages))
        return Request(id=request_id, prompt=prompt, sampling=self._sampling, purpose=Purpose.PROBE)
