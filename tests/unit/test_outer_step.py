"""The outer step of a round: what is judged where the average is no better, and what is proposed in the end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import Rig, finish, make_rig

from clif.engine.jobs import WAIT, Slices
from clif.training.outer_step import HALF, WHOLE, is_half_tried, judge_half, outer_step


@pytest.mark.parametrize(
    ("average", "base", "tried"), [(1.0, 2.0, False), (2.0, 2.0, True), (3.0, 2.0, True), (math.nan, 2.0, False)]
)
def test_the_half_step_is_judged_where_a_finite_average_is_no_better(average: float, base: float, tried: bool) -> None:
    assert is_half_tried(average, base) == tried and not is_half_tried(math.inf, base)


@pytest.mark.parametrize(("half", "step"), [(1.0, HALF), (2.0, WHOLE), (3.0, WHOLE), (math.nan, WHOLE)])
def test_the_better_one_is_proposed(half: float, step: float) -> None:
    assert outer_step(2.0, half) == step


class Gate:
    """Held-out rows of which the next loss is given."""

    def __init__(self, loss: float | None) -> None:
        self.next = loss

    def loss(self, slot: int | None) -> Slices[float]:
        assert self.next is not None, "a pass that nothing asks for"
        yield WAIT
        return self.next


@pytest.fixture(scope="module")
def rig(tiny_config: Path) -> Rig:
    return make_rig(f"random:{tiny_config}")


@pytest.mark.parametrize(
    ("mine", "others", "half", "found", "place"),
    [
        (1.0, 1.0, None, (1.0, WHOLE), 1.0),
        (3.0, 0.5, None, (3.0, WHOLE), 1.0),
        (3.0, 3.0, 1.0, (1.0, HALF), 0.5),
        (3.0, 3.0, 4.0, (3.0, WHOLE), 1.0),
        (math.nan, 1.0, None, (math.nan, WHOLE), 1.0),
    ],
    ids=["better", "better-for-all-together", "half-is-better", "neither-is", "not-finite"],
)
def test_promise_3_what_a_round_proposes_lies_in_the_shadow_with_its_own_loss(
    rig: Rig, mine: float, others: float, half: float | None, found: tuple[float, float], place: float
) -> None:
    """mine, others: the average's loss here and on the other member; the base's is 2 on both."""
    base, average = torch.zeros_like(rig.bank.shadow), torch.ones_like(rig.bank.shadow)
    rig.bank.load_shadow(average)
    other = iter([[others, 2.0], [half]])

    def pool(values: list[float]) -> Slices[list[float]]:
        yield WAIT
        return [(a + b) / 2 for a, b in zip(values, next(other), strict=True)]  # type: ignore[operator]

    loss, step = finish(judge_half(rig.bank, base, Gate(half), mine, 2.0, pool))  # type: ignore[arg-type]
    assert (loss, step) == pytest.approx(found, nan_ok=True)
    assert torch.equal(rig.bank.shadow, average * place)
