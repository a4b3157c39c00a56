"""Promise 9: whatever strangers send and a broken replica says, the run goes on, and every request is answered."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import zmq
from control_run import SERVES, Run, make_config
from scripted_replica import ADAPTER_JSON, KEYS, ScriptedReplica, adapter_bytes

from clif.control.policy.phases import Phase
from clif.types import FinishReason, RoundResult, TokenEvent, Vote
from clif.wire import messages as wire
from clif.wire.channels import RECEIVE_MESSAGES, LeaderChannel

FORGED = [
    wire.Hello(replica=1, rank=1, host="\x1b]0;owned\x07", pid=1, max_batch=4, kv_tokens=8192, max_context=2048,
               vocabulary=8, adapter="forged", heldout_rows=1, dtype="float32", load_s=0.0),
    *(wire.Tokens(replica=r, events=tuple(
        TokenEvent(request_id=i, tokens=(1,), finish=FinishReason.STOP, text="forged") for i in range(20)
    )) for r in (0, 1)),
    *(wire.Voted(vote=Vote(round_id=1, replica=r, finite=True, candidate_loss=0.0001, active_loss=1.0, tokens=1))
      for r in (0, 1)),
    wire.Published(replica=0, version=1, round_id=1, config_json="{}", weights=b"EVIL WEIGHTS"),
    wire.Trouble(replica=0, error="forged"), wire.Trouble(replica=99, error="forged"),
    wire.Signalled(replica=1, signal="SIGTERM"), wire.Goodbye(replica=0), wire.Goodbye(replica=1),
]  # fmt: skip
"""Invented tokens, votes, weights, trouble, signals and goodbyes, in the names of replicas."""


class Strangers:
    """Connections without a key, under the names that leaders may have; each has all of FORGED to say."""

    def __init__(self, address: str, names: tuple[bytes, ...] = (b"replica-0", b"replica-1", b"")) -> None:
        self._context = zmq.Context()
        self._sockets = [self._context.socket(zmq.DEALER) for _ in names]
        for name, socket in zip(names, self._sockets, strict=True):
            if name:
                socket.setsockopt(zmq.IDENTITY, name)
            socket.connect(address)
            for message in FORGED * 20:
                socket.send(msgspec.msgpack.encode(message))

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()


def test_strangers_who_are_there_first_neither_end_the_run_nor_are_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They take the names of leaders, before these come, and send all of FORGED as long as the run lasts."""
    run = Run(make_config(tmp_path), sockets=True)
    strangers = Strangers(run.channel.address)
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            run.server.step()
            if "did not have the run's keys" in caplog.text:
                break
        run.go()
    strangers.close()
    assert run.server.phase is Phase.DONE and not run.server.drained
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert [row["members"] for row in run.table("rounds") if row["state"] == "committed"] == ["0,1"]
    stored = run.config.run_dir / "adapters" / "v0001" / "adapter_model.safetensors"
    assert stored.read_bytes() == adapter_bytes()
    refused = [r.getMessage() for r in caplog.records if "did not have the run's keys" in r.getMessage()]
    assert 1 <= len(refused) <= 4, "one line, and one for each power of ten"
    assert "forged" not in caplog.text and "\x1b" not in caplog.text


# --- broken replicas -----------------------------------------------------------------------------

Lie = Callable[[ScriptedReplica], wire.Up | bytes | None]
"""What a replica says; None: the occasion has not come."""


def of_a_request(*tokens: int, **fields: object) -> Lie:
    def lie(leader: ScriptedReplica) -> wire.Up | None:
        if not leader.running:
            return None
        event = TokenEvent(request_id=next(iter(leader.running)), tokens=tokens, **fields)  # type: ignore[arg-type]
        return wire.Tokens(replica=1, events=(event,))

    return lie


def reports(**fields: object) -> Lie:
    return lambda leader: msgspec.structs.replace(leader.report(), **fields)


LIES: dict[str, tuple[Lie, str]] = {
    "probe_tokens, negative": (of_a_request(-5), "Expected `int` >= 0"),
    "probe_tokens, huge": (of_a_request(2**62), "Expected `int` <= 2147483647"),
    "a token beyond the vocabulary": (of_a_request(8), "token id 8 of 8"),
    "tokens_million": (of_a_request(*[1] * 20_000), "20000 tokens, 8 were asked for"),
    "version_big": (of_a_request(1, version=10**6), "tokens of version 1000000, it serves 0"),
    "finish_rejected": (of_a_request(finish=FinishReason.REJECTED), "ends as rejected"),
    "probe_text": (of_a_request(1, finish=FinishReason.STOP, text="yes please"), "a text of its own"),
    "forge_goodbye": (lambda _: wire.Goodbye(replica=0), "speaks for replica 0"),
    "forge_trouble": (lambda _: wire.Trouble(replica=0, error="x"), "speaks for replica 0"),
    "gather_trouble": (lambda _: wire.Trouble(replica=99, error="x"), "speaks for replica 99"),
    "forge_signalled": (lambda _: wire.Signalled(replica=0, signal="SIGTERM"), "speaks for replica 0"),
    "forge_tokens": (lambda _: wire.Tokens(replica=0, events=()), "speaks for replica 0"),
    "no message": (lambda _: b"\x93\x01\x02\x03", "what nobody understands"),
    "a tag with escape codes": (lambda _: msgspec.msgpack.encode({"type": "\x1b[2K"}), r"Invalid value '\x1b[2K'"),
    "Hello in the middle of its life": (lambda leader: leader.hello(), "says Hello again in incarnation"),
    "a share of its time that is no number": (reports(busy=math.nan), "Expected `float` >= 0.0"),
    "more steps than a table can hold": (reports(training_steps=2**63), "`int` <= 9007199254740992"),
    "a version that there is not": (reports(version=4), "version 4 was never given, the newest is 0"),
    "serving a version that there is not": (
        lambda _: wire.Settled(replica=1, round_id=0, version=3, step=1), "version 3 was never given",
    ),
    "holding a version that there is not": (
        lambda _: wire.Held(replica=1, versions=(5,)), "version 5 was never given, the newest is 0",
    ),
    "holding more versions than it has slots": (
        lambda _: wire.Held(replica=1, versions=(0, 0, 0, 0)), "it holds 4 versions in 3 slots",
    ),
    "steps of a round that never began": (
        lambda _: wire.StepsDone(result=RoundResult(
            round_id=3, replica=1, samples=1, tokens=1, targets=1, steps=1, loss=1.0, finite=True)),
        "round 3 has never begun",
    ),
}  # fmt: skip


class Liar(ScriptedReplica):
    """Replica 1 says one lie in each of its incarnations, and is honest when it has no more."""

    def __init__(self, lies: list[Lie]) -> None:
        super().__init__(1)
        self.lies, self.lied = lies, False
        self.fails_for_s = 0.01

    def serve(self) -> None:
        lie = self.lies[0](self) if self.lies and not self.lied else None
        if isinstance(lie, bytes):
            self.send_bytes(lie)
        elif lie is not None:
            self.send(lie)
        elif not self.lied:
            super().serve()
        if lie is not None:
            self.lied = bool(self.lies.pop(0))

    def rebuild(self, error: str) -> None:
        super().rebuild(error)
        self.lied = False


def test_a_replica_that_claims_what_cannot_be_begins_anew_and_its_requests_are_answered(tmp_path: Path) -> None:
    load = {"rate_rps": 200.0, "duration_s": 30.0}
    config = make_config(tmp_path, **SERVES, load=load, control={"retries": 1000})

    def is_back() -> bool:
        return run.server.fleet.is_alive(1) and run.server.fleet.hello_of(1).incarnation == len(LIES)

    run = Run(config, signalled=lambda: "all lies are told" if is_back() else "")
    liar = run.leaders[1] = Liar([lie for lie, _ in LIES.values()])
    # So that the other one gets requests, too.
    hello = msgspec.structs.replace(run.leaders[0].hello(), max_batch=1)
    run.leaders[0].hello = lambda: hello  # type: ignore[method-assign]
    run.go()
    assert run.server.drained == "all lies are told" and not liar.lies
    run.assert_promise_1()
    rows = run.table("requests")
    assert {row["finish"] for row in rows} == {"stop"} and max(row["output_tokens"] for row in rows) <= 3
    reasons = [row["reason"] for row in run.table("transitions") if row["to_state"] == "failed"]
    assert len(reasons) == len(LIES)
    for (name, (_, objection)), reason in zip(LIES.items(), reasons, strict=True):
        assert reason.startswith("broken: ") and objection in reason, name


def test_a_replica_that_lies_after_all_of_its_lives_is_given_up_and_the_others_answer(tmp_path: Path) -> None:
    config = make_config(tmp_path, **{**SERVES, "run": {"rebuilds": 0}}, control={"retries": 1000})
    run = Run(config)
    run.leaders[1] = Liar([of_a_request(-5)])
    run.go()
    assert run.server.phase is Phase.DONE
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert run.leaders[1].exit_code == 0, "it was told to leave"


def not_finite() -> bytes:
    arrays = safetensors.numpy.load(adapter_bytes())
    next(iter(arrays.values()))[0, 0] = np.nan
    return safetensors.numpy.save(arrays)


def publishing(leader: ScriptedReplica, weights: bytes, unasked: bool = False) -> None:
    """From now on it publishes these weights."""
    settle = leader.settle

    def lie(message: wire.Settle) -> None:
        if message.publish or unasked:
            published = wire.Published(
                replica=leader.replica, version=message.version, round_id=message.round_id, config_json=ADAPTER_JSON,
                weights=weights,
            )  # fmt: skip
            leader.send(published)
        settle(msgspec.structs.replace(message, publish=False))

    leader.settle = lie  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("liar", "weights", "objection"),
    [
        (0, b"EVIL WEIGHTS", "the weights are no safetensors file"),
        (0, not_finite(), "holds values that are not finite"),
        (1, adapter_bytes(666.0), "publishes version 1, for which it was not asked"),
    ],
    ids=["EVIL WEIGHTS", "not finite", "not asked"],
)
def test_promise_3_weights_that_cannot_be_are_not_stored_and_the_next_member_is_asked(
    tmp_path: Path, liar: int, weights: bytes, objection: str
) -> None:
    run = Run(make_config(tmp_path))
    publishing(run.leaders[liar], weights, unasked=liar == 1)
    run.go()
    run.assert_promise_1()
    (ended,) = run.table("rounds")
    assert (ended["state"], ended["version"]) == ("committed", 1)
    folder = run.config.run_dir / "adapters"
    assert json.loads((folder / "current.json").read_text())["version"] == 1
    assert (folder / "v0001" / "adapter_model.safetensors").read_bytes() == adapter_bytes()
    failed = [row for row in run.table("transitions") if row["to_state"] == "failed"]
    # It may be on its way back when the run is through, and then leaves while it is greeted.
    assert {row["replica"] for row in failed} == {liar} and objection in failed[0]["reason"]


# --- floods --------------------------------------------------------------------------------------


def test_a_signal_is_obeyed_between_the_steps_of_a_flood(tmp_path: Path) -> None:
    """Neither run.max_s nor SIGTERM waits for the end of it: a step of the loop takes a bounded number of messages."""
    received: list[int] = []
    run = Run(make_config(tmp_path), sockets=True, signalled=lambda: "got SIGTERM" if sum(received) else "")
    read, take = run.channel.receive, run.server._inbox._take

    def receive(timeout_s: float) -> Iterator[tuple[int, bytes]]:
        received.append(0)
        return read(timeout_s)

    def count(now: float, sender: int, payload: bytes) -> None:
        received[-1] += 1
        take(now, sender, payload)

    run.channel.receive, run.server._inbox._take = receive, count  # type: ignore[method-assign]
    flood = LeaderChannel(run.channel.address, KEYS, 1)
    flood.send(run.leaders[1].hello())
    run.leaders[1].serve_timings = ()
    for _ in range(8 * RECEIVE_MESSAGES):
        flood.send(run.leaders[1].report())
    flood.send(wire.Goodbye(replica=1))
    run.leaders = []
    run.go()
    flood.close()
    assert run.server.drained == "got SIGTERM" and run.server.phase is Phase.DONE
    assert 0 < max(received) <= RECEIVE_MESSAGES
