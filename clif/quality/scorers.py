"""A metric as a sum: each answer gives a line of numbers, and the sum of lines gives the figure.

So the figure of any group, and of any draw of the bootstrap, comes from what was computed once for each answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from clif.config import QualityMetric
from clif.quality.bootstrap import Array
from clif.quality.checks import expected_label, holds_json, passes, same_label, valid_json
from clif.quality.libraries import check_parser, code_language, library
from clif.quality.work import Answer, Work

Line = Sequence[float]


class Scorer(Protocol):
    """share: whether each answer is right or wrong, so that the figure is a share."""

    share: bool

    def lines(self, answers: Sequence[Answer]) -> list[Line | None]:
        """One for each answer; None: the metric says nothing about it."""
        ...

    def value(self, total: Array) -> float: ...


class Mean:
    """The mean of a number of each answer, times `scale`; None: the answer does not count."""

    share = False

    def __init__(self, judge: Callable[[Answer], float | None], scale: float = 1.0) -> None:
        self._judge, self._scale = judge, scale

    def lines(self, answers: Sequence[Answer]) -> list[Line | None]:
        judged = [self._judge(answer) for answer in answers]
        return [None if value is None else (self._scale * value, 1.0) for value in judged]

    def value(self, total: Array) -> float:
        return float(total[0] / total[1])


class Share(Mean):
    """The share of right answers."""

    share = True


class Loss:
    """Mean loss per answer token, nats. perplexity: e to the power of it."""

    share = False

    def __init__(self, perplexity: bool) -> None:
        self._perplexity = perplexity

    def lines(self, answers: Sequence[Answer]) -> list[Line | None]:
        return [None if a.loss is None or not a.tokens else (a.loss, float(a.tokens)) for a in answers]

    def value(self, total: Array) -> float:
        mean = float(total[0] / total[1])
        return perplexity(mean) if self._perplexity else mean


class Corpus:
    """A metric of sacrebleu over all answers of a group, 0 to 100, from its counts for each answer."""

    share = False

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def lines(self, answers: Sequence[Answer]) -> list[Line | None]:
        texts, references = [a.text for a in answers], [a.reference for a in answers]
        return list(self._metric._extract_corpus_statistics(texts, [references])) if answers else []

    def value(self, total: Array) -> float:
        return float(self._metric._aggregate_and_compute([total.astype(int).tolist()]).score)


def make_scorer(metric: QualityMetric, work: Work) -> Scorer:
    """Raises ScoringError where the metric's library is missing."""
    makers: dict[QualityMetric, Callable[[], Scorer]] = {
        "loss": lambda: Loss(perplexity=False),
        "perplexity": lambda: Loss(perplexity=True),
        "exact_match": lambda: Share(lambda a: a.text.strip() == a.reference.strip()),
        "accuracy": lambda: Share(_accurate),
        "bleu": lambda: Corpus(library("bleu", "metrics").BLEU()),
        "chrf": lambda: Corpus(library("chrf", "metrics").CHRF()),
        "rouge": lambda: Mean(_rouge(), 100),
        "codebleu": lambda: Mean(_codebleu(work.code_language), 100),
        "json_valid": lambda: Share(lambda a: valid_json(a) if holds_json(a) else None),
        "pass_rate": lambda: Share(lambda a: passes(a, work.testing)),
    }
    return makers[metric]()


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def stacked(lines: Sequence[Line | None]) -> Array:
    """[counted answers, k]"""
    return np.array([line for line in lines if line is not None], dtype=np.float64)


def _accurate(answer: Answer) -> bool | None:
    label = expected_label(answer)
    return None if label is None else same_label(answer.text, label)


def _rouge() -> Callable[[Answer], float]:
    """F-measure of the longest common subsequence of words (ROUGE-L)."""
    scorer = library("rouge", "rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    return lambda a: float(scorer.score(a.reference, a.text)["rougeL"].fmeasure)


def _codebleu(language: str) -> Callable[[Answer], float | None]:
    codebleu = library("codebleu")

    def judge(answer: Answer) -> float | None:
        lang = code_language(answer.marks.language, language)
        if lang is None:
            return None
        check_parser(lang)
        return float(codebleu.calc_codebleu([answer.reference], [answer.text], lang=lang)["codebleu"])

    return judge
