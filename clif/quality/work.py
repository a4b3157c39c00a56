"""What is scored, and what comes of it: records that cross to the scoring process and back. Free of torch."""

from __future__ import annotations

import math

import msgspec

from clif.config import QualityMetric
from clif.data.instruct import Marks, Row
from clif.errors import InputError

ALL, CLASS, CLIENT = "all", "class", "client"
"""Groups of answers: every one, those of a class, those of a client."""


class ScoringError(InputError):
    """Answers cannot be scored; the message says what to change."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer beside the known one. row: its number in the file. loss: of the known answer, nats, over its tokens."""

    row: int
    text: str
    reference: str
    marks: Marks = Marks()
    client: str | None = None
    loss: float | None = None
    tokens: int = 0

    @classmethod
    def of(cls, row: Row, text: str) -> Answer:
        return cls(row=row.id, text=text, reference=row.answer, marks=row.marks, client=row.client)


class Testing(msgspec.Struct, frozen=True, kw_only=True):
    """How a row's test is run. command: of the operator, with places for files; empty: no test is run."""

    command: tuple[str, ...] = ()
    timeout_s: float = 10.0


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one adapter version. loss: nats per answer token over all held-out rows; None: not known."""

    version: int
    metrics: tuple[QualityMetric, ...]
    answers: tuple[Answer, ...] = ()
    loss: float | None = None
    loss_tokens: int = 0
    seed: int = 0
    code_language: str = "python"
    testing: Testing = Testing()


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A metric of a group of answers. low, high: its 95 % interval; None: there is none. answers: how many counted.

    count of loss and perplexity: answer tokens.
    """

    metric: QualityMetric
    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    group: str = ALL
    name: str = ""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value)
