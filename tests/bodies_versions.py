"""What ranks do in the tests of versions. Importable by name, as processes of their own need it."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from bodies import Driver
from bodies_supervisor import Alive, fail
from helpers import answer, random_state, request

from clif.adapters.peft_io import write_weights
from clif.adapters.store import AdapterStore
from clif.distributed.topology import Topology
from clif.wire import messages as m

SLOTS = {"adapter": {"serving_slots": 4}}


def weights_of(driver: Driver, seed: int) -> bytes:
    """A whole random adapter, the same on every rank."""
    rng = torch.Generator().manual_seed(seed)
    shapes = driver.replica.member.trainer.bank.shapes()
    return write_weights({name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()})


def ask(driver: Driver, id: int, version: int | None, tokens: int = 12) -> m.Submit:
    asked = request(id, [5, 6, 7], max_tokens=tokens, ignore_eos=True)
    return m.Submit(request=msgspec.structs.replace(asked, version=version))


def switch_while_requests_run(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Versions 1 and 2 are installed, 1 is kept by name; the replica goes back to 1 and to the base under requests.

    Answers by request and rows of the table `versions` are the same on every rank of the replica.
    """
    driver = Driver(topology, model, data, run_dir, **SLOTS)
    switched: list[tuple[int, int]] = []
    driver.replica.member.on_version = lambda version, _: switched.append((version, driver.replica.steps))
    driver.step(m.Keep(versions=(1, 3)), m.Install(version=1, weights=weights_of(driver, 1)))
    driver.until(lambda: driver.replica.engine.scheduler.slots.active == 1)
    driver.step(m.Install(version=2, weights=weights_of(driver, 2)))
    driver.step(m.Install(version=3, weights=weights_of(driver, 3), activate=False))
    driver.until(lambda: driver.replica.engine.scheduler.slots.held == (1, 2, 3))
    driver.step(*(ask(driver, i, version) for i, version in enumerate((None, 1, 3, 0, 9))))
    driver.step(m.Activate(version=1), ask(driver, 5, None))
    driver.step(m.Activate(version=0), ask(driver, 6, None))
    ends = lambda: all(driver.events(i) and driver.events(i)[-1].finish is not None for i in range(7))  # noqa: E731
    driver.until(ends)
    driver.step(m.Keep(versions=()))
    slots = driver.replica.engine.scheduler.slots
    return {
        "answers": {i: answer(driver.events(i)) for i in range(7)},
        "versions": {i: sorted({e.version for e in driver.events(i)}) for i in range(7)},
        "failed": driver.events(4)[-1].detail,
        "switched": switched,
        "held": [held.versions for held in driver.said if isinstance(held, m.Held)],
        "settled": [settled.version for settled in driver.said if isinstance(settled, m.Settled)],
        "left": (slots.held, slots.retiring),
    }


def rounds_from_a_plans_base(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Replica 0 makes version 1 and version 2 alone, replica 1 gets them by message. Then both train from 1, from 0."""
    driver = Driver(topology, model, data, run_dir, **SLOTS)
    bank, store, member = driver.replica.member.trainer.bank, topology.store, driver.replica.member
    drawn = bank.shadow.detach().clone()
    driver.step(m.Keep(versions=(1, 2)))
    masters = {0: drawn}
    for version in (1, 2):
        if topology.replica == 0:
            driver.begin((0,), steps=2, round_id=version, group=version, base_version=version - 1)
            driver.wait_for(m.StepsDone)
            driver.step(m.Aggregate(round_id=version))
            driver.wait_for(m.Voted)
            driver.step(m.Settle(round_id=version, commit=True, version=version, publish=True))
            store.set(f"weights {version}", driver.wait_for(m.Published).weights)
        else:
            driver.step(m.Install(version=version, weights=store.get(f"weights {version}"), round_id=version))
        driver.until(lambda v=version: driver.replica.engine.scheduler.slots.active == v)  # type: ignore[misc]
        masters[version] = member.masters[version].clone()
        driver.said.clear()
    begun = {}
    for round_id, base in ((3, 1), (4, 0), (5, 2)):
        if base != 2:
            driver.step(m.Activate(version=base))
        driver.begin((0, 1), steps=1, round_id=round_id, group=3, base_version=base)
        driver.wait_for(m.StepsDone)
        begun[base] = member._snapshot["shadow"].clone()  # type: ignore[index]
        driver.step(m.Settle(round_id=round_id, commit=False, version=base))
        driver.until(lambda: member.orders is None)
        driver.said.clear()
    return {"masters": masters, "begun": begun, "active": driver.replica.engine.scheduler.slots.active}


def round_from_a_version_that_is_not_held(topology: Topology, model: str, data: str, run_dir: str) -> list[str]:
    """It fails, and the replica goes on."""
    driver = Driver(topology, model, data, run_dir, **SLOTS)
    driver.begin((0,), steps=1, base_version=7)
    failed = driver.wait_for(m.RoundFailed)
    driver.step(m.Settle(round_id=1, commit=False, version=0), ask(driver, 1, None, 3))
    driver.until(lambda: bool(driver.events(1)) and driver.events(1)[-1].finish is not None)
    return [failed.error, driver.events(1)[-1].finish.value]  # type: ignore[union-attr]


def second_publisher(topology: Topology, model: str, data: str, run_dir: str) -> bool:
    """It sends the promoted version though its shadow is another one by now."""
    driver = Driver(topology, model, data, run_dir, **SLOTS)
    driver.begin((0,), steps=2)
    driver.wait_for(m.StepsDone)
    driver.step(m.Aggregate(round_id=1))
    driver.wait_for(m.Voted)
    driver.step(m.Settle(round_id=1, commit=True, version=1))
    driver.wait_for(m.Settled)
    bank = driver.replica.member.trainer.bank
    promoted = write_weights(bank.shadow_state())
    bank.set_shadow(random_state(bank, 5))
    driver.step(m.Settle(round_id=1, commit=True, version=1, publish=True))
    return driver.wait_for(m.Published).weights == promoted


def rebuilt_after_going_back(topology: Topology, model: str, data: str, run_dir: str, version: int) -> dict[str, Any]:
    """Two rounds are committed, an operator goes back, and the replica is built anew from what is on disk."""
    alive = Alive(topology, model, data, run_dir)
    masters = {0: alive.replica.member.trainer.bank.shadow.detach().clone()}
    for number in (1, 2):
        alive.commit(number, version=number)
        masters[number] = alive.replica.member.masters[number].clone()
    trainer, store = alive.replica.member.trainer, AdapterStore(alive.folder)
    before = (trainer.steps, trainer.cursor_state()["committed"])
    store.choose(msgspec.structs.replace(store.read(), active={"clif": version}))
    alive.replica.engine.runner.forward = fail  # type: ignore[method-assign]
    alive.step(ask(alive, 2, None))
    alive.step(m.Welcome(incarnation=1))
    trainer, slots = alive.replica.member.trainer, alive.replica.engine.scheduler.slots
    return {
        "built": alive.built,
        "active": slots.active,
        "shadow": torch.equal(trainer.bank.shadow.detach(), masters[version]),
        "same": (trainer.steps, trainer.cursor_state()["committed"]) == before,
    }
