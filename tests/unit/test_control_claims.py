"""What a replica claims is held against what it was given: no version, token, vote or adapter that it cannot have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from control_run import make_config
from msgspec.structs import replace
from scripted_replica import ADAPTER_JSON, SHAPES, adapter_bytes

from clif.adapters.peft_files import PREFIX, config_flaw, describe, weights_flaw
from clif.config import FederationConfig
from clif.control.claims import (
    event_objection,
    judged_objection,
    model_objection,
    newest_objection,
    publication_objection,
    size_objection,
    steps_objection,
    vote_objection,
)
from clif.control.dispatcher import RequestRecord
from clif.control.inbox import LONGEST_TEXT, printable
from clif.control.rounds import Round
from clif.states import RequestState
from clif.types import (
    FinishReason,
    HeldoutLoss,
    Request,
    RoundPlan,
    RoundResult,
    Sampling,
    TokenEvent,
    TokenLogprob,
    Vote,
)
from clif.wire.messages import Hello, Published

PLAN = RoundPlan(
    round_id=7, members=(0, 1), incarnations=(0, 0), local_steps=2, micro_batch=4, accumulation=1, base_version=2
)
HELLO = Hello(
    replica=0, rank=0, host="h", pid=1, max_batch=4, kv_tokens=64, max_context=32, vocabulary=100, adapter="a",
    heldout_rows=2, dtype="float32", load_s=1.0,
)  # fmt: skip


def changed(message: Any, **fields: Any) -> Any:
    return replace(message, **fields)


# --- answers -------------------------------------------------------------------------------------


def held(
    answered: int = 2, version: int | None = 1, state: RequestState = RequestState.RUNNING, logprobs: int | None = None
) -> RequestRecord:
    """A request for 4 tokens, of which some have come."""
    request = Request(id=5, prompt=(1, 2), sampling=Sampling(max_tokens=4, logprobs=logprobs))
    return RequestRecord(request, 0.0, state, tokens=[7] * answered, version=version)


def said(*tokens: int, version: int = 1, **fields: Any) -> TokenEvent:
    return TokenEvent(request_id=5, tokens=tokens, version=version, **fields)


@pytest.mark.parametrize(
    "event",
    [
        said(99),
        said(8, 9, finish=FinishReason.LENGTH),
        said(0, finish=FinishReason.STOP),
        said(finish=FinishReason.STOP, version=0),
        said(finish=FinishReason.FAILED, detail="the logits are not finite", version=0),
    ],
)
def test_what_a_replica_can_say_of_a_request_is_taken(event: TokenEvent) -> None:
    assert event_objection(event, held(), HELLO, serves=1) == ""


@pytest.mark.parametrize(
    ("event", "objection"),
    [
        (said(100), "token id 100 of 100"),
        (said(2**31 - 1), "token id 2147483647 of 100"),
        (said(8, 8, 8), "5 tokens, 4 were asked for"),
        (said(*[8] * 20_000), "20002 tokens, 4 were asked for"),
        (said(8, version=2), "tokens of version 2, it serves 1"),
        (said(8, version=0), "version changed from 1 to 0 within the answer"),
        (said(8, finish=FinishReason.LENGTH), "ends as length after 3 tokens"),
        (said(finish=FinishReason.CANCELLED), "ends as cancelled after 2 tokens"),
        (said(finish=FinishReason.REJECTED), "ends as rejected after 2 tokens"),
        (said(8, finish=FinishReason.STOP, text="forged"), "a text of its own, though no stop string was given"),
    ],
)
def test_promise_2_what_no_answer_of_one_version_can_hold_is_objected_to(event: TokenEvent, objection: str) -> None:
    assert objection in event_objection(event, held(), HELLO, serves=1)


def report(token: int, *top: int) -> TokenLogprob:
    return TokenLogprob(token, -1.5, tuple((other, -0.5) for other in top))


def test_log_probabilities_are_those_of_the_tokens_and_come_where_they_are_asked_for() -> None:
    asked, fine = held(logprobs=2), (report(8, 99, 8), report(9, 0))
    assert event_objection(said(8, 9, logprobs=fine), asked, HELLO, serves=1) == ""
    assert event_objection(said(finish=FinishReason.FAILED), asked, HELLO, serves=1) == ""
    for event, objection in (
        (said(8, 9, logprobs=fine[:1]), "log-probabilities of 1 tokens that are not its 2"),
        (said(8, 9), "log-probabilities of 0 tokens that are not its 2"),
        (said(9, 8, logprobs=fine), "that are not its 2"),
        (said(8, logprobs=(report(8, 100),)), "2 alternatives of 100 token ids"),
        (said(8, logprobs=(report(8, 1, 2, 3),)), "2 alternatives of 100 token ids"),
    ):
        assert objection in event_objection(event, asked, HELLO, serves=1)
    unasked = event_objection(said(8, logprobs=(report(8),)), held(), HELLO, serves=1)
    assert "1 log-probabilities, none were asked for" in unasked


def test_an_answer_that_another_replica_began_goes_on_or_begins_anew() -> None:
    dispatched = held(3, version=1, state=RequestState.DISPATCHED)
    assert event_objection(said(8, finish=FinishReason.LENGTH), dispatched, HELLO, serves=2) == ""
    assert "5 tokens" in event_objection(said(8, 8), dispatched, HELLO, serves=2)
    assert event_objection(said(8, 8, 8, 8, version=2), dispatched, HELLO, serves=2) == "", "from its first token"
    nothing_yet = held(0, version=None, state=RequestState.DISPATCHED)
    assert event_objection(said(8, version=2), nothing_yet, HELLO, serves=2) == ""
    assert "as stop after 0 tokens" in event_objection(said(finish=FinishReason.STOP), nothing_yet, HELLO, serves=2)


def test_a_request_that_a_replica_cannot_hold_may_be_rejected_by_it() -> None:
    record = held()
    record.request = Request(id=5, prompt=(1,) * 61, sampling=Sampling(max_tokens=4))
    assert event_objection(said(finish=FinishReason.REJECTED), record, HELLO, serves=1) == ""


# --- Hello ---------------------------------------------------------------------------------------


def test_a_hello_takes_what_the_configuration_gives_or_less(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert size_objection(HELLO, config) == ""
    assert "max_batch 17, the run has 16" in size_objection(changed(HELLO, max_batch=17), config)
    assert "kv_tokens 8193, the run has 8192" in size_objection(changed(HELLO, kv_tokens=8193), config)
    auto = make_config(tmp_path, engine={"kv_tokens": "auto", "max_batch": 4}, model={"max_context": 1000})
    assert size_objection(changed(HELLO, kv_tokens=4 * 1008), auto) == "", "requests of full length, in whole blocks"
    assert "kv_tokens 4033, the run has 4032" in size_objection(changed(HELLO, kv_tokens=4033), auto)


def test_replicas_of_different_models_are_not_taken_together() -> None:
    assert model_objection(HELLO, changed(HELLO, replica=1)) == ""
    assert "100 token ids, that of replica 1 101" in model_objection(HELLO, changed(HELLO, replica=1, vocabulary=101))
    assert "others than those of replica 1" in model_objection(HELLO, changed(HELLO, replica=1, adapter="b"))


def test_a_version_that_was_never_given_is_objected_to() -> None:
    assert newest_objection(3, 3) == "" and "version 4 was never given, the newest is 3" in newest_objection(4, 3)


# --- rounds --------------------------------------------------------------------------------------


def result(replica: int = 0, **fields: Any) -> RoundResult:
    given = {"samples": 8, "tokens": 80, "targets": 40, "steps": 2, "loss": 1.0, "finite": True, "round_id": 7}
    return RoundResult(replica=replica, **{**given, **fields})


def vote(replica: int = 0, **fields: Any) -> Vote:
    given = {"round_id": 7, "finite": True, "candidate_loss": 1.0, "active_loss": 2.0, "tokens": 5}
    return Vote(replica=replica, **{**given, **fields})


def training() -> Round:
    return Round(PLAN, 3, 0.0, FederationConfig())


def voting() -> Round:
    current = training()
    for member in PLAN.members:
        current.steps_done(1.0, result(member))
    return current


def settling() -> Round:
    current = voting()
    for member in PLAN.members:
        current.voted(2.0, vote(member))
    return current


def published(replica: int = 0, **fields: Any) -> Published:
    return Published(**{"replica": replica, "version": 3, "round_id": 7, "config_json": "{}", "weights": b"", **fields})


@pytest.mark.parametrize(
    ("given", "objection"),
    [
        (result(1), ""),
        (result(1, samples=16), ""),
        (result(1, round_id=6, samples=10**9), ""),
        (result(1, samples=0, steps=0, tokens=0, targets=0, loss=math.nan, finite=False), ""),
        (result(2), "no member of round 7"),
        (result(0), "reports the steps of round 7 twice"),
        (result(1, samples=17), "17 samples"),
        (result(1, samples=2**53), "9007199254740992 samples"),
        (result(1, steps=9), "9 steps"),
        (result(1, tokens=8 * 512 + 1), "4097 tokens"),
        (result(1, targets=81), "81 answer tokens of 80"),
    ],
)
def test_nobody_trains_more_than_it_was_given(tmp_path: Path, given: RoundResult, objection: str) -> None:
    current = training()
    current.steps_done(1.0, result(0))
    said = steps_objection(given, current, make_config(tmp_path))
    assert objection in said and bool(said) == bool(objection)
    assert steps_objection(given, None, make_config(tmp_path)) == "", "the round is over"


@pytest.mark.parametrize(
    ("given", "objection"),
    [
        (vote(1), ""),
        (vote(1, candidate_loss=math.inf, active_loss=math.nan, finite=False), ""),
        (vote(1, error2=math.nan, product2=math.inf), ""),
        (vote(1, round_id=6), ""),
        (vote(2), "no member of round 7"),
        (vote(0), "votes twice in round 7"),
        (vote(1, tokens=51), "51 tokens of 50"),
        (vote(1, candidate_loss=-1.0), "sums -1"),
        (vote(1, product2=-1.0), "-1"),
        (vote(1, outer_step=0.5), ""),
        (vote(1, outer_step=1.5), "at 1.5 of the way"),
        (vote(1, outer_step=math.nan), "at nan of the way"),
    ],
)
def test_a_vote_is_of_a_member_once_and_can_be(given: Vote, objection: str) -> None:
    current = voting()
    current.voted(2.0, vote(0))
    said = vote_objection(given, current, 50)
    assert objection in said and bool(said) == bool(objection)


def test_nobody_votes_before_there_is_an_average() -> None:
    assert "before anything was averaged" in vote_objection(vote(0), training(), 50)


@pytest.mark.parametrize(
    ("given", "objection"),
    [
        (published(0), ""),
        (published(1, round_id=6), ""),
        (published(1), "publishes version 3, for which it was not asked"),
        (published(0, version=4), "version 4 was never given, the newest is 3"),
    ],
)
def test_an_adapter_comes_from_whoever_was_asked_for_it(given: Published, objection: str) -> None:
    said = publication_objection(given, settling())
    assert objection in said and bool(said) == bool(objection)
    assert "not asked" in publication_objection(published(0), voting()), "nothing is decided yet"


def test_an_adapter_is_asked_for_once_and_of_the_next_member_when_the_first_is_lost() -> None:
    current = settling()
    assert current.publication(3.0, published(0))
    assert "not asked" in publication_objection(published(0), current)
    current = settling()
    current.lost(3.0, 0, "gone")
    assert publication_objection(published(1), current) == "" and current.publication(4.0, published(1))


def test_a_held_out_loss_is_of_rows_that_there_are() -> None:
    given = HeldoutLoss(replica=0, version=0, loss=3.0, tokens=5)
    assert judged_objection(given, 5) == "" and judged_objection(changed(given, loss=math.nan), 5) == ""
    assert "over 5 tokens of 4" in judged_objection(given, 4)
    assert "held-out loss of -3" in judged_objection(changed(given, loss=-3.0), 5)


# --- adapters ------------------------------------------------------------------------------------


def weights(**arrays: np.ndarray) -> bytes:
    whole = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    return safetensors.numpy.save({PREFIX + k: v for k, v in {**whole, **arrays}.items() if v.size})


A, B = SHAPES
POISONED = np.ones(SHAPES[A], np.float32)
POISONED[3, 1] = np.nan


@pytest.mark.parametrize(
    ("content", "flaw"),
    [
        (adapter_bytes(), ""),
        (b"EVIL WEIGHTS", "no safetensors file"),
        (b"", "no safetensors file"),
        (adapter_bytes()[:-1], "no safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "no safetensors file"),
        (weights(**{A: POISONED}), f"{PREFIX}{A} holds values that are not finite"),
        (weights(**{A: np.ones((8, 5), np.float32)}), "other tensors than the adapters of this run"),
        (weights(**{B: np.ones((0,), np.float32)}), "other tensors than the adapters of this run"),
        (weights(extra=np.ones(3, np.float32)), "other tensors than the adapters of this run"),
        (weights(**{A: np.ones(SHAPES[A], np.float64)}), "is F64, not F32"),
        (weights(**{A: np.ones(SHAPES[A], np.int32)}), "is I32, not F32"),
        (safetensors.numpy.save({"layer": np.ones(1, np.float32)}), "no name of PEFT's"),
    ],
)  # fmt: skip
def test_promise_3_only_the_whole_finite_adapter_of_the_run_is_stored(content: bytes, flaw: str) -> None:
    found = weights_flaw(content, describe(SHAPES))
    assert flaw in found and bool(found) == bool(flaw)


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        (ADAPTER_JSON, ""),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "does not describe a LoRA adapter"),
        (json.dumps({**json.loads(ADAPTER_JSON), "peft_type": "IA3"}), "does not describe a LoRA adapter"),
        (json.dumps({**json.loads(ADAPTER_JSON), "r": 4}), "r=4, not 8"),
        (json.dumps({**json.loads(ADAPTER_JSON), "lora_alpha": 1}), "lora_alpha=1, not 16.0"),
        (json.dumps({**json.loads(ADAPTER_JSON), "use_dora": True}), "uses use_dora"),
    ],
)
def test_promise_3_only_a_configuration_of_the_runs_adapters_is_stored(text: str, flaw: str) -> None:
    found = config_flaw(text, 8, 16.0)
    assert flaw in found and bool(found) == bool(flaw)


# --- text ----------------------------------------------------------------------------------------


def test_text_of_others_cannot_move_the_cursor_nor_fill_the_screen() -> None:
    assert printable("node01") == "node01" and printable("größe 数") == "größe 数"
    assert printable("\x1b[2K\rFAKE\nLINE \u202e") == r"\x1b[2K\rFAKE\nLINE \u202e"
    assert len(printable("x" * 10**6)) == LONGEST_TEXT and printable("x" * 10**6).endswith("…")
    assert len(printable("\x1b" * 10**6)) == LONGEST_TEXT
