"""From answers to scores: of all, and of each class and client. A pure function but for the operator's test command."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from clif.config import QualityMetric
from clif.metrics.figures import wilson
from clif.quality.bootstrap import bootstrap
from clif.quality.scorers import Line, Scorer, make_scorer, perplexity, stacked
from clif.quality.work import ALL, CLASS, CLIENT, Answer, Score, Work

MOST_GROUPS = 50
"""Classes, or clients, that get scores of their own: those with the most answers."""
CHEAP: frozenset[QualityMetric] = frozenset(("loss", "perplexity", "exact_match", "accuracy"))
"""Metrics whose scores take microseconds an answer and no library."""


def score(work: Work) -> list[Score]:
    """Every metric of a measurement, in the order asked for. Without an answer that counts, a metric has no score.

    Raises ScoringError for a row that cannot be judged, and for a missing library.
    """
    found: list[Score] = []
    for metric in work.metrics:
        known = _known_loss(metric, work)
        found += known
        if not known:
            found += _scores(metric, make_scorer(metric, work), work)
    return found


def _known_loss(metric: QualityMetric, work: Work) -> list[Score]:
    """The replicas' loss over all held-out rows: only the sum is known, so it has no interval."""
    if work.loss is None or metric not in ("loss", "perplexity"):
        return []
    value = work.loss if metric == "loss" else perplexity(work.loss)
    return [Score(metric=metric, value=value, count=work.loss_tokens)]


def _scores(metric: QualityMetric, scorer: Scorer, work: Work) -> Iterator[Score]:
    lines = scorer.lines(work.answers)
    for group, name, members in _groups(work.answers):
        mine = [lines[i] for i in members if lines[i] is not None]
        if mine:
            yield _score(metric, scorer, mine, group, name, work.seed)


def _score(
    metric: QualityMetric, scorer: Scorer, lines: Sequence[Line | None], group: str, name: str, seed: int
) -> Score:
    table = stacked(lines)
    total, interval = table.sum(axis=0), None
    if scorer.share:
        interval = wilson(round(float(total[0])), len(table))
    elif len(table) > 1:
        interval = bootstrap(table, scorer.value, zlib.crc32(f"{seed}/{metric}/{group}/{name}".encode()))
    low, high = interval or (None, None)
    count = int(total[1]) if metric in ("loss", "perplexity") else len(table)
    return Score(metric=metric, value=scorer.value(total), low=low, high=high, count=count, group=group, name=name)


def _groups(answers: Sequence[Answer]) -> Iterator[tuple[str, str, list[int]]]:
    yield ALL, "", list(range(len(answers)))
    for group, names in (
        (CLASS, [a.marks.category for a in answers]),
        (CLIENT, [a.client for a in answers]),
    ):
        members = defaultdict[str, list[int]](list)
        for index, name in enumerate(names):
            if name is not None:
                members[name].append(index)
        largest = sorted(members, key=lambda name: (-len(members[name]), name))[:MOST_GROUPS]
        for name in sorted(largest) if len(members) > 1 else ():
            yield group, name, members[name]
