"""What the leader of a replica decides for one step, in one message: whatever depends on its clock and its costs."""

from __future__ import annotations

import msgspec

from clif.engine.coserving.strategy import StepView, Strategy
from clif.engine.jobs import WAIT, Slice
from clif.types import TrainingSlack


class StepPlan(msgspec.Struct, frozen=True):
    """Training of one step. Made before the step's messages are handled, of the slice that is upcoming then.

    packs: tokens, at most, of each pass that began when the plan was made. units: of the upcoming slice, to be
    computed before serving; 0: none. concurrent, whole_step: as in Decision. fuse: the serving step takes the upcoming
    forward along. slack: the reason, as `ticks` stores it.
    """

    packs: tuple[int, ...] = ()
    units: int = 0
    concurrent: bool = False
    whole_step: bool = False
    fuse: bool = False
    slack: TrainingSlack | None = None


NO_TRAINING = StepPlan()


def plan_training(
    strategy: Strategy, view: StepView | None, piece: Slice | None, packs: tuple[int, ...], longest_s: float
) -> StepPlan:
    """What the strategy decides about the upcoming slice. view: None without serving, where it has longest_s."""
    if piece is None or piece is WAIT:
        return StepPlan(packs)
    if view is None:
        return StepPlan(packs, strategy.units_within(piece, longest_s) or piece.least)
    decision = strategy.between(view, piece)
    if decision.units or not strategy.fuses or piece.fused_pass is None or not view.rows:
        return StepPlan(packs, decision.units, decision.concurrent, decision.whole_step, slack=decision.slack)
    fused = strategy.fuse(view, piece)
    return StepPlan(packs, fuse=fused.units > 0, slack=fused.slack)


class StepMessage(msgspec.Struct, frozen=True):
    """The one message that the leader sends its peers for a step: the messages that it received, and its decisions."""

    inbox: tuple[bytes, ...] = ()
    step: StepPlan = NO_TRAINING


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StepMessage)


def encode_step(message: StepMessage) -> bytes:
    return _ENCODER.encode(message)


def decode_step(payload: bytes) -> StepMessage:
    """Raises msgspec.DecodeError for anything that encode_step() does not write."""
    return _DECODER.decode(payload)
