"""Messages arrive as they were sent, in order; nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, get_args, get_origin, get_type_hints

import msgspec
import psutil
import pytest

from clif.types import (
    LEAST_LOGPROB,
    Constraint,
    FinishReason,
    HeldoutLoss,
    Purpose,
    Request,
    RoundPlan,
    RoundResult,
    Sampling,
    Slo,
    TokenEvent,
    TokenLogprob,
    TrainSample,
    Vote,
    Waiting,
)
from clif.wire import messages as m
from clif.wire.channels import ControlChannel, LeaderChannel, decode_down, decode_up
from clif.wire.keys import Keys

KEYS = Keys(b"k" * 32)
ASKED = {
    "min_p": 0.1, "presence_penalty": 1.0, "logit_bias": ((5, -2.0),), "logprobs": 2,
    "constraint": Constraint("json_schema", "{}"),
}  # fmt: skip
REQUEST = Request(
    id=4, prompt=(1, 2), sampling=Sampling(stop=("a",), seed=3, **ASKED), slo=Slo(ttft_s=1.0), purpose=Purpose.PROBE
)
PLAN = RoundPlan(
    round_id=1, members=(0, 2), incarnations=(0, 1), local_steps=3, micro_batch=4, accumulation=1, base_version=0
)
RESULT = RoundResult(round_id=1, replica=0, samples=8, tokens=90, targets=90, steps=2, loss=1.5, finite=True)
VOTE = Vote(round_id=1, replica=0, finite=True, candidate_loss=1.0, active_loss=2.0, tokens=5)
LOGPROBS = (TokenLogprob(7, -0.5, ((7, -0.5), (8, LEAST_LOGPROB))),)
EVENT = TokenEvent(request_id=4, tokens=(7,), version=2, finish=FinishReason.STOP, text="x", logprobs=LOGPROBS)
SAMPLE = TrainSample(id=1, ids=(1, 2, 3), target_start=2)
DOWN = [
    m.Submit(request=REQUEST), m.Cancel(request_id=4), m.Limits(max_batch=4, micro_batch=2),
    m.Backlog(waiting=3, oldest=(Waiting(5, 0.25, 7, 9, Slo(ttft_s=2.0)),)),
    m.BeginRound(plan=PLAN, group=1), m.FinishSteps(round_id=1), m.Aggregate(round_id=1),
    m.Settle(round_id=1, commit=True, version=3, publish=True), m.Install(version=3, weights=b"\x00\xff"), m.Evaluate(),
    m.JobData(job="j", train=(SAMPLE,), gate=(SAMPLE,), seed=1, own_gate=True, rounds=(4,), complete=True),
    m.JobOver(job="j"), m.Keep(versions=(3, 2)), m.Activate(version=2),
    m.Ping(), m.Rebuild(reason="r"), m.Welcome(incarnation=1), m.Stop(),
    m.Submit(request=REQUEST, output_ids=(4, 5), version=2),
]  # fmt: skip
UP = [
    m.Hello(replica=0, rank=0, host="h", pid=1, max_batch=4, kv_tokens=64, max_context=32,
            vocabulary=9, adapter="a", heldout_rows=2, dtype="float32", load_s=0.1),
    m.Tokens(replica=0, events=(EVENT,)),
    m.Report(replica=0, running=1, waiting=0, kv_used=8, busy=0.5, version=0, training_steps=0, last_loss=None,
             serve_timings=((1.0, 0.0, 0.1),)),
    m.StepsDone(result=RESULT), m.Voted(vote=VOTE), m.RoundFailed(round_id=1, replica=0, error="e"),
    m.Published(replica=0, version=3, round_id=1, config_json="{}", weights=b"w"),
    m.Settled(replica=0, round_id=1, version=3, step=9), m.Held(replica=0, versions=(3, 2)),
    m.Evaluated(result=HeldoutLoss(replica=0, version=0, loss=1.0, tokens=3)), m.Trouble(replica=0, error="e"),
    m.Goodbye(replica=0), m.Signalled(replica=0, signal="SIGTERM"),
]  # fmt: skip


def test_every_message_is_covered_here():
    assert {type(x) for x in DOWN} == set(m.Down.__args__) and {type(x) for x in UP} == set(m.Up.__args__)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_messages_arrive_whole_and_in_order_in_both_directions(host):
    if ":" in host and not any(a.address == host for all in psutil.net_if_addrs().values() for a in all):
        pytest.skip("this machine has no IPv6 loopback")
    control = ControlChannel(KEYS, 7, host)
    leader = LeaderChannel(control.address, KEYS, 5)
    try:
        for message in UP * 20:
            leader.send(message)
        got: list[tuple[int, bytes]] = []
        while len(got) < len(UP) * 20:
            batch = list(control.receive(10.0))
            assert batch, "nothing came within ten seconds"
            got += batch
        assert {sender for sender, _ in got} == {5}
        assert [decode_up(payload) for _, payload in got] == UP * 20
        assert all(control.send(5, message) for message in DOWN * 20)
        back: list[object] = []
        while len(back) < len(DOWN) * 20:
            payloads = leader.receive(10.0)
            assert payloads, "nothing came within ten seconds"
            back += [decode_down(p) for p in payloads]
        assert back == DOWN * 20
        assert control.send(6, m.Stop()) is False, "an unknown replica is told to the caller, not dropped in silence"
    finally:
        leader.close()
        control.close()


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"", "truncated"),
        (b"\x93\x01\x02\x03", "Expected `object`, got `array`"),
        (msgspec.msgpack.encode({"type": "Nonsense"}), "Invalid value 'Nonsense'"),
    ],
)
def test_what_is_no_message_is_refused(payload, sentence):
    with pytest.raises(msgspec.DecodeError, match=sentence):
        decode_down(payload)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"type": "Nonsense"}, "Invalid value 'Nonsense'"),
        ({"type": "Stop"}, "Invalid value 'Stop'"),
        ({}, "missing required field `type`"),
    ],
)
def test_a_message_that_no_replica_sends_is_refused(message, sentence):
    with pytest.raises(msgspec.ValidationError, match=sentence):
        decode_up(msgspec.msgpack.encode(message))


def integers_of(kind: type, seen: set[type]) -> Iterator[tuple[str, object]]:
    """Fields of a message, and of all that it holds, that are integers: name and annotation."""
    seen.add(kind)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        todo = [hint]
        while todo:
            hint = todo.pop()
            if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
                yield from integers_of(hint, seen) if hint not in seen else ()
            elif hint is int or (get_origin(hint) is Annotated and get_args(hint)[0] is int):
                yield f"{kind.__name__}.{name}", hint
            else:
                todo += [] if get_origin(hint) is Annotated else get_args(hint)


def test_every_number_that_is_stored_from_a_replica_has_bounds():
    """Round numbers are only compared; the request of a slack is only shown."""
    compared = {"round_id", "request"}
    found = [one for kind in m.Up.__args__ for one in integers_of(kind, set())]
    assert len(found) > 40
    unbounded = {name for name, hint in found if hint is int and name.split(".")[1] not in compared}
    assert not unbounded
