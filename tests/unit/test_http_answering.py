"""The answer to one call, with a link that a test speaks for."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from text_replica import tokenizer

from clif.config.serve import HttpConfig
from clif.frontend import answering
from clif.frontend.admission import Load, admit
from clif.frontend.answering import Answer, Serving
from clif.frontend.asking import Asked
from clif.frontend.auth import ANYONE, SCOPE, Caller
from clif.frontend.chat import ChatBody, ChatForm
from clif.frontend.errors import ApiError
from clif.frontend.quotas import KeyUse
from clif.frontend.streams import Rate, Stream
from clif.frontend.strict import parse
from clif.types import FinishReason, Request, Sampling, TokenEvent
from clif.wire.frontend import Refused

BODY = b'{"model": "clif", "messages": [{"role": "user", "content": "Hi"}], "stream": true}'


class FakeLink:
    """Notes what is withdrawn. script: run with the stream once a request was sent."""

    waiting_requests = open_requests = 0
    first_tokens = ends = Rate()

    def __init__(self, script: Callable[[Stream], Any]) -> None:
        self._script, self.withdrawn = script, list[str]()

    def ask(self, requests: tuple[Request, ...], model: str, key: str) -> Stream:
        stream = Stream(request.id for request in requests)
        self._task = asyncio.get_running_loop().create_task(self._script(stream))
        return stream

    def withdraw(self, stream: Stream, reason: str) -> None:
        self.withdrawn.append(reason if stream.open else "")


def event(text: str = "", finish: FinishReason | None = None, version: int = 1, **more: Any) -> TokenEvent:
    ids = tuple(tokenizer().encode_text(text))
    return TokenEvent(request_id=5, tokens=ids, version=version, finish=finish, **more)


def answer(
    script: Callable[[Stream], Any], streams: bool = True, leaves_after: int | None = None
) -> tuple[list[dict], FakeLink]:
    """The messages that are sent. leaves_after: the client leaves once it has got so many."""
    link, sent, left = FakeLink(script), list[dict](), asyncio.Event()
    asked = Asked((Request(id=5, prompt=(1, 2), sampling=Sampling(max_tokens=9)),), "clif", "")

    async def receive() -> dict:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)
        if len(sent) == leaves_after:
            left.set()

    async def call() -> None:
        serving = Serving(HttpConfig(port=0), link, tokenizer())  # type: ignore[arg-type]
        form = ChatForm(parse(ChatBody, BODY), asked, tokenizer())
        scope = {"type": "http", SCOPE: Caller(ANYONE, KeyUse(ANYONE, lambda: 0.0))}
        await asyncio.wait_for(Answer(serving, asked, form, streams)(scope, receive, send), 10)

    asyncio.run(call())
    return sent, link


def body_of(sent: list[dict]) -> str:
    return b"".join(message["body"] for message in sent if message["type"] == "http.response.body").decode()


def text_of(body: str) -> str:
    datas = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content", "") for data in datas for c in data.get("choices", ()))


def test_the_version_that_answers_is_in_the_headers_of_a_stream_too():
    async def script(stream):
        stream.put(event("a"))
        stream.put(event("b", FinishReason.STOP))

    sent, link = answer(script)
    assert (b"x-clif-version", b"1") in sent[0]["headers"] and text_of(body_of(sent)) == "ab"
    assert '"model":"clif@v0001"' in body_of(sent) and body_of(sent).endswith("data: [DONE]\n\n")
    assert link.withdrawn == [""]


def test_what_comes_together_is_sent_together():
    async def script(stream):
        for letter in "abcdef":
            stream.put(event(letter))
        stream.put(event("g", FinishReason.STOP))

    sent, _ = answer(script)
    # Its head, all that has come, and the end.
    assert len(sent) == 3 and text_of(body_of(sent)) == "abcdefg"


def test_a_long_wait_for_the_first_token_is_endured_by_a_comment(monkeypatch):
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.02)

    async def script(stream):
        await asyncio.sleep(0.1)
        stream.put(event("a", FinishReason.STOP))

    sent, _ = answer(script)
    assert b"x-clif-version" not in dict(sent[0]["headers"]), "it is not known yet"
    assert body_of(sent).startswith(": keep-alive\n\n") and text_of(body_of(sent)) == "a"


@pytest.mark.parametrize("finish", [FinishReason.FAILED, FinishReason.CANCELLED, FinishReason.REJECTED])
def test_a_failure_before_the_first_token_is_the_status_of_a_stream(finish):
    async def script(stream):
        stream.put(TokenEvent(request_id=5, finish=finish, detail="the replica burns"))

    with pytest.raises(ApiError, match="the replica burns") as error:
        answer(script)
    assert error.value.status == {"failed": 500, "cancelled": 503, "rejected": 400}[finish.value]


def test_a_failure_in_the_middle_is_the_last_event_of_a_stream():
    async def script(stream):
        stream.put(event("a"))
        await asyncio.sleep(0.01)
        stream.put(event(finish=FinishReason.FAILED, detail="the replica burns"))

    sent, _ = answer(script)
    body = body_of(sent)
    last = json.loads(body.strip().rpartition("data: ")[2])
    assert "the replica burns" in last["error"]["message"] and "[DONE]" not in body
    assert sent[-1]["more_body"] is False, "it ends as it should"


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_begins_again_before_the_client_saw_any_of_it_is_silent(streams):
    async def script(stream):
        stream.put(event("old"))
        stream.restart(5)
        stream.put(event("new", version=2))
        stream.put(event(finish=FinishReason.STOP, version=2))

    sent, _ = answer(script, streams)
    assert "old" not in body_of(sent) and "new" in body_of(sent).replace('"},"logprobs"', "") + text_of(body_of(sent))
    assert (b"x-clif-version", b"2") in sent[0]["headers"]


def test_a_stream_whose_answer_begins_again_ends_with_an_error():
    async def script(stream):
        stream.put(event("old"))
        await asyncio.sleep(0.01)
        stream.restart(5)
        stream.put(event("new", version=2))

    sent, link = answer(script)
    assert '"code":"restarted"' in body_of(sent) and "new" not in body_of(sent)
    assert link.withdrawn != [""], "it is not computed any further"


def test_a_client_that_leaves_ends_the_call_at_once():
    async def script(stream):
        stream.put(event("a"))

    _, link = answer(script, leaves_after=2)
    assert link.withdrawn == ["the client left"]


def test_a_refusal_of_the_control_process_is_an_error():
    async def script(stream):
        stream.stop(Refused("not_found", "no such model", "model"))

    with pytest.raises(ApiError, match="no such model") as error:
        answer(script)
    assert (error.value.status, error.value.param) == (404, "model")


# --- whether more requests are taken -------------------------------------------------------------


def test_retry_after_is_the_time_in_which_as_many_begin_or_end_as_there_are_too_many():
    http = HttpConfig(port=0, max_waiting=10, max_running=20)
    assert admit(Load(waiting=9, running=9), 1, http) == (None, "")
    wait_s, reason = admit(Load(waiting=10, running=10, first_tokens_per_s=0.25), 2, http)
    assert wait_s == 2 / 0.25 and "serve.http.max_waiting is 10" in reason
    wait_s, reason = admit(Load(waiting=0, running=20, ends_per_s=0.5), 5, http)
    assert wait_s == 5 / 0.5 and "serve.http.max_running is 20" in reason
    assert admit(Load(waiting=10, running=10), 1, http)[0] == 1.0, "no rate is known"
    assert admit(Load(waiting=10, running=10, first_tokens_per_s=1e-9), 1, http)[0] == 60.0


def test_a_call_for_more_than_fit_is_taken_when_nothing_is_ahead():
    http = HttpConfig(port=0, max_waiting=2)
    assert admit(Load(waiting=0, running=0), 16, http) == (None, "")
    assert admit(Load(waiting=1, running=1), 16, http)[0] is not None


def test_a_rate_is_that_of_the_last_times():
    rate = Rate(kept=3)
    assert rate.per_s(0.0) == 0.0
    for at in (0.0, 10.0, 11.0, 12.0):
        rate.note(at)
    assert rate.per_s(12.0) == 1.0 and rate.per_s(14.0) == 0.5
