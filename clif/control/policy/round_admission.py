"""Round admission: which replicas enter a federated round, and when.

Sources: Bonawitz et al. 2019, "Towards Federated Learning at Scale", for rounds over idle participants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from clif.config import Config
from clif.control.policy.pressure import Pressure
from clif.control.policy.view import ClusterView, ReplicaView
from clif.states import ReplicaState
from clif.types import CLIF, RoundPlan

GIVE_UP_FACTOR = 2
"""Training is given up after this many times federation.rounds discarded rounds in a row (at least MIN_GIVE_UP)."""
MIN_GIVE_UP = 4
GIVE_UP_OPEN = 20
"""The same where federation.rounds sets no number."""
MAX_PAUSES = 10
LEAST_LR_SCALE = 1 / 64


@dataclass(frozen=True)
class JobTerms:
    """What a job asks of its rounds; the defaults are those of the run's own data.

    ready: replicas that hold its samples; None: all. shards: how many replicas have samples of it, once all of them are
    there. samples_left: that are still to be trained on; None: no end. batch_size: samples of an optimizer step of a
    member; 0: as configured. lr_scale: of train.lr, beside the history's.
    """

    job: str = ""
    adapter: str = CLIF
    ready: frozenset[int] | None = None
    shards: int | None = None
    samples_left: int | None = None
    batch_size: int = 0
    lr_scale: float = 1.0

    def batches(self, config: Config) -> tuple[int, int]:
        """(micro-batch, accumulation) of an optimizer step."""
        if not self.batch_size:
            return config.train.micro_batch, config.train.accumulation
        micro_batch = min(config.train.micro_batch, self.batch_size)
        return micro_batch, math.ceil(self.batch_size / micro_batch)


OWN_DATA = JobTerms()


@dataclass(frozen=True)
class History:
    """What came of a job's rounds so far. version: the active one of its adapter; last_round: of any job.

    lr_scale: what train.lr is multiplied by in the next round.
    """

    last_round: int = 0
    completed: int = 0
    discarded: int = 0
    discarded_in_a_row: int = 0
    version: int = 0
    last_end_s: float = -math.inf
    lr_scale: float = 1.0

    def after(self, now: float, committed: bool, judged: bool, outer_step: float = 1.0) -> History:
        """The history once a round has ended; judged: the average was voted on; outer_step: of what was promoted.

        An average that was judged and not promoted, or only at a part of the way, went too far or the wrong way. The
        next round takes other samples, by each member's cursor, and half the learning rate; each promotion of an
        average doubles it again, up to train.lr.
        """
        scale = self.lr_scale
        if committed and outer_step == 1:
            scale = min(1.0, 2 * scale)
        elif judged:
            scale = max(LEAST_LR_SCALE, scale / 2)
        return replace(
            self,
            completed=self.completed + committed,
            discarded=self.discarded + (not committed),
            discarded_in_a_row=0 if committed else self.discarded_in_a_row + 1,
            last_end_s=now,
            lr_scale=scale,
        )


def plan_round(
    now: float,
    view: ClusterView,
    pressure: Pressure,
    history: History,
    config: Config,
    terms: JobTerms = OWN_DATA,
) -> tuple[RoundPlan | None, str]:
    """Plan the next round of a job, or say why there is none now. The caller ensures that no round is under way.

    High pressure admits none, medium ceil(medium_share * idle), low all idle replicas; always at least
    federation.min_members or no round. Replicas that trained least go first, so that every replica's data
    count. The baselines of run.mode ignore the pressure: they admit all. Drained replicas are never admitted.
    """
    over, reason = (False, "") if terms.job else target_reached(history, config)
    if over:
        return None, reason
    if view.paused:
        return None, f"training is paused: {view.paused}"
    view = replace(view, replicas=tuple(r for r in view.replicas if not r.drained))
    adaptive = config.run.adaptive
    if adaptive and pressure is Pressure.HIGH:
        return None, "service pressure is high"
    pause = pause_s(history, config)
    if now - history.last_end_s < pause:
        return None, f"pausing {pause:.1f} s after {history.discarded_in_a_row} discarded rounds in a row"
    if terms.ready is not None:
        view = replace(view, replicas=tuple(r for r in view.replicas if r.replica in terms.ready))
    idle = [r for r in view.in_state(ReplicaState.IDLE) if _has_base(r, history.version, terms)]
    if not idle:
        return None, "no replica is idle" if terms.ready is None else "no replica with samples of the job is idle"
    if _worth_waiting(now, view, idle, config):
        return None, "more replicas are about to become idle"
    some = adaptive and pressure is Pressure.MEDIUM
    admitted = max(1, math.ceil(config.control.medium_share * len(idle))) if some else len(idle)
    needed = min(config.federation.min_members, terms.shards or config.federation.min_members)
    if admitted < needed:
        return None, f"{admitted} of {len(idle)} idle replicas admitted, {needed} needed"
    chosen = sorted(idle, key=lambda r: (r.rounds_joined, r.utilisation, r.replica))[:admitted]
    members = sorted(chosen, key=lambda r: r.replica)
    micro_batch, accumulation = terms.batches(config)
    plan = RoundPlan(
        round_id=history.last_round + 1,
        members=tuple(r.replica for r in members),
        incarnations=tuple(r.incarnation for r in members),
        local_steps=_local_steps(terms, len(members), micro_batch * accumulation, config),
        micro_batch=micro_batch,
        accumulation=accumulation,
        base_version=history.version,
        lr_scale=history.lr_scale * terms.lr_scale,
        job=terms.job,
        adapter=terms.adapter,
    )
    slower = "" if history.lr_scale == 1 else f", learning rate x {history.lr_scale:g} after discarded rounds"
    why = f"pressure is {pressure.value}" if adaptive else f"run.mode {config.run.mode} looks at no pressure"
    return plan, f"{why}: {admitted} of {len(idle)} idle replicas{slower}"


def _has_base(replica: ReplicaView, base: int, terms: JobTerms) -> bool:
    """Whether the replica can begin from the active version of the job's adapter. That of `clif` it serves, too."""
    return replica.version == base if terms.adapter == CLIF else base == 0 or base in replica.versions


def pause_s(history: History, config: Config) -> float:
    """How long after its last round a job rests."""
    return config.control.hold_s * min(history.discarded_in_a_row, MAX_PAUSES)


def _local_steps(terms: JobTerms, members: int, batch: int, config: Config) -> int:
    """federation.local_steps, or fewer if the job needs no more. batch: samples of a member's step."""
    steps = config.federation.local_steps
    return steps if terms.samples_left is None else max(1, min(steps, math.ceil(terms.samples_left / members / batch)))


def target_reached(history: History, config: Config) -> tuple[bool, str]:
    """Whether no further round will ever be planned: training is off, done, or given up."""
    if not config.train.enabled:
        return True, "train.enabled is false"
    target = config.federation.rounds
    done = "rounds go on while load lasts" if target is None else f"{history.completed} of {target} rounds completed"
    if target is not None and history.completed >= target:
        return True, done
    reason = given_up(history, config)
    return (True, f"gave up: {reason}") if reason else (False, done)


def given_up(history: History, config: Config) -> str:
    """Why no further round is tried although more are wanted; empty: they are, or none are wanted."""
    target = config.federation.rounds
    if target is not None and history.completed >= target:
        return ""
    limit = GIVE_UP_OPEN if target is None else max(MIN_GIVE_UP, GIVE_UP_FACTOR * target)
    if history.discarded_in_a_row < limit:
        return ""
    return f"{history.discarded_in_a_row} rounds in a row were discarded"


def wants_rounds(history: History, config: Config) -> bool:
    """Whether rounds are to begin even after the load: federation.rounds asks for more, or training is all there is."""
    asked = config.federation.rounds is not None or config.load.kind == "none"
    return asked and not target_reached(history, config)[0]


def _worth_waiting(now: float, view: ClusterView, idle: list[ReplicaView], config: Config) -> bool:
    """Whether others have slack already and become IDLE within hold_s, or are installing the active version.

    The wait is bounded by the idle replica that waits longest: one that flickers must not starve training.
    """
    hold = config.control.hold_s
    soon = any(r.slack_since is not None and r.role.trains for r in view.in_state(ReplicaState.SERVING))
    soon = soon or len(idle) < len(view.in_state(ReplicaState.IDLE))
    return soon and now - min(r.state_since for r in idle) < 2 * hold
