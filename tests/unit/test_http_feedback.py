"""Feedback: what is kept of it, what is refused and why, and that it becomes a version that answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from http_run import HttpRun, eventually, http_run

from clif.frontend.asking import Asked
from clif.frontend.choices import Choices
from clif.frontend.recent_answers import RecentAnswers
from clif.jobs.screening import objection
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.storage.api_keys import ApiKey, hash_of, line_of, new_key
from clif.types import FinishReason, Request, Sampling, TokenEvent

ME, YOU = new_key(), new_key()
ASK = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("answer", "given", "said"),
    [
        ("A good answer.\n\n- with a list\t🙂", "another", ""),
        ("Ünï çödé 🙂 " * 3, None, ""),
        (" \n", None, "is empty"),
        ("yes ", "yes", "equals the one that was given"),
        ("a\x00b", None, "control characters"),
        ("a\u0378", None, "control characters"),
        ("ha " * 200, None, "repeats itself"),
        pytest.param("the key is " + new_key(), None, "a key or an access token", id="key"),
        ("-----BEGIN RSA PRIVATE KEY-----", None, "a key or an access token"),
        ("AKIA" + "A" * 16, None, "a key or an access token"),
    ],
)
def test_an_answer_that_must_not_be_learned_is_refused_with_its_reason(answer, given, said):
    assert (said in objection(answer, given)) if said else not objection(answer, given)


def answered(number: int, text: str = "yes") -> Choices:
    tokenizer = byte_tokenizer(512)
    request = Request(id=number, prompt=(1, 2), sampling=Sampling())
    choices = Choices(Asked((request,), "clif", "me"), tokenizer)
    tokens = tuple(tokenizer.encode_answer(text))
    choices.take([TokenEvent(request_id=number, tokens=tokens, version=3, finish=FinishReason.STOP)])
    return choices


def test_answers_are_kept_for_a_while_and_as_many_as_may_and_none_where_feedback_is_not_allowed():
    now = 0.0
    recent = RecentAnswers(2, 10.0, lambda: now)
    for number in (10, 11, 12):
        recent.remember(answered(number), "me")
        now += 1
    assert recent.find("chatcmpl-a") is None and len(recent) == 2
    kept = recent.find("cmpl-b")
    assert kept is not None and (kept.texts, kept.version, [*kept.prompts[0]]) == (("yes",), 3, [1, 2])
    for wrong in ("", "b", "chatcmpl-", "chatcmpl-b ", "chatcmpl-" + "f" * 17, "chatcmpl-0b\n"):
        assert recent.find(wrong) is None
    now = 11.5
    assert recent.find("cmpl-b") is None and recent.find("cmpl-c") is not None
    off = RecentAnswers(0, 10.0)
    off.remember(answered(1), "me")
    assert not len(off)


def test_an_answer_that_did_not_come_to_its_end_is_not_kept():
    recent = RecentAnswers(2, 10.0)
    recent.remember(
        Choices(Asked((Request(id=1, prompt=(1,), sampling=Sampling()),), "clif", "me"), byte_tokenizer(512)), ""
    )
    assert not len(recent)


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feedback")
    keys = folder / "keys.jsonl"
    mine = ApiKey(name="me", sha256=hash_of(ME))
    yours = ApiKey(name="you", sha256=hash_of(YOU), feedback_per_hour=1)
    keys.write_text(f"{line_of(mine)}\n{line_of(yours)}\n")
    keys.chmod(0o600)
    sections: dict[str, dict[str, Any]] = {
        "run": {"drain_s": 0.5},
        "train": {"enabled": True, "lr": 0.01},
        "federation": {"rounds": None, "local_steps": 1, "min_members": 1},
        "jobs": {"allow_feedback": True, "feedback_rows": 3, "feedback_wait_s": 1000.0, "own_weight": 0.001},
        "serve": {"http": {"port": 0, "keys_file": str(keys)}},
    }
    with http_run(folder, **sections) as run:
        yield run


def give(run: HttpRun, key: str = ME, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{run.url}/v1/feedback", json=body, headers=headers, timeout=20)


def ask(run: HttpRun, **options: Any) -> Any:
    return (
        run.client().with_options(api_key=ME).chat.completions.create(**{"model": "clif", "messages": ASK, **options})
    )


def test_better_answers_become_a_job_and_a_version_that_answers(run: HttpRun):
    answer = ask(run, n=2)
    assert give(run, response_id=answer.id, answer="Better.").json() == {
        "object": "feedback", "kept": True, "reason": "", "waiting": 1,
    }  # fmt: skip
    again = give(run, response_id=answer.id, answer="Better.").json()
    assert (again["kept"], again["reason"], again["waiting"]) == (False, "it is known already", 1)
    down = give(run, response_id=answer.id, rating="down").json()
    assert not down["kept"] and "counted" in down["reason"]
    up = give(run, response_id=answer.id, choice=1, rating="up").json()
    assert up["kept"] and up["waiting"] == 2
    assert give(run, messages=[{"role": "user", "content": "Bye"}], answer="Bye!").json()["kept"]
    done = eventually_version(run)
    assert done.startswith("clif@v")
    # What the rows say is gone from the store; that they were given stays.
    assert not any(path.name.startswith("file-") for path in run.config.run_dir.glob("files/*"))


def eventually_version(run: HttpRun) -> str:
    eventually(lambda: ask(run).model != "base")
    return str(ask(run).model)


def test_what_cannot_be_kept_is_refused_by_the_name_of_what_is_wrong(run: HttpRun):
    id = ask(run).id
    for body, status, param in (
        ({}, 400, "response_id"),
        ({"response_id": id, "messages": ASK, "answer": "a"}, 400, "response_id"),
        ({"response_id": id}, 400, "answer"),
        ({"messages": ASK}, 400, "answer"),
        ({"messages": ASK, "rating": "up"}, 400, "answer"),
        ({"messages": [*ASK, {"role": "assistant", "content": "a"}], "answer": "b"}, 400, "messages"),
        ({"response_id": id, "answer": "a", "rating": "up"}, 400, "answer"),
        ({"response_id": id, "answer": " "}, 400, "answer"),
        ({"response_id": id, "answer": "a" * 1000 + "b" * 90}, 400, "answer"),
        ({"response_id": id, "choice": 1, "answer": "a"}, 400, "choice"),
        ({"response_id": id, "answer": "a", "rating": "fine"}, 400, "rating"),
        ({"response_id": "chatcmpl-1", "answer": "a"}, 404, "response_id"),
        ({"messages": ASK, "answer": "a", "foo": 1}, 400, "foo"),
    ):
        refused = give(run, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), (body, refused.text)


def test_a_key_does_not_reach_the_answers_of_another_and_has_its_quota(run: HttpRun):
    id = ask(run).id
    assert give(run, YOU, response_id=id, answer="mine").status_code == 404
    assert give(run, YOU, messages=ASK, answer="Something else.").json()["kept"]
    refused = give(run, YOU, messages=ASK, answer="And more.")
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 3000


def test_a_run_that_does_not_allow_feedback_takes_none(tmp_path):
    with http_run(tmp_path) as run:
        refused = run.post("/v1/feedback", {"messages": ASK, "answer": "a"})
        assert refused.status_code == 403 and "jobs.allow_feedback=true" in refused.json()["error"]["message"]
