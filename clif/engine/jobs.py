"""Resumable jobs: training work that says what comes next, and leaves when and where it runs to the engine.

Free of torch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from clif.models.layer import SubBatch


class SliceKind(enum.StrEnum):
    """What a slice computes, as it is stored in `ticks`; the cost of each kind is learnt apart."""

    WAIT = "wait"
    PACK = "pack"
    FORWARD = "forward"
    HEAD = "head"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    EVALUATE = "evaluate"
    EVALUATE_HEAD = "evaluate_head"
    PRODUCT_ERROR = "product_error"


class FusedPass(Protocol):
    """A training forward whose remaining layers a serving step can compute in its own products."""

    sub_batch: SubBatch

    @property
    def at(self) -> int:
        """The layer that comes next."""
        ...

    def enter(self) -> tuple[torch.Tensor, bool]:
        """Input [rows, hidden size] of the next layer, and whether autograd is to record the layer."""
        ...

    def leave(self, entry: torch.Tensor, out: torch.Tensor) -> None:
        """The next layer has made `out` [rows, hidden size] of `entry`."""
        ...


@dataclass(frozen=True)
class Slice:
    """What a job would do next: up to `units` pieces of `tokens` rows each.

    The pieces are layers of a pass, rows of the head, or, for PACK, the tokens that the next pass may have.
    work: computes as many pieces as its argument says, without a break, and returns their result; it touches nothing
    that serving touches, so that it may run concurrently. least: fewer are not worth a slice.
    fused_pass: the forward that a serving step can take along instead, where there is one.
    """

    kind: SliceKind
    tokens: int = 0
    units: int = 0
    work: Callable[[int], Any] = lambda units: None
    fused_pass: FusedPass | None = None
    least: int = 1


WAIT = Slice(SliceKind.WAIT)
STEP_KINDS = frozenset({SliceKind.FORWARD, SliceKind.HEAD, SliceKind.BACKWARD, SliceKind.OPTIMIZER})
"""Slices that belong to an optimizer step; the others evaluate or wait."""
T = TypeVar("T")
Slices = Generator[Slice, Any, T]
"""A job with a result: it yields its next slice and is resumed with what the slice's work returned."""


class Job:
    """A generator of slices. upcoming: the next slice, or None once the job is done."""

    def __init__(self, name: str, work: Slices[Any]) -> None:
        self.name, self._work = name, work
        self.upcoming: Slice | None = None
        self.resume(None)

    def run(self, units: int | None = None) -> None:
        """Compute `units` of the upcoming slice, or all of it, here and now. What it raises ends the job."""
        assert self.upcoming is not None
        self.resume(self.upcoming.work(self.upcoming.units if units is None else units))

    def resume(self, result: Any) -> None:
        """Continue after the upcoming slice, which was computed as far as asked, with this result."""
        try:
            self.upcoming = self._work.send(result)
        except StopIteration:
            self.upcoming = None

    def interrupt(self, why: Exception) -> None:
        """Raise `why` in the work in place of the upcoming slice; the work says what comes next."""
        try:
            self.upcoming = self._work.throw(why)
        except StopIteration:
            self.upcoming = None

    def close(self) -> None:
        """End the job; `finally` blocks of the work run."""
        self._work.close()
        self.upcoming = None
