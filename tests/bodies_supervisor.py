"""What a replica goes through in the tests of its supervisor. Importable by name."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import msgspec
import torch
from bodies import Driver
from helpers import answer, request

from clif.adapters.store import AdapterStore
from clif.distributed.topology import Topology
from clif.rank.supervisor import ReplicaSupervisor
from clif.replica.replica import Replica
from clif.types import AdapterVersion
from clif.wire import messages as m


class Alive(Driver):
    """A replica with its incarnations, as the worker runs it; the test is the control process."""

    def __init__(self, topology: Topology, model: str, data: str, run_dir: str, rebuilds: int = 3) -> None:
        self._rebuilds, self.built = rebuilds, list[int]()
        run = {"out_dir": str(Path(run_dir).parent), "name": Path(run_dir).name}
        super().__init__(topology, model, data, run_dir, run=run)

    def start(self) -> None:
        if not self.topology.is_leader:
            self.send = lambda _: None
        self.supervisor = ReplicaSupervisor(
            self.topology, self._build, self.send, self._rebuilds, lambda _, incarnation: self.built.append(incarnation)
        )

    def _build(self, incarnation: int, steps: int) -> Replica:
        if not incarnation:
            return self.build(self.config, steps)
        self.base.renew(self.config.run.seed)
        resumed = self.config.run.model_copy(update={"resume": True})
        return self.build(self.config.model_copy(update={"run": resumed}), steps)

    @property
    def replica(self) -> Replica:
        return self.supervisor.replica

    def step(self, *orders: m.Down) -> None:
        leads = self.topology.is_leader
        self.supervisor.step([msgspec.msgpack.encode(order) for order in orders] if leads else None)

    def tokens(self, request_id: int) -> list[int]:
        return answer(self.events(request_id))

    def incarnations(self, members: tuple[int, ...]) -> tuple[int, ...]:
        return (self.supervisor.incarnation,) * len(members)

    def commit(self, round_id: int, version: int) -> None:
        """A whole round of this replica alone, stored as the control process would."""
        self.said.clear()
        self.begin((0,), steps=3, round_id=round_id, group=round_id, base_version=version - 1)
        self.wait_for(m.StepsDone)
        self.step(m.Aggregate(round_id=round_id))
        self.wait_for(m.Voted)
        self.step(m.Settle(round_id=round_id, commit=True, version=version, publish=True))
        published = self.wait_for(m.Published)
        stored = AdapterVersion(number=version, round_id=round_id, heldout_loss=1.0)
        AdapterStore(self.folder).write(stored, published.config_json, published.weights)
        self.wait_for(m.Settled)


def fail(*_: Any) -> Any:
    raise torch.OutOfMemoryError("injected")


def answer_of(alive: Alive, id: int) -> list[int]:
    """Of one request, alone. Every rank of the replica goes through the same steps."""
    alive.step(m.Submit(request=request(id, [5, 6, 7], max_tokens=12, ignore_eos=True)))
    for _ in range(20):
        alive.step()
    return alive.tokens(id)


def fail_in_a_round(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """A committed round, half of another one, an error in serving, and the life after it."""
    alive = Alive(topology, model, data, run_dir)
    alive.commit(1, version=1)
    trainer = alive.replica.member.trainer
    before = (trainer.bank.shadow.detach().clone(), trainer.steps, trainer.cursor_state()["committed"])
    known = answer_of(alive, 1)
    alive.begin((0,), steps=50, round_id=2, group=2, base_version=1)
    alive.until(lambda: trainer.steps > 4)
    cache = weakref.ref(alive.replica.engine.runner.cache)
    steps, heard = alive.replica.steps, len(alive.said)
    alive.replica.engine.runner.forward = fail  # type: ignore[method-assign]
    alive.step(m.Submit(request=request(2, [9, 8], max_tokens=5)))
    trouble = alive.said[heard]
    del trainer
    gc.collect()
    freed = cache() is None
    alive.step(m.Submit(request=request(3, [9, 8], max_tokens=5)), m.Aggregate(round_id=2))
    early = alive.tokens(3)
    alive.step(m.Submit(request=request(4, [9, 8], max_tokens=5)), m.Welcome(incarnation=1))
    trainer = alive.replica.member.trainer
    after = (trainer.bank.shadow.detach().clone(), trainer.steps, trainer.cursor_state()["committed"])
    again = answer_of(alive, 5)
    dropped = early + alive.tokens(2) + alive.tokens(4)
    alive.commit(3, version=2)
    return {
        "trouble": trouble,
        "freed": freed,
        "dropped": dropped,
        "built": alive.built,
        "same": torch.equal(before[0], after[0]) and before[1:] == after[1:],
        "answers": (known, again),
        "version": alive.replica.engine.scheduler.slots.active,
        "steps": alive.replica.steps - steps,
    }


def fail_too_often(topology: Topology, model: str, data: str, run_dir: str) -> tuple[list[int], str]:
    """An error in each life."""
    alive = Alive(topology, model, data, run_dir, rebuilds=2)
    try:
        for incarnation in range(1, 5):
            alive.replica.engine.runner.forward = fail  # type: ignore[method-assign]
            alive.step(m.Submit(request=request(incarnation, [9, 8], max_tokens=5)))
            alive.step(m.Welcome(incarnation=incarnation))
    except torch.OutOfMemoryError as error:
        return alive.built, str(error)
    return alive.built, ""


def damaged_weights(topology: Topology, model: str, data: str, run_dir: str) -> str:
    """The error that brought a life to its end has damaged what all lives share."""
    alive = Alive(topology, model, data, run_dir)
    alive.base.stack.linears[0].base.tensors[0][:4] *= 2
    try:
        alive.step(m.Rebuild(reason="test"))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def one_of_two_ranks_fails(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Rank 1 meets an error in the middle of a step; the leader waits for it in a sum."""
    Path(run_dir).mkdir(exist_ok=True)
    alive = Alive(topology, model, data, run_dir)
    known = answer_of(alive, 1)
    if topology.env.rank == 1:
        alive.replica.engine.runner.forward = fail  # type: ignore[method-assign]
    alive.step(m.Submit(request=request(2, [9, 8], max_tokens=5)))
    alive.step(m.Welcome(incarnation=1))
    again = answer_of(alive, 3)
    return {"known": known, "again": again, "built": alive.built, "trouble": alive.last(m.Trouble)}


def a_member_that_never_comes(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Replica 1 is in the plan of a round but does not make its group; replica 0 has requests to answer."""
    if topology.replica == 1:
        topology.store.get("clif/test/over")
        return {}
    alive = Alive(topology, model, data, run_dir)
    alive.begin((0, 1), steps=2)
    alive.wait_for(m.StepsDone)
    alive.step(m.Aggregate(round_id=1))
    answered = answer_of(alive, 1)
    failed = alive.last(m.RoundFailed)
    alive.step(m.Settle(round_id=1, commit=False, version=0))
    settled = alive.wait_for(m.Settled)
    topology.store.set("clif/test/over", "")
    return {"answered": answered, "failed": failed, "settled": settled.version}
