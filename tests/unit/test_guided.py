"""Promises of what one request may ask for besides: biases, penalties, JSON and log-probabilities.

Whatever the others of its batch ask for, however steps are ordered, and when its answer is continued.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import answer, make_rig, request, stack_logits

from clif import LLM, Constraint, Sampling
from clif.engine.changes import Changes
from clif.errors import InputError
from clif.types import LEAST_LOGPROB, FinishReason, Request, TokenEvent

ROW = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "array", "items": {"enum": ["x", "yy", None]}, "minItems": 1, "maxItems": 3},
        "c": {"type": "string", "maxLength": 4},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
SCHEMA = Constraint("json_schema", json.dumps(ROW))
# A random model would write white space as long as it may.
NO_SPACES = tuple((i, -100.0) for i in (188, 197, 198, 201, 220))
HOT = {"temperature": 3.0}


def is_row(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["a", "b", "c"] and 0 <= found["a"] <= 99 and len(found["c"]) <= 4
    return 1 <= len(found["b"]) <= 3 and set(found["b"]) <= {"x", "yy", None}


def all_kinds() -> list[Request]:
    """One of each kind, and plain ones beside them."""
    asked: list[dict[str, Any]] = [
        {"constraint": SCHEMA},
        {},
        {"constraint": SCHEMA, **HOT, "seed": 1, "logprobs": 2},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"logit_bias": ((7, 100.0),), "logprobs": 0},
        {"temperature": 1.0, "seed": 3},
        {"presence_penalty": 2.0, **HOT, "min_p": 0.2, "seed": 4},
        {"constraint": Constraint("json_object"), "frequency_penalty": 0.5, **HOT, "seed": 6, "top_k": 40},
        {"logprobs": 3},
    ]
    return [
        request(i, [3 + i, 9, *range(20, 20 + 3 * i)], max_tokens=60, **kind)
        for i, kind in enumerate(asked)
    ]  # fmt: skip


def plain(events: dict[int, list[TokenEvent]]) -> dict[int, Any]:
    """Tokens, ends, and the tokens of reports."""
    return {
        i: [answer(got), got[-1].finish, [report.token for event in got for report in event.logprobs]]
        for i, got in events.items()
    }


def values(events: dict[int, list[TokenEvent]]) -> list[float]:
    """All log-probabilities. Products of other sizes are rounded differently."""
    return [report.logprob for _, got in sorted(events.items()) for event in got for report in event.logprobs]


@pytest.fixture(scope="module")
def model(tiny_config: Path) -> str:
    return f"random:{tiny_config}"


@pytest.fixture(scope="module")
def alone(model: str) -> dict[Any, Any]:
    """What each request gets when nothing else is served."""
    rig = make_rig(model)
    events = {one.id: rig.run([one])[one.id] for one in all_kinds()}
    return {**plain(events), "values": values(events)}


def test_requests_of_all_kinds_get_the_same_side_by_side_and_in_either_order_of_steps(model, alone):
    for overlap in (False, True):
        rig = make_rig(model, engine={"overlap": overlap, "max_batch": 16})
        events = rig.run(all_kinds(), arrive={i: 2 * i for i in range(9)})
        assert {**plain(events), "values": pytest.approx(values(events), abs=1e-4)} == alone
        assert rig.engine.scheduler.pool.used_tokens == 0 and not rig.engine.serving


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_answers_go_on_as_if_nothing_had_happened(model, alone, overlap):
    rig = make_rig(model, engine={"overlap": overlap, "kv_tokens": 256, "max_batch": 9})
    events = rig.run(all_kinds())
    assert {**plain(events), "values": pytest.approx(values(events), abs=1e-4)} == alone
    assert rig.engine.scheduler.preemptions


def test_an_answer_that_another_replica_began_is_continued(model, alone):
    for one in all_kinds():
        tokens = alone[one.id][0]
        known = len(tokens) // 2
        rig = make_rig(model)
        assert rig.engine.scheduler.add(one, 0.0, output_ids=tokens[:known], version=0) is None
        events = [event for _ in range(100) for event in rig.engine.serve()]
        assert answer(events) == tokens[known:] and events[-1].finish == alone[one.id][1]


def test_constrained_answers_of_random_models_are_json_of_their_schema(model, alone):
    with LLM(model, engine={"kv_tokens": 2048, "max_batch": 8}, model={"dtype": "float32", "device": "cpu"}) as llm:
        asked = [
            Sampling(max_tokens=150, constraint=SCHEMA, logit_bias=NO_SPACES, seed=i, logprobs=1, **(HOT if i else {}))
            for i in range(8)
        ]
        found = llm.generate([[5 + i] for i in range(8)], asked)
        ended = [one for one in found if one.finish_reason is FinishReason.STOP]
        assert len(ended) > 4 and all(is_row(one.text) for one in ended)
        assert len({one.text for one in ended}) > 3, "they are drawn"
        for one in found:
            assert tuple(report.token for report in one.logprobs) == one.token_ids
            assert one.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        events = list(llm.stream([5], asked[0]))
        assert [report.token for event in events for report in event.logprobs] == [*found[0].token_ids]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"logit_bias": ((300, 1.0),)}, "logit_bias names token 300: the model has the ids 0 to 299"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias names token -1"),
        ({"constraint": Constraint("json_schema", '{"type": "person"}')}, "the JSON schema cannot be enforced"),
    ],
)
def test_what_cannot_be_enforced_ends_its_request_and_no_other(model, wrong, sentence):
    rig = make_rig(model)
    refused = rig.engine.scheduler.add(request(1, [5], **wrong), 0.0)
    assert refused is not None and refused.finish is FinishReason.FAILED and sentence in refused.detail
    with LLM(model, model={"device": "cpu"}) as llm, pytest.raises(InputError, match=sentence):
        llm.generate([[5], [6]], [Sampling(), Sampling(**wrong)])


@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_that_no_token_can_continue_fails_with_the_reason_beside_others(model, overlap):
    rig = make_rig(model, engine={"overlap": overlap})
    expected = answer(rig.run([request(1, [6], max_tokens=9)])[1])
    endless = Constraint("json_schema", '{"$ref": "#"}')
    events = rig.run([request(0, [5], max_tokens=9, constraint=endless), request(1, [6], max_tokens=9)])
    assert events[0][-1].finish is FinishReason.FAILED and "that its constraint allows" in events[0][-1].detail
    assert answer(events[0]) == [] and answer(events[1]) == expected


# --- biases and penalties ------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 2}, {**HOT, "top_p": 0.9, "seed": 2}])
def test_a_bias_of_a_hundred_forces_a_token_and_of_minus_a_hundred_forbids_it(model, params):
    rig = make_rig(model)
    free = answer(rig.run([request(1, [5, 6], max_tokens=12, ignore_eos=True, **params)])[1])
    forced = request(2, [5, 6], max_tokens=12, logit_bias=((17, 100.0),), **params)
    forbidden = tuple((token, -100.0) for token in set(free))
    without = request(3, [5, 6], max_tokens=12, ignore_eos=True, logit_bias=forbidden, **params)
    events = rig.run([forced, without])
    assert answer(events[2]) == [17] * 12
    assert len(answer(events[3])) == 12 and not set(answer(events[3])) & set(free)


def test_penalties_and_biases_are_those_of_a_plain_loop(model):
    """Greedy: what OpenAI's formula gives, in float64, one token after the other."""
    rig, prompt, bias = make_rig(model), [5, 6, 5, 9], ((40, 1.5), (41, -1.0))
    for frequency, presence in ((0.7, 0.0), (0.0, 1.2), (-0.5, 0.3), (2.0, 2.0)):
        ids: list[int] = []
        for _ in range(20):
            logits = stack_logits(rig.runner.stack, torch.tensor(prompt + ids))[-1].double()
            for token, count in Counter(ids).items():
                logits[token] -= frequency * count + presence
            for token, value in bias:
                logits[token] += value
            ids.append(int(logits.argmax()))
        asked = {"frequency_penalty": frequency, "presence_penalty": presence, "logit_bias": bias}
        events = rig.run([request(1, prompt, max_tokens=20, ignore_eos=True, **asked)])
        assert answer(events[1]) == ids


def test_changes_leave_rows_that_are_not_finite_as_they_are():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, nan, 2.0], [1.0, 2.0, inf], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[0b001], [0b001], [0b110]], dtype=torch.int32)
    where, rows = torch.tensor([[0, 2], [0, 1]]), torch.tensor([0, 1, 2])
    changed = Changes(where, torch.tensor([5.0, 4.0]), rows, mask).apply(logits)
    assert changed[0].isnan().any() and changed[1].isnan().any()
    assert changed[2].tolist() == [-inf, 6.0, 3.0]
    assert logits[2].tolist() == [1.0, 2.0, 3.0]


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_log_probabilities_are_those_of_transformers_whatever_chose_the_token(stories, overlap):
    rig = make_rig(stories, engine={"overlap": overlap})
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    asked: list[dict[str, Any]] = [
        {"logprobs": 5},
        {"logprobs": 0, "temperature": 0.9, "seed": 1},
        {"logprobs": 20, "temperature": 1.5, "top_k": 30, "min_p": 0.01, "seed": 2},
        {"logprobs": 3, "logit_bias": ((400, 100.0),)},
        {"max_tokens": 4},
        {"logprobs": 2, "constraint": Constraint("json_object")},
    ]
    requests = [request(i, [1, 403, 407, 261 + i], **{"max_tokens": 15, **kind}) for i, kind in enumerate(asked)]
    for one, events in zip(requests, rig.run(requests).values(), strict=True):
        tokens, reports = answer(events), [report for event in events for report in event.logprobs]
        if one.sampling.logprobs is None:
            assert not reports
            continue
        assert [len(event.logprobs) for event in events] == [len(event.tokens) for event in events]
        with torch.no_grad():
            logits = theirs(torch.tensor([[*one.prompt, *tokens]])).logits[0, len(one.prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for token, report, row in zip(tokens, reports, expected, strict=True):
            assert report.token == token and report.logprob == pytest.approx(float(row[token]), abs=2e-4)
            best = row.topk(max(1, one.sampling.logprobs))
            assert len(report.top) == one.sampling.logprobs
            for (id, value), theirs_value in zip(report.top, best.values.tolist(), strict=False):
                assert value == pytest.approx(theirs_value, abs=2e-4) == pytest.approx(float(row[id]), abs=2e-4)


def test_log_probabilities_are_numbers_even_where_the_model_excludes_a_token(model):
    rig = make_rig(model)
    head = rig.runner.stack.head
    weight = head.base.forward(torch.zeros(1, 48))
    rig.runner.stack.head = _Excluding(head, weight)  # type: ignore[assignment]
    (event,) = rig.run([request(1, [5], max_tokens=1, logprobs=20)])[1]
    (report,) = event.logprobs
    assert report.top[0] == (report.token, report.logprob)
    assert report.logprob == 0.0 and [value for _, value in report.top[1:]] == [LEAST_LOGPROB] * 19


class _Excluding:
    """A head whose logits are minus infinity but for one token."""

    def __init__(self, head: Any, like: torch.Tensor) -> None:
        self._head, self._like = head, like

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(normed), self._like.shape[1]), -torch.inf)
        logits[:, 33] = 5.0
        return logits


def test_a_step_without_such_requests_does_nothing_for_them(model, monkeypatch):
    """Greedy and drawn requests as of old: no row is copied, changed or reported."""
    import clif.engine.runner as runner

    def never(*_: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(runner, "changes_of", never)
    monkeypatch.setattr(runner, "logprobs_of", never)
    rig = make_rig(model, engine={"overlap": True})
    drawn = {"temperature": 1.0, "top_k": 9, "seed": 1}
    events = rig.run([request(1, [5], max_tokens=9), request(2, [5], max_tokens=9, **drawn)])
    assert all(events.values()) and not any(event.logprobs for got in events.values() for event in got)
