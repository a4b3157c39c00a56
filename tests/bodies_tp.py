"""What the ranks of one replica do in the tests of tensor parallelism. Importable by name."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, answer, layer_shards, random_state, request, small_config, stack_logits
from huggingface_hub import constants

from clif.adapters.peft_io import read_weights, write_weights
from clif.distributed.collectives import Group, PeersLost, TpGroup, WeightedMean
from clif.distributed.topology import Topology
from clif.engine.engine import Engine
from clif.engine.jobs import Job
from clif.engine.step_plan import NO_TRAINING, StepMessage, decode_step, encode_step
from clif.models.shard import shard_of
from clif.models.weights.loading import load_model
from clif.training.trainer import ShadowTrainer
from clif.types import TokenEvent, TrainSample

SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 40 + 2 * i)), target_start=12) for i in range(3)]


def add_biases(model: Any, tp_group: TpGroup | None = None) -> None:
    """Biases that are not zero; with peers, this rank's parts of them."""
    tp_group, rng = tp_group or TpGroup(), torch.Generator().manual_seed(9)
    shards = layer_shards(model.config, tp_group.rank, tp_group.size)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            shard_dim, shard = shards[name.rpartition(".")[2]]
            whole = torch.randn(shard.total if shard_dim == "out" else module.out_features, generator=rng) * 0.1
            module.bias.data.copy_(shard_of(whole, shard_dim, shard) if shard_dim == "out" else whole)


def shared_rig(topology: Topology, model: str, coserving: str = "interleaved", **engine: Any) -> Rig:
    """This rank's part of a model, with a random shadow that learns."""
    kinds = {"coserving": coserving, **engine}
    config = small_config(model, engine=kinds, device=topology.device.type, model={"max_context": 200})
    loaded, rank = load_model(config.model, topology.device, 3, topology.tp_group), topology.tp_group.rank
    if model.startswith("random:"):
        add_biases(loaded.model, topology.tp_group)
    rig = Rig(config, loaded, Engine.from_config(config, loaded, topology.tp_group))
    # Ranks whose clocks differ: only the leader's may decide.
    rig.engine.clock = lambda: 1e9 * rank
    rig.bank.set_shadow(random_state(rig.bank, 5))
    return rig


def shared_step(rig: Rig) -> list[TokenEvent]:
    """One step on all ranks of a replica, by the leader's plan."""
    engine, group = rig.engine, rig.engine.tp_group
    leads = group.rank == 0
    plan = engine.plan() if leads else NO_TRAINING
    shared = decode_step(group.broadcast_bytes(encode_step(StepMessage(step=plan)) if leads else None))
    if group.size > 1 and not leads:
        engine.follow(shared.step)
    return engine.step(shared.step)


def serve_and_train(
    topology: Topology, model: str, coserving: str, kernel: str = "torch", max_tokens: int = 9, overlap: bool = False
) -> dict[str, Any]:
    """Logits, the answers of requests of two versions with a training step between, gradient and shadow."""
    rig = shared_rig(topology, model, coserving, lora_kernel=kernel, overlap=overlap)
    rig.fill(1, seed=4)
    logits = stack_logits(rig.runner.stack, torch.arange(3, 30, device=topology.device), 0)
    config = rig.config.train.model_copy(update={"enabled": True, "clip_norm": 0.5, "lr": 0.01})
    trainer = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, config)
    results: list[Any] = []

    def step() -> Any:
        results.append((yield from trainer.step(2, 2)))

    rig.engine.jobs.append(Job("step", step()))
    requests = [request(i, [3 + i, 9, 20 + i] * (i + 1), max_tokens=max_tokens, ignore_eos=True) for i in range(3)]
    requests.append(request(3, [5, 6], max_tokens=max_tokens, ignore_eos=True, temperature=0.8, seed=11))
    for one in requests[:2]:
        rig.engine.scheduler.add(one, 0.0)
    events: dict[int, list[Any]] = {one.id: [] for one in requests}
    steps = 0
    while rig.engine.serving or rig.engine.jobs:
        for event in shared_step(rig):
            events[event.request_id].append(event)
        steps += 1
        if steps == 3:
            rig.fill(2, seed=6)
            for one in requests[2:]:
                rig.engine.scheduler.add(one, 0.0)
    return {
        "logits": logits.cpu(),
        "answers": {i: answer(found) for i, found in events.items()},
        "versions": {i: {e.version for e in found} for i, found in events.items()},
        "gradient": {name: t.cpu() for name, t in rig.bank.whole(rig.bank.gradient).items()},
        "shadow": {name: t.cpu() for name, t in rig.bank.whole(rig.bank.shadow.data).items()},
        "step": results[0],
        "steps": steps,
    }


def collectives_of_steps(topology: Topology, model: str, coserving: str) -> dict[str, Any]:
    """Collectives of each step by group, while requests are answered and a training step is taken beside them."""
    rig = shared_rig(topology, model, coserving)
    group, calls = rig.engine.tp_group, Counter[str]()
    names = {id(group._control): "control", id(group._group): "model"}

    def counting(name: str) -> Any:
        original = getattr(Group, name)

        def called(self: Group, *arguments: Any) -> Any:
            calls[names[id(self)]] += 1
            return original(self, *arguments)

        return called

    config = rig.config.train.model_copy(update={"enabled": True})
    trainer, found = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, config), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("allreduce", "broadcast"):
            patch.setattr(Group, name, counting(name))
        for drawn in ({}, {"temperature": 1.0, "seed": 3}):
            rig.engine.scheduler.add(request(len(drawn), [5, 6], max_tokens=30, ignore_eos=True, **drawn), 0.0)
            for trains in (False, True):
                if trains:
                    rig.engine.jobs.append(Job("step", trainer.step(2, 1)))
                for _ in range(6):
                    calls.clear()
                    shared_step(rig)
                    record = rig.engine.record
                    found.append((bool(drawn), record.train_kind, record.gap_s > 0, dict(calls)))
    return {"layers": rig.runner.stack.num_layers, "steps": found}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often this rank calls each collective of TpGroup that others are made of."""
    calls: Counter[str] = Counter()
    originals = {
        name: getattr(TpGroup, name)
        for name in ("all_reduce_", "broadcast_", "broadcast_ints", "broadcast_bytes", "all_true")
    }

    def counting(name: str) -> Any:
        def called(self: TpGroup, *arguments: Any) -> Any:
            calls[name] += 1
            return originals[name](self, *arguments)

        return called

    for name in originals:
        setattr(TpGroup, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(TpGroup, name, original)


def list_slices(work: Any, calls: Counter[str]) -> dict[str, dict[str, int]]:
    """Do a job from beginning to end; what each kind of its slices adds to `calls`."""
    kinds: dict[str, Counter[str]] = {}
    result = None
    while True:
        try:
            piece = work.send(result)
        except StopIteration:
            return {kind: dict(found) for kind, found in kinds.items()}
        before = calls.copy()
        result = piece.work(piece.units)
        kinds.setdefault(piece.kind, Counter()).update(calls - before)


def round_trip(topology: Topology, model: str) -> dict[str, Any]:
    """Export the shadow as PEFT does, change it, import it again; and memory that this rank holds in linear layers."""
    rig = shared_rig(topology, model)
    before = rig.bank.shadow.detach().clone()
    weights = write_weights(rig.bank.whole(rig.bank.shadow.data))
    rig.bank.set_shadow(random_state(rig.bank, 1))
    rig.bank.set_shadow(read_weights(rig.bank, weights))
    held = sum(linear.base.shape.numel() for linear in rig.runner.stack.linears)
    same = torch.equal(before, rig.bank.shadow.data)
    return {"weights": weights, "same": same, "held": held, "kv": rig.runner.cache.bytes}


def assert_equal(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """What serve_and_train finds on a rank of several is what one rank alone finds."""
    assert found["answers"] == alone["answers"] and found["versions"] == alone["versions"]
    assert (found["logits"] - alone["logits"]).abs().max() <= 1e-4 * alone["logits"].abs().max()
    for what, allowed in (("gradient", 1e-5), ("shadow", 1e-4)):
        for name, expected in alone[what].items():
            difference = (found[what][name] - expected).norm()
            assert difference <= allowed * expected.norm() + 1e-9, f"{what} of {name}"
    for what in ("loss", "grad_norm"):
        expected = getattr(alone["step"], what)
        assert abs(getattr(found["step"], what) - expected) <= 1e-5 * abs(expected), what


def agreements(topology: Topology) -> dict[str, Any]:
    """What peers tell each other."""
    tp_group, device = topology.tp_group, topology.device
    rank = tp_group.rank
    return {
        "sum": tp_group.all_reduce_(torch.tensor([1.0 + rank], device=device)).tolist(),
        "leader": tp_group.broadcast_ints([rank * 7 + 1, -2]),
        "every": (tp_group.all_true(True), tp_group.all_true(rank != 1)),
        "least": tp_group.least(abs(10 * rank - 10) + 3),
        "gather": [t.tolist() for t in tp_group.all_gather(torch.tensor([rank], device=device))],
        "ranks": (rank, tp_group.size),
    }


def sliced_loading(topology: Topology, model: str) -> dict[str, Any]:
    """What serve_and_train finds, and how many numbers of linear layers this rank has read."""
    from clif.models.weights import safetensors_shard as sliced

    read, original = [0], sliced._read

    def counted(*arguments: Any) -> torch.Tensor:
        tensor = original(*arguments)
        read[0] += tensor.numel() if "_proj" in arguments[1] or "lm_head" in arguments[1] else 0
        return tensor

    sliced._read = counted
    try:
        return {"read": read, **serve_and_train(topology, model, "interleaved")}
    finally:
        sliced._read = original


def hub_cache(home: Path, name: str) -> Path:
    """The folder of a model's snapshot under HF_HOME, laid out as the hub does."""
    place, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def hub_loading(topology: Topology, home: str, name: str) -> dict[str, Any]:
    """As sliced_loading, of a name in the hub's cache under `home`."""
    # This process has read the environment already.
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(Path(home) / "hub"), True
    return sliced_loading(topology, name)


def hang(topology: Topology) -> str:
    """Until two others have told what became of them."""
    while topology.store.add("reported", 0) < 2:
        time.sleep(0.05)
    return "hung"


def reported(topology: Topology, text: str) -> str:
    topology.store.add("reported", 1)
    return text


def a_peer_that_hangs(topology: Topology) -> str:
    """Rank 1 of three does not come to a sum, nor its replica to an average: what the others are told."""
    if topology.env.rank == 1:
        return hang(topology)
    try:
        topology.tp_group.all_reduce_(torch.ones(3))
    except PeersLost as error:
        return reported(topology, str(error))
    return reported(topology, "nothing")


def a_member_that_hangs(topology: Topology) -> str:
    """Replica 1 has joined a round's group and does not come to its all-reduce."""
    members = ((0, 1, 2), (0, 0, 0))
    group = topology.combined_group(members, 7).result()
    if topology.env.rank == 1:
        return hang(topology)
    mean = WeightedMean(torch.ones(3), 1, group, topology.group_members(members, 7))
    while not mean.done():
        time.sleep(0.01)
    return reported(topology, str(mean.error))


def families(topology: Topology, folders: list[str]) -> dict[str, dict[str, Any]]:
    """What these ranks compute with a model of each family."""
    return {folder: serve_and_train(topology, f"random:{folder}", "interleaved", max_tokens=4) for folder in folders}
