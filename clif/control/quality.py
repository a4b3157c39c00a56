"""Quality of the answers before and after a run: pooled held-out loss, and answers of probes to held-out rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from clif.config import Config
from clif.control.dispatcher import RequestRecord
from clif.data.heldout import probe_rows
from clif.data.instruct import Row, split_rows
from clif.quality.work import Answer
from clif.tokenizer import ChatTokenizer
from clif.types import FinishReason, HeldoutLoss, Purpose, Request, Sampling, first_id


@dataclass(frozen=True)
class Quality:
    """One measurement. heldout_loss: nats per answer token; exact_match: share of probes. NaN: not measured.

    answers: to probes, by the version that gave them.
    """

    heldout_loss: float
    heldout_tokens: int
    exact_match: float
    probes: int
    version: int
    answers: dict[int, list[Answer]] = field(default_factory=dict)


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
        self._asked: dict[int, Row] = {}
        self._matches: list[bool] = []
        self._answers: dict[int, list[Answer]] = defaultdict(list)
        self._complete = True

    @property
    def pending(self) -> bool:
        return bool(self._evaluating or self._asked)

    @property
    def result(self) -> Quality:
        tokens = sum(x.tokens for x in self._losses)
        return Quality(
            heldout_loss=sum(x.loss for x in self._losses) / tokens if tokens > 0 else math.nan,
            heldout_tokens=tokens,
            exact_match=sum(self._matches) / len(self._matches) if self._matches else math.nan,
            probes=len(self._matches),
            version=max((x.version for x in self._losses), default=0),
            answers=dict(self._answers),
        )

    def begin(self, replicas: Iterable[int], version: int | None = None) -> list[Request]:
        """Begin a measurement: these replicas evaluate, and the returned probes are to be submitted.

        version: an earlier one that is to answer instead of the active one.
        """
        self._evaluating = set(replicas)
        self._losses, self._matches, self._answers, self._asked = [], [], defaultdict(list), {}
        self._complete = False
        return [self._probe(row, version) for row in self._rows]

    def take(self) -> Quality | None:
        """A measurement that has become complete, once."""
        if self._complete or self.pending:
            return None
        self._complete = True
        return self.result

    def on_evaluated(self, result: HeldoutLoss) -> None:
        if result.replica in self._evaluating:
            self._evaluating.discard(result.replica)
            self._losses.append(result)

    def give_up(self) -> None:
        """Await nothing any longer."""
        self._evaluating, self._asked, self._complete = set(), {}, True

    def on_lost(self, replica: int) -> None:
        """The replica's part of the held-out rows is missing from the pool."""
        self._evaluating.discard(replica)

    def on_probe(self, record: RequestRecord) -> Judgement | None:
        """Judge a probe that ended. None: not a probe of this measurement.

        A probe that failed or was cancelled counts as neither right nor wrong.
        """
        row = self._asked.pop(record.request.id, None)
        if row is None:
            return None
        if record.finish not in (FinishReason.STOP, FinishReason.LENGTH):
            return Judgement(row.answer, None)
        text = record.text if record.text is not None else self._tokenizer.decode(record.tokens)
        match = text.strip() == row.answer.strip()
        self._matches.append(match)
        self._answers[record.version or 0].append(Answer.of(row, text))
        return Judgement(row.answer, match)

    def _probe(self, row: Row, version: int | None) -> Request:
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._asked[request_id] = row
        prompt = tuple(self._tokenizer.encode_chat(row.messages))
        sampling, probe = self._sampling, Purpose.PROBE
        return Request(id=request_id, prompt=prompt, sampling=sampling, purpose=probe, version=version)
