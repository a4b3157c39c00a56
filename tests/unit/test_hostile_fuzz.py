"""Whatever a replica says, in whatever state the run is: the server goes on, and only flawless adapters are stored."""

from __future__ import annotations

import enum
import math
import random
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from control_run import Run, make_config
from scripted_replica import ADAPTER_JSON, SHAPES, ScriptedReplica, adapter_bytes

from clif.adapters.peft_files import describe, weights_flaw
from clif.control.policy.phases import Phase
from clif.states import ReplicaState, RoundState
from clif.types import Purpose, Request, RoundPlan, RoundResult, Sampling, Vote
from clif.wire import messages as wire

PLAUSIBLE = (0, 0, 1, 1, 1, 2, 3, 7)
ODD = (-5, -1, 8, 64, 2**31 - 1, 2**31, 2**40, 2**53, 2**62)
FLOATS = (0.0, 0.5, 1.0, 1.0, 2.0, -1.0, 1e9, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "h", "\x1b[2K\rFAKE", "é" * 600, "{", ADAPTER_JSON, describe(SHAPES))
BYTES = (b"", b"EVIL WEIGHTS", adapter_bytes(), adapter_bytes(math.nan), adapter_bytes()[:-4])


class Babbler:
    """Makes messages of any type, half of them with numbers that a run may have."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.messages = typing.get_args(wire.Up)

    def message(self, replica: int) -> Any:
        made = self.of(self.random.choice(self.messages))
        # Mostly in its own name: else nothing else of it is looked at.
        return made if self.random.random() < 0.05 else in_the_name_of(made, replica)

    def of(self, kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            return self.of(arguments[0])
        if origin in (typing.Union, types.UnionType):
            return self.of(self.random.choice(arguments))
        if origin is tuple:
            some = [arguments[0]] * self.random.choice((0, 1, 3)) if arguments[-1] is ... else arguments
            return tuple(self.of(one) for one in some)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = typing.get_type_hints(kind, include_extras=True)
            return kind(**{name: self.of(hints[name]) for name in kind.__struct_fields__})
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return self.random.choice(list(kind))
        return self.plain(kind)

    def plain(self, kind: Any) -> Any:
        pick = self.random.choice
        if kind is bool:
            return pick((True, False))
        if kind is int:
            return pick(PLAUSIBLE if self.random.random() < 0.9 else ODD)
        share = pick((0.0, 0.5, 1.0)) if self.random.random() < 0.95 else pick(FLOATS)
        return {float: share, str: pick(TEXTS), bytes: pick(BYTES), types.NoneType: None}[kind]


def in_the_name_of(message: Any, replica: int) -> Any:
    if hasattr(message, "replica"):
        return msgspec.structs.replace(message, replica=replica)
    name = "vote" if isinstance(message, wire.Voted) else "result"
    inner = msgspec.structs.replace(getattr(message, name), replica=replica)
    return msgspec.structs.replace(message, **{name: inner})


class Scene:
    """A server with two replicas that are always there, with requests and a round to babble about."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        quiet = {"exact_match_rows": 0}
        self.run = Run(make_config(tmp_path, quality=quiet, load={"duration_s": 1e4, "rate_rps": 0.01}))
        self.server = self.run.server
        monkeypatch.setattr(self.run.channel, "send", lambda replica, message: True)
        self.asked = 0
        while self.server.phase is not Phase.OPEN:
            self.everybody()
            self.server.step()
            for replica in (0, 1):
                # Quality before the load is measured, or given up.
                self.server._ports.quality.on_lost(replica)

    def say(self, replica: int, message: Any) -> None:
        self.server._inbox._take(self.server._clock(), replica, msgspec.msgpack.encode(message))

    def expected(self, replica: int, weights: bytes) -> Any:
        """What a member says in a round as it is now. weights: what it publishes when it is asked to."""
        current = self.server.federation.current
        round_id = current.plan.round_id if current is not None else 0
        version = current.version if current is not None else self.server.federation.newest
        settled = wire.Settled(replica=replica, round_id=round_id, version=version, step=1)
        if current is None or current.plan.incarnations[replica] != self.server.fleet.hello_of(replica).incarnation:
            return settled
        if current.state is RoundState.TRAINING and replica not in current.results:
            given = {"samples": 8, "tokens": 8, "targets": 4, "steps": 2, "loss": 1.0, "finite": True}
            return wire.StepsDone(result=RoundResult(round_id=round_id, replica=replica, **given))
        if current.state is RoundState.AGGREGATING and replica not in current.votes:
            given = {"finite": True, "candidate_loss": 1.0, "active_loss": 2.0, "tokens": 4}
            return wire.Voted(vote=Vote(round_id=round_id, replica=replica, **given))
        if replica in current.asked:
            return wire.Published(
                replica=replica, version=version, round_id=round_id, config_json=ADAPTER_JSON, weights=weights
            )
        return settled

    def everybody(self) -> None:
        """Who is lost comes back."""
        for replica in (0, 1):
            if not self.server.fleet.is_alive(replica):
                # Those that left in good order, too.
                self.server._failures._ignored.clear()
                leader = ScriptedReplica(replica)
                was_here = self.server.fleet.was_here(replica)
                incarnation = self.server.fleet.hello_of(replica).incarnation + 1 if was_here else 0
                leader.incarnation, leader.version = min(incarnation, 2**53), self.server.federation.newest
                self.say(replica, leader.hello())

    def something_to_talk_about(self) -> None:
        server, now = self.server, self.server._clock()
        if server.dispatcher.outstanding < 4:
            self.asked += 1
            purpose = Purpose.PROBE if self.asked % 2 else Purpose.USER
            server.dispatcher.submit(now, Request(id=self.asked, prompt=(1, 2),
                                                  sampling=Sampling(max_tokens=4), purpose=purpose))  # fmt: skip
        server.dispatcher.dispatch(now, server.fleet.routing_view)
        if server.federation.current is not None:
            return
        for replica in server.fleet.alive:
            if server.fleet.view_of(replica).state is ReplicaState.SERVING:
                server.fleet.set_state(now, replica, ReplicaState.IDLE, "to be talked about")
        history = server.federation.history
        incarnations = tuple(server.fleet.hello_of(r).incarnation for r in (0, 1))
        plan = RoundPlan(
            round_id=history.last_round + 1, members=(0, 1), incarnations=incarnations, local_steps=2, micro_batch=4,
            accumulation=1, base_version=history.version,
        )  # fmt: skip
        server.federation.start(now, plan, "to be talked about")


@pytest.mark.parametrize("seed", range(2))
def test_promise_1_and_3_no_message_of_a_replica_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    scene, babbler, taken = Scene(tmp_path, monkeypatch), Babbler(seed), set()
    hear = scene.server._inbox._handlers
    for kind, handler in list(hear.items()):
        hear[kind] = lambda now, message, handler=handler: (taken.add(type(message)), handler(now, message))
    for turn in range(1000):
        replica = babbler.random.choice((0, 1))
        expected = scene.expected(replica, babbler.random.choice(BYTES))
        scene.say(replica, expected if babbler.random.random() < 0.8 else babbler.message(replica))
        scene.everybody()
        if turn % 5 == 0:
            scene.something_to_talk_about()
    history = scene.server.federation.history
    assert history.completed > 0 and history.discarded > 0, "rounds come to both ends"
    assert taken == set(hear), "each kind of message was one that can be at least once"
    scene.server._close_out("the test is over")
    assert scene.server.dispatcher.outstanding == 0
    for folder in (scene.run.config.run_dir / "adapters").glob("v*"):
        assert weights_flaw((folder / "adapter_model.safetensors").read_bytes(), describe(SHAPES)) == ""
