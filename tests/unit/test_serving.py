"""Promises of the serving path: token-exactness, one version per request, memory, cancelling."""

from __future__ import annotations

import peft
import pytest
import torch
from helpers import Rig, answer, make_rig, random_state, request

from clif.adapters import peft_io
from clif.models.weights.loading import load_model
from clif.types import FinishReason

PROMPTS = [[7, 3, 9], [11, 5, 8, 2, 40, 41, 17], [5], list(range(20, 75)), [33, 34], [9, 9, 9, 1, 2, 3, 4, 5, 6]]


def reference(model: torch.nn.Module, prompt: list[int], count: int, eos: int | None) -> list[int]:
    out = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def plain(tiny_config):
    return load_model(make_rig(f"random:{tiny_config}").config.model, torch.device("cpu"), seed=3).model


@pytest.fixture
def rig(tiny_config) -> Rig:
    return make_rig(f"random:{tiny_config}")


def test_mixed_batch_is_token_exact_against_generate(rig, plain):
    requests = [request(i, p, max_tokens=12 + i) for i, p in enumerate(PROMPTS)]
    # Arrivals at different steps: prompts, chunks of long prompts and answers share batches.
    events = rig.run(requests, arrive={i: 2 * i for i in range(len(requests))})
    for r in requests:
        expected = reference(plain, list(r.prompt), r.sampling.max_tokens, 256)
        assert answer(events[r.id]) == expected
        assert events[r.id][-1].finish is (FinishReason.STOP if expected[-1] == 256 else FinishReason.LENGTH)


def test_real_model_is_token_exact_against_generate(stories):
    rig = make_rig(stories)
    plain = load_model(rig.config.model, torch.device("cpu")).model
    requests = [request(i, p, max_tokens=40) for i, p in enumerate(PROMPTS)]
    events = rig.run(requests, arrive={i: 3 * i for i in range(len(requests))})
    for r in requests:
        assert answer(events[r.id]) == reference(plain, list(r.prompt), 40, 2)


def test_promotion_keeps_running_requests_on_their_version(rig, plain):
    """Promise 2: a request is answered by one adapter version from its first token to its last."""
    requests = [request(i, PROMPTS[i], max_tokens=30, ignore_eos=True) for i in range(4)]
    arrive = {0: 0, 1: 0, 2: 10, 3: 20}
    promoted = {5: 1, 15: 2}
    original = rig.engine.serve

    def serve_and_promote():
        rig.count = getattr(rig, "count", 0) + 1
        if rig.count in promoted:
            rig.fill(promoted[rig.count], seed=promoted[rig.count])
        return original()

    rig.engine.serve = serve_and_promote
    events = rig.run(requests, arrive)
    versions = [{e.version for e in events[i]} for i in range(4)]
    assert versions == [{0}, {0}, {1}, {2}]
    for r, version in zip(requests, (0, 0, 1, 2), strict=True):
        model = plain if version == 0 else with_peft(rig, version)
        assert answer(events[r.id]) == reference(model, list(r.prompt), 30, None)
    assert rig.slots.retiring == ()


def with_peft(rig: Rig, seed: int) -> torch.nn.Module:
    """The same adapter through PEFT's own code."""
    model = load_model(rig.config.model, torch.device("cpu"), seed=3).model
    config = rig.config.adapter
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules="all-linear")
    )
    state = {peft_io.PREFIX + k: v for k, v in random_state(rig.bank, seed).items()}
    peft.set_peft_model_state_dict(wrapped, state)
    return wrapped


def test_answers_of_one_adapter_never_feel_a_nan_in_another(rig):
    requests = [request(0, PROMPTS[1], max_tokens=10), request(1, PROMPTS[1], max_tokens=10)]
    alone = answer(rig.run(requests[:1])[0])
    rig.fill(1, seed=1)
    rig.bank.layers[0].serving_b[rig.slots.slot_of(1)] = float("nan")
    rig.slots.active = 0  # request 0 starts on the base, request 1 on the broken version
    rig.slots._versions.setdefault(0, type(rig.slots._versions[1])(None))
    rig.engine.scheduler.add(requests[0], 0.0)
    rig.engine.serve()
    rig.slots.active = 1
    rig.engine.scheduler.add(requests[1], 0.0)
    got, broken = alone[:1], []
    while rig.engine.serving:
        events = rig.engine.serve()
        got += [t for e in events if e.request_id == 0 for t in e.tokens]
        broken += [e for e in events if e.request_id == 1]
    assert got == alone
    (end,) = broken
    assert (end.finish, end.tokens) == (FinishReason.FAILED, ())
    assert end.detail == "the logits are not finite under adapter version 1"


def test_kv_cache_is_never_overbooked_and_everything_is_given_back(tiny_config):
    rig = make_rig(f"random:{tiny_config}", engine={"kv_tokens": 256, "max_batch": 8})
    requests = [request(i, [1 + i] * 20, max_tokens=60, ignore_eos=True) for i in range(9)]
    most = 0
    original = rig.engine.serve

    def watch():
        nonlocal most
        out = original()
        most = max(most, rig.engine.scheduler.pool.used_tokens)
        return out

    rig.engine.serve = watch
    events = rig.run(requests)
    assert all(len(answer(events[r.id])) == 60 for r in requests)
    assert most == 256 and rig.engine.scheduler.preemptions > 0
    assert rig.engine.scheduler.pool.used_tokens == 0


def test_cancelled_request_ends_once_and_frees_its_place(rig):
    for r in (request(0, [1, 2], max_tokens=50, ignore_eos=True), request(1, [3], max_tokens=5)):
        rig.engine.scheduler.add(r, 0.0)
    rig.engine.serve()
    event = rig.engine.scheduler.cancel(0)
    assert event is not None and event.finish is FinishReason.CANCELLED
    assert rig.engine.scheduler.cancel(0) is None
    while rig.engine.serving:
        assert all(e.request_id == 1 for e in rig.engine.serve())
    assert rig.engine.scheduler.pool.used_tokens == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_string_ends_the_answer_before_it(stories, overlap):
    rig = make_rig(stories, engine={"overlap": overlap})
    tokenizer = rig.loaded.tokenizer
    prompt = tokenizer.tokenizer.encode("Once upon a time").ids
    whole = tokenizer.decode(answer(rig.run([request(0, prompt, max_tokens=60)])[0]))
    stop = whole[30:34]
    events = rig.run([request(1, prompt, max_tokens=60, stop=(stop,))])[1]
    assert events[-1].finish is FinishReason.STOP
    assert events[-1].text == whole[: whole.index(stop)]


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(rig):
    def one(id: int, seed: int):
        return request(id, [4, 5, 6], max_tokens=15, temperature=0.9, top_p=0.9, top_k=50, seed=seed, ignore_eos=True)

    alone = answer(rig.run([one(0, 7)])[0])
    crowd = rig.run([one(1, 7), one(2, 8), request(3, [9], max_tokens=15)])
    assert answer(crowd[1]) == alone
    assert answer(crowd[2]) != alone


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("version", [0, 1])
def test_an_answer_that_a_lost_replica_began_is_gone_on_with_as_if_nothing_had_been(tiny_config, sampling, version):
    """Two rigs of one seed are two replicas; the second one has promoted another version meanwhile."""
    first, second = make_rig(f"random:{tiny_config}"), make_rig(f"random:{tiny_config}")
    asked = request(1, PROMPTS[1], max_tokens=20, ignore_eos=True, **sampling)
    for rig in (first, second):
        if version:
            rig.fill(1, seed=4)
    expected = answer(first.run([asked])[1])
    # The base can always be read, an adapter as long as somebody does.
    second.slots.acquire()
    second.fill(2, seed=9)
    for begun in (1, 7, 19):
        events = continued(second, asked, expected[:begun], version)
        assert answer(events) == expected[begun:] and {e.version for e in events} == {version}
        assert events[-1].finish is FinishReason.LENGTH


def continued(rig: Rig, asked, begun: list[int], version: int) -> list:
    """Events of a request that another replica had answered in part."""
    rig.engine.scheduler.add(asked, 0.0, begun, version)
    events = []
    while rig.engine.serving:
        events += rig.engine.serve()
    return events


def test_promise_2_an_answer_whose_version_is_gone_begins_anew(rig):
    rig.fill(1, seed=4)
    rig.fill(2, seed=9)
    asked = request(1, PROMPTS[1], max_tokens=9, ignore_eos=True)
    events = continued(rig, asked, [3, 4, 5], version=1)
    assert len(answer(events)) == 9 and {e.version for e in events} == {2}
    assert answer(events) == answer(rig.run([request(2, PROMPTS[1], max_tokens=9, ignore_eos=True)])[2])
