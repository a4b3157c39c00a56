"""What ranks do in the distributed tests. Importable by name, as processes of their own need it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from helpers import answer, request
from helpers import finish as finish_slices

from clif.config import Config, config_from_tree
from clif.distributed.collectives import Group, WeightedMean
from clif.distributed.topology import Topology
from clif.engine.base import build_base
from clif.models.weights.loading import load_model
from clif.replica.build import build_replica, load_data
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.types import RoundPlan, TokenEvent
from clif.wire import messages as m

CPU = torch.device("cpu")


def finish(mean: WeightedMean) -> list[float]:
    """The mean and the sum of weights."""
    while not mean.done():
        time.sleep(0.001)
    average, total = mean.result()
    return [*average.tolist(), total]


def group_of(topology: Topology, members: tuple[int, ...], number: int) -> Group:
    """The group of replicas that were never rebuilt."""
    return topology.combined_group((members, (0,) * len(members)), number).result()


def mean_over_members(topology: Topology, members: tuple[int, ...], nan_member: int | None) -> list[float] | None:
    """Members average rank + 1 with weight rank + 1; non-members do nothing at all."""
    if topology.replica not in members:
        return None
    group = group_of(topology, members, 1)
    assert group_of(topology, members, 1) is group, "made once"
    value = float("nan") if topology.replica == nan_member else float(topology.replica + 1)
    weight = 0 if topology.replica == nan_member else topology.replica + 1
    return finish(WeightedMean(torch.full((5,), value, device=topology.device), weight, group))


def tensor_parallel_groups(topology: Topology) -> tuple[list[int], list[float]]:
    """With two ranks per replica: the leader's rank, and the mean rank over all replicas' same shard."""
    rank = [topology.env.rank]
    within = topology.tp_group.broadcast_bytes(bytes(rank) if topology.is_leader else None)
    return list(within), finish(WeightedMean(torch.tensor(rank).float(), 1, group_of(topology, (0, 1), 1)))


def two_sets_at_once(topology: Topology) -> list[float]:
    """Disjoint member sets average at the same time."""
    members = (0, 2) if topology.replica in (0, 2) else (1, 3)
    return mean_over_members(topology, members, None)  # type: ignore[return-value]


def absent_everywhere(topology: Topology) -> float:
    return finish(WeightedMean(torch.full((3,), float("inf")), 0, group_of(topology, (0, 1), 1)))[-1]


def overlapping_sets(topology: Topology) -> list[list[float] | None]:
    """One round after the other; replicas have taken part in different numbers of rounds when they meet."""
    return [mean_over_members(topology, members, None) for members in ((0, 1), (1, 2), (0, 2), (0, 1, 2))]


def given_up_all_reduce(topology: Topology) -> list[float]:
    """Replica 0 has begun an all-reduce that replica 1 never joins; the round is discarded; the next one is right."""
    members, one = (0, 1), torch.ones(4)
    old = group_of(topology, members, 1)
    pending = WeightedMean(one * 1000, 1, old) if topology.replica == 0 else None
    topology.retire_group((members, (0, 0)))
    mean = finish(WeightedMean(one * topology.replica, 1, group_of(topology, members, 2)))
    if pending is not None:
        while not pending.done():
            time.sleep(0.001)
        assert pending.error is not None, "what was given up ends without a sum once the others close the group as well"
    return mean


def messages_of(sizes: list[int]) -> list[bytes]:
    """Messages of these sizes, of which no two bytes at like places are equal for long."""
    return [bytes((7 * i + size) % 251 for i in range(size)) for size in sizes]


def leader_speaks(topology: Topology, sizes: list[int]) -> list[bytes]:
    """Messages of these sizes, as this rank gets them from the leader."""
    group = topology.tp_group
    return [group.broadcast_bytes(message if topology.is_leader else None) for message in messages_of(sizes)]


class Driver:
    """A replica without a control process: the test gives the orders and reads what the replica says."""

    replica: Replica

    def __init__(self, topology: Topology, model: str, data: str | None, run_dir: str, **sections: Any) -> None:
        tree = {
            "model": {"path": model, "dtype": "float32", "max_context": 200, "device": topology.device.type},
            "engine": {"kv_tokens": 1024, "max_batch": 8},
            "data": {"path": data},
            "train": {"lr": 0.02, "micro_batch": 4, "warmup_steps": 0},
            **sections,
        }
        self.topology, self.folder, self.said = topology, Path(run_dir), []
        self.config = config_from_tree(tree)
        self.send: Callable[[m.Up], None] = self.said.append
        self.loaded = load_model(self.config.model, topology.device, seed=3)
        self.base = build_base(self.config, self.loaded, topology.tp_group)
        self._rows = load_data(self.config, self.loaded.tokenizer, topology.replica, len(topology.layout.replicas))
        self._records = RankRecords(self.folder, topology.env.rank, self.config.metrics, {})
        self.start()

    def start(self) -> None:
        self.replica = self.build(self.config)

    def build(self, config: Config, steps: int = 0) -> Replica:
        return build_replica(config, self.topology, self.base, self._rows, self.folder, self._records, self.send, steps)

    def step(self, *orders: m.Down) -> None:
        payloads = [msgspec.msgpack.encode(order) for order in orders]
        self.replica.step(payloads if self.topology.is_leader else None)

    def until(self, done: Callable[[], bool], limit_s: float = 40.0) -> None:
        end = time.monotonic() + limit_s
        while not done():
            assert time.monotonic() < end, f"nothing came of it; said {[type(x).__name__ for x in self.said[-5:]]}"
            self.step()

    def last(self, kind: type) -> Any:
        found = [x for x in self.said if isinstance(x, kind)]
        return found[-1] if found else None

    def wait_for(self, kind: type) -> Any:
        self.until(lambda: self.last(kind) is not None)
        return self.last(kind)

    def events(self, request_id: int) -> list[TokenEvent]:
        return [e for x in self.said if isinstance(x, m.Tokens) for e in x.events if e.request_id == request_id]

    def begin(
        self, members: tuple[int, ...], steps: int, round_id: int = 1, group: int = 1, base_version: int = 0
    ) -> None:
        plan = RoundPlan(
            round_id=round_id,
            members=members,
            incarnations=self.incarnations(members),
            local_steps=steps,
            micro_batch=4,
            accumulation=1,
            base_version=base_version,
        )
        self.step(m.BeginRound(plan=plan, group=group))

    def incarnations(self, members: tuple[int, ...]) -> tuple[int, ...]:
        return (0,) * len(members)


def serve_alone(driver: Driver, id: int) -> list[int]:
    driver.step(m.Submit(request=request(id, [5, 6, 7], max_tokens=12, ignore_eos=True)))
    driver.until(lambda: bool(driver.events(id)) and driver.events(id)[-1].finish is not None)
    return answer(driver.events(id))


def whole_round(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Replicas 0 and 1 do a round under a long request; replica 2 only serves and gets the adapter by message."""
    driver = Driver(topology, model, data, run_dir)
    before = serve_alone(driver, 1)
    driver.step(m.Submit(request=request(2, [9, 8], max_tokens=150, ignore_eos=True)))
    store = topology.store
    if topology.replica < 2:
        driver.begin((0, 1), steps=6)
        result = driver.wait_for(m.StepsDone).result
        driver.step(m.Aggregate(round_id=1))
        vote = driver.wait_for(m.Voted).vote
        driver.step(m.Settle(round_id=1, commit=True, version=1, publish=topology.replica == 0))
        if topology.replica == 0:
            store.set("weights", driver.wait_for(m.Published).weights)
    else:
        result = vote = None
        driver.step(m.Install(version=1, weights=store.get("weights")))
    settled = driver.wait_for(m.Settled)
    driver.until(lambda: driver.events(2)[-1].finish is not None)
    after = serve_alone(driver, 3)
    driver.replica.close()
    return {
        "before": before,
        "after": after,
        "long": {e.version for e in driver.events(2)},
        "result": result,
        "vote": vote,
        "settled": settled.version,
        "step": settled.step,
        "shadow": driver.replica.member.trainer.bank.shadow.detach().clone(),
        "committed": driver.replica.member.trainer.cursor_state()["committed"],
    }


def whole_adapter_of_a_round(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, torch.Tensor]:
    """The average of two members' first steps, gathered from their ranks."""
    Path(run_dir).mkdir(exist_ok=True)
    driver = Driver(topology, model, data, run_dir)
    driver.begin((0, 1), steps=3)
    driver.wait_for(m.StepsDone)
    driver.step(m.Aggregate(round_id=1))
    driver.wait_for(m.Voted)
    bank = driver.replica.member.trainer.bank
    return bank.whole(bank.shadow.detach())


def round_of_unequal_members(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Three members that take 1, 2 and 3 steps: the adapter that each averages, with its weight, and its vote."""
    driver = Driver(topology, model, data, run_dir)
    bank = driver.replica.member.trainer.bank
    driver.begin((0, 1, 2), steps=topology.replica + 1)
    result = driver.wait_for(m.StepsDone).result
    mine = bank.whole(bank.shadow.detach().clone())
    driver.step(m.Aggregate(round_id=1))
    vote = driver.wait_for(m.Voted).vote
    return {"samples": result.samples, "mine": mine, "vote": vote, "leads": topology.is_leader}


def gate_and_report(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """What a member votes on and what it reports, beside the losses of its own two parts."""
    driver = Driver(topology, model, data, run_dir)
    member = driver.replica.member
    driver.step(m.Evaluate())
    evaluated = driver.wait_for(m.Evaluated).result
    driver.begin((0,), steps=1)
    driver.wait_for(m.StepsDone)
    driver.step(m.Aggregate(round_id=1))
    vote = driver.wait_for(m.Voted).vote
    parts = {
        name: finish_slices(part.loss(None))
        for name, part in (("gate", member.job_switch.own.gate), ("report", member.report))
    }
    return {"vote": vote.active_loss, "reported": evaluated.loss, **parts}


def round_with_a_broken_member(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Replica 1's shadow turns NaN during its steps; the average must not."""
    driver = Driver(topology, model, data, run_dir)
    bank = driver.replica.member.trainer.bank
    driver.begin((0, 1), steps=3)
    if topology.replica == 1:
        bank.shadow.data[5] = float("nan")
        bank.refresh()
    result = driver.wait_for(m.StepsDone).result
    mine = bank.shadow.detach().clone()
    driver.step(m.Aggregate(round_id=1))
    vote = driver.wait_for(m.Voted).vote
    average = bank.shadow.detach().clone()
    driver.step(m.Settle(round_id=1, commit=False, version=0))
    driver.wait_for(m.Settled)
    return {"result": result, "mine": mine, "average": average, "vote": vote, "after": bank.shadow.detach().clone()}


def discard_in_the_middle(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """The round is called off between two slices of a backward; the next round works as if nothing had been."""
    driver = Driver(topology, model, data, run_dir)
    member = driver.replica.member
    before = member.trainer.bank.shadow.detach().clone()
    driver.begin((0,), steps=50)
    driver.until(lambda: member.trainer.steps == 3)
    driver.until(lambda: driver.replica.engine.jobs[0].upcoming.kind == "backward")
    driver.step(m.Settle(round_id=1, commit=False, version=0))
    settled = driver.wait_for(m.Settled)
    undone = torch.equal(before, member.trainer.bank.shadow.data) and member.trainer.cursor_state()["committed"] == 0
    driver.begin((0,), steps=2, round_id=2)
    result = driver.wait_for(m.StepsDone).result
    return {"settled": settled.version, "undone": undone, "result": result}


def broken_round(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """An error in the third optimizer step, while a request is being answered."""
    driver = Driver(topology, model, data, run_dir)
    trainer = driver.replica.member.trainer
    before = trainer.bank.shadow.detach().clone()
    original = trainer.runner.loss_and_gradients

    def fail_later(samples: Any, divisor: float) -> Any:
        if trainer.steps == 2:
            raise RuntimeError("out of memory")
        return original(samples, divisor)

    trainer.runner.loss_and_gradients = fail_later  # type: ignore[method-assign]
    driver.step(m.Submit(request=request(2, [9, 8], max_tokens=150, ignore_eos=True)))
    driver.begin((0,), steps=50)
    failed = driver.wait_for(m.RoundFailed)
    driver.step(m.Settle(round_id=1, commit=False, version=0))
    driver.wait_for(m.Settled)
    driver.until(lambda: driver.events(2)[-1].finish is not None)
    undone = torch.equal(before, trainer.bank.shadow.data) and trainer.cursor_state()["committed"] == 0
    return {"error": failed.error, "undone": undone, "finish": driver.events(2)[-1].finish.value}


def steps_cut_in_the_middle(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """The time is up while the fourth step's backward waits for slack; the round goes on with three steps."""
    driver = Driver(topology, model, data, run_dir)
    member = driver.replica.member
    driver.begin((0,), steps=50)
    driver.until(lambda: member.trainer.steps == 3)
    driver.until(lambda: driver.replica.engine.jobs[0].upcoming.kind == "backward")
    driver.step(m.FinishSteps(round_id=1))
    result = driver.last(m.StepsDone).result
    driver.step(m.Aggregate(round_id=1))
    driver.wait_for(m.Voted)
    driver.step(m.Settle(round_id=1, commit=True, version=1))
    driver.wait_for(m.Settled)
    cursor = member.trainer.cursor_state()
    return {"samples": result.samples, "steps": result.steps, "cursor": cursor}


def smaller_batches(topology: Topology, model: str, data: str, run_dir: str) -> tuple[int, int]:
    """The coordinator halves the micro-batch at the beginning of a round."""
    driver = Driver(topology, model, data, run_dir)
    driver.begin((0,), steps=6)
    driver.step(m.Limits(max_batch=8, micro_batch=2))
    result = driver.wait_for(m.StepsDone).result
    return result.samples, result.steps
