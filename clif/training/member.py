"""A replica's part in a federated round, as one resumable job that reads from top to bottom.

Invariants: a round leaves the shadow as the committed average, or as it was before the round; samples of a discarded
round are released; no promotion overwrites a slot that a request reads; each member begins from the base version of the
plan, whatever its shadow was trained to before.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), for
FedAvg; Bonawitz et al., "Towards Federated Learning at Scale: System Design" (2019), for rounds with a deadline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from clif.adapters.bank import State
from clif.adapters.peft_io import config_json, read_weights, write_weights
from clif.adapters.slots import SlotTable
from clif.distributed.collectives import Exchange, Group, RoundBroken, WeightedMean
from clif.distributed.topology import Topology
from clif.engine.jobs import WAIT, Slice, SliceKind, Slices
from clif.models.dual_linear import SHADOW
from clif.training.checkpoint import Checkpoint
from clif.training.heldout import Heldout
from clif.training.job_switch import OWN, JobState, JobSwitch
from clif.training.masters import Masters
from clif.training.outer_step import WHOLE, judge_half
from clif.training.product_error import ErrorShare, deal, deviation_
from clif.training.trainer import ShadowTrainer, StepCut, StepResult
from clif.types import CLIF, HeldoutLoss, RoundPlan, RoundResult, Vote
from clif.wire.messages import Evaluated, Held, Install, Published, Settle, Settled, StepsDone, Up, Voted

NO_ROUND = -1


@dataclass
class RoundOrders:
    """The orders of the control process for the round so far."""

    plan: RoundPlan
    group: int
    finish_steps: bool = False
    aggregate: bool = False
    settle: Settle | None = None


@dataclass
class Member:
    """Takes part in rounds. send: to the control process; on_step sees every optimizer step, on_version every switch of
    the active version (version, round; -1: none).

    report: the held-out rows that quality is measured on; those that judge candidates are a job's. base_name: of the
    base model, for adapter_config.json. engine_step: the number of the engine's present step. half_steps: an average
    that is no better is judged at half of the way as well.
    """

    topology: Topology
    trainer: ShadowTrainer
    report: Heldout
    slots: SlotTable
    masters: Masters
    base_name: str
    send: Callable[[Up], None]
    job_switch: JobSwitch
    on_step: Callable[[RoundPlan, StepResult], None]
    on_version: Callable[[int, int], None]
    engine_step: Callable[[], int]
    orders: RoundOrders | None = None
    micro_batch: int = 1
    """Samples per forward; the coordinator may change it within a round."""
    half_steps: bool = True
    _snapshot: dict[str, Any] | None = None
    _buffer: torch.Tensor | None = None
    _averaging: bool = False
    _stepping: bool = False
    _held: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._held = self.slots.held

    def take_part(self, orders: RoundOrders) -> Slices[None]:
        """One round: local steps, average, vote, promote. discard(), called from outside, ends it early."""
        self.orders, plan, self.micro_batch = orders, orders.plan, orders.plan.micro_batch
        # All members, which have just got the plan, make the group while there are steps to do.
        self.topology.combined_group(plan.member_set, orders.group)
        yield WAIT
        job = yield from self.job_switch.switch(plan.job)
        self.masters.begin_from(plan.base_version)
        self._snapshot = self.trainer.snapshot()
        base_loss = yield from job.gate.loss_of(self.slots, plan.base_version)
        result = yield from self._local_steps(orders)
        self.send(StepsDone(result=result))
        while not orders.aggregate:
            yield WAIT
        self._averaging = True
        error = yield from self._average(orders, result)
        candidate, step = (yield from job.gate.loss(SHADOW)), WHOLE
        if self.half_steps:
            bank, base, pool = self.trainer.bank, self._snapshot["shadow"], partial(self._pool, orders)
            candidate, step = yield from judge_half(bank, base, job.gate, candidate, base_loss, pool)
        self._averaging = False
        vote = self._vote(plan, job.gate.tokens, (base_loss, candidate), error, step)
        if vote.finite:
            # First on disk, then the vote: each member can continue from any committed round after a crash.
            job.checkpoints.prepare(self._checkpoint(plan.base_version, plan.round_id))
        while not self._all(job.checkpoints.done()):
            yield WAIT
        self.send(Voted(vote=vote))
        while orders.settle is None:
            yield WAIT
        yield from self._promote(orders.settle, plan.adapter, job, candidate)
        self.orders = self._snapshot = None

    def _local_steps(self, orders: RoundOrders) -> Slices[RoundResult]:
        plan, started = orders.plan, time.monotonic()
        results: list[StepResult] = []
        while sum(r.samples for r in results) < plan.samples and not orders.finish_steps:
            self._stepping = True
            try:
                results.append((yield from self.trainer.step(self.micro_batch, plan.accumulation, plan.lr_scale)))
            except StepCut:
                break
            finally:
                self._stepping = False
            self.on_step(plan, results[-1])
            if not results[-1].finite:
                break
        return sum_up(plan.round_id, self.topology.replica, results, time.monotonic() - started)

    @property
    def round_id(self) -> int | None:
        """The round that this member takes part in."""
        return self.orders.plan.round_id if self.orders is not None else None

    def finish_steps(self, round_id: int) -> bool:
        """The time for local steps of this round is up. Returns whether a step is under way, which is to be cut.

        Otherwise a load that leaves no slack could delay the end of the step for as long as it lasts.
        """
        if self.orders is None or self.round_id != round_id:
            return False
        self.orders.finish_steps = True
        return self._stepping

    def aggregate(self, round_id: int) -> None:
        """All members of this round have finished their steps: average."""
        if self.orders is not None and self.round_id == round_id:
            self.orders.aggregate = True

    def settle(self, order: Settle) -> None:
        """Promote the average of the round under way."""
        if self.orders is not None and self.round_id == order.round_id:
            self.orders.settle = order

    def limit_micro_batch(self, micro_batch: int) -> None:
        """Samples per forward from the next optimizer step on."""
        self.micro_batch = micro_batch

    def _average(self, orders: RoundOrders, result: RoundResult) -> Slices[tuple[float, float] | None]:
        """FedAvg over the members, weighted by samples; leaves the mean in the shadow.

        Returns this member's share of the squares in Vote: the error of averaging A and B apart, and the product of
        their means. None if no member has a weight.
        """
        bank, plan = self.trainer.bank, orders.plan
        mine = bank.shadow.detach().clone()
        group = self.topology.combined_group(plan.member_set, orders.group)
        while not self._all(group.done()):
            yield WAIT
        self._unbroken(group.exception())
        if self._buffer is None:
            self._buffer = mine.new_empty(mine.numel() + 1)
        members = self.topology.group_members(plan.member_set, plan.round_id)
        weight = result.samples if result.finite else 0
        mean = WeightedMean(mine, weight, group.result(), members, self._buffer)
        # Poll collectively: a rank that saw completion first would leave its peers waiting in other collectives.
        while not self._all(mean.done()):
            yield WAIT
        self._unbroken(mean.error)
        average, total = mean.result()
        if total == 0:
            average.fill_(math.nan)
        bank.load_shadow(average)
        if total == 0:
            return None
        deviation_(mine, average, weight / total)
        return (yield from self._product_error(plan, group.result(), average, mine))

    def _product_error(
        self, plan: RoundPlan, group: Group, average: torch.Tensor, deviation: torch.Tensor
    ) -> Slices[tuple[float, float]]:
        """Collective over all members, those without weight included. Shares are equally large on all peers."""
        bank, members = self.trainer.bank, self.topology.group_members(plan.member_set, plan.round_id)
        shares = dict(zip(plan.members, deal(bank.sizes(), len(plan.members)), strict=True))
        # The group is in the order of ranks, which need not be that of the replicas.
        wanted = [shares[self.topology.layout.replica_of(rank)] for rank in members.ranks]
        exchange = Exchange([bank.part(deviation, layers) for layers in wanted], members.index, group, members)
        while not self._all(exchange.done()):
            yield WAIT
        self._unbroken(exchange.error)
        share = ErrorShare(bank, average, exchange.result(), wanted[members.index])
        while share.modules:
            yield Slice(SliceKind.PRODUCT_ERROR, 1, share.modules, share.add)
        return share.result()

    def _pool(self, orders: RoundOrders, values: list[float]) -> Slices[list[float]]:
        """The means of all members' values, the same on all of them. Collective."""
        plan, shadow = orders.plan, self.trainer.bank.shadow
        group = self.topology.combined_group(plan.member_set, orders.group).result()
        members = self.topology.group_members(plan.member_set, plan.round_id)
        mean = WeightedMean(shadow.new_tensor(values), 1, group, members)
        while not self._all(mean.done()):
            yield WAIT
        self._unbroken(mean.error)
        return [float(value) for value in mean.result()[0].tolist()]

    def _unbroken(self, error: BaseException | None) -> None:
        """Raises RoundBroken on all ranks of this replica if one of them saw an error."""
        if not self._all(error is None):
            raise RoundBroken(error or "another rank of this replica saw an error") from error

    def _all(self, flag: bool) -> bool:
        """Whether `flag` is true on all ranks of this replica. Collective."""
        return self.topology.tp_group.all_true(flag)

    def _vote(
        self, plan: RoundPlan, tokens: int, losses: tuple[float, float], error: tuple[float, float] | None, step: float
    ) -> Vote:
        """losses: of the base version and the candidate, summed; error: as _average returns it; step: of judge_half."""
        (active, candidate), (apart, product) = losses, error or (None, None)
        return Vote(
            round_id=plan.round_id,
            replica=self.topology.replica,
            finite=self._all(bool(self.trainer.bank.shadow.isfinite().all())) and math.isfinite(candidate),
            candidate_loss=candidate,
            active_loss=active,
            tokens=tokens,
            error2=apart,
            product2=product,
            outer_step=step,
        )

    def _promote(self, settle: Settle, adapter: str, job: JobState, candidate: float) -> Slices[None]:
        slot = yield from self._slot_for(settle.version)
        self._put(settle.version, slot, self.trainer.bank.shadow_state(), job.checkpoints.shadow)
        self.masters.shadow = settle.version
        if adapter == CLIF:
            self._switch(settle.version, settle.round_id)
        else:
            self.slots.keep({*self.slots.wanted, settle.version})
            self._settled(settle.version, settle.round_id)
        job.gate.remember(settle.version, candidate)
        self.trainer.commit()
        job.checkpoints.committed()
        if settle.publish:
            self.publish(settle)

    def can_publish(self, version: int) -> bool:
        """Whether the weights of a version are here."""
        return version in self.masters

    def publish(self, settle: Settle) -> None:
        """Send a promoted adapter."""
        bank = self.trainer.bank
        published = Published(
            replica=self.topology.replica,
            version=settle.version,
            round_id=settle.round_id,
            config_json=config_json(bank, self.base_name),
            weights=write_weights(bank.whole(self.masters[settle.version].to(bank.shadow.device))),
        )
        self.send(published)

    def _checkpoint(self, version: int, round_id: int) -> Checkpoint:
        return Checkpoint(version, round_id, self.trainer.snapshot(), self.trainer.cursor_state(commit=True))

    def _slot_for(self, version: int) -> Slices[int | None]:
        """A slot without readers, once there is one: running requests keep theirs. None: the version has one."""
        while not self.slots.holds(version):
            slot = self.slots.free_slot()
            if slot is not None:
                return slot
            yield WAIT
        return None

    def _put(self, version: int, slot: int | None, state: State, master: torch.Tensor) -> None:
        if slot is not None:
            self.trainer.bank.fill_slot(slot, state)
            self.slots.load(version, slot)
        self.masters.add(version, master)

    def _switch(self, version: int, round_id: int) -> None:
        self.slots.activate(version)
        self.on_version(version, round_id)
        self._settled(version, round_id)

    def _settled(self, version: int, round_id: int) -> None:
        self.send(Settled(replica=self.topology.replica, round_id=round_id, version=version, step=self.engine_step()))
        self._tell_held()

    def _tell_held(self) -> None:
        self.masters.prune()
        if self.slots.held != self._held:
            self._held = self.slots.held
            self.send(Held(replica=self.topology.replica, versions=self._held))

    def activate(self, version: int) -> None:
        """Answer new requests with a version that is held, or with the base. Raises RuntimeError for another one."""
        if version != self.slots.active:
            self._switch(version, NO_ROUND)

    def keep(self, versions: tuple[int, ...]) -> None:
        """Keep exactly these versions besides the active one. What no request reads makes room at once."""
        self.slots.keep(versions)
        self._tell_held()

    def evaluate(self) -> Slices[None]:
        """Report the held-out loss of the active version.

        Before the load it computes the gate's loss too: the first round needs it, and requests would wait for it then.
        """
        gate = self.job_switch.own.gate
        if gate.num_rows and not gate.known:
            yield from gate.loss_of(self.slots, self.slots.active)
        version = self.slots.active
        loss = yield from self.report.loss_of(self.slots, version)
        result = HeldoutLoss(replica=self.topology.replica, version=version, loss=loss, tokens=self.report.tokens)
        self.send(Evaluated(result=result))

    def discard(self) -> None:
        """End the round without a promotion: the shadow is restored, and the active version stays active."""
        if self.orders is None:
            return
        if self._averaging:
            # A collective may be pending in the group, and may still write to the buffer.
            self.topology.retire_group(self.orders.plan.member_set)
            self._averaging, self._buffer = False, None
        if self._snapshot is not None:
            self.trainer.rollback(self._snapshot)
        round_id, self.orders, self._snapshot = self.orders.plan.round_id, None, None
        self.send(
            Settled(
                replica=self.topology.replica, round_id=round_id, version=self.slots.active, step=self.engine_step()
            )
        )

    def install(self, message: Install) -> Slices[None]:
        """Take in a version of other replicas. Raises AdapterError if it does not fit.

        One that becomes active is what the shadow continues from.
        """
        yield WAIT
        version, active = message.version, message.activate and message.adapter == CLIF
        if not message.activate and version not in self.slots.wanted:
            # A Keep that came since leaves it out.
            return
        flat = self.trainer.bank.flat(read_weights(self.trainer.bank, message.weights))
        if active:
            self.trainer.bank.load_shadow(flat)
            self.masters.shadow = version
        slot = yield from self._slot_for(version)
        if not active and version not in self.slots.wanted:
            return
        self._put(version, slot, self.trainer.bank.state(flat), flat)
        if active:
            self._switch(version, message.round_id)
        else:
            self._tell_held()
        if active and self.job_switch.current == OWN:
            # Otherwise the moments are another job's; those on disk are of the last round of the run's own data.
            self.job_switch.own.checkpoints.installed(self._checkpoint(version, message.round_id))


def sum_up(round_id: int, replica: int, steps: list[StepResult], seconds: float) -> RoundResult:
    """The result of a member's optimizer steps of one round."""
    done = [s for s in steps if s.finite]
    targets = sum(s.targets for s in done)
    return RoundResult(
        round_id=round_id,
        replica=replica,
        samples=sum(s.samples for s in done),
        tokens=sum(s.tokens for s in done),
        targets=targets,
        steps=len(done),
        loss=sum(s.loss * s.targets for s in done) / targets if targets else math.nan,
        finite=bool(steps) and len(done) == len(steps),
        noise_scale=steps[-1].noise_scale if steps else None,
        seconds=seconds,
    )
