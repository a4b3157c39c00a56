"""/v1/chat/completions, as the openai client sees it."""

import asyncio
import json

import httpx
import openai
import pytest
from http_run import HttpRun, http_run
from text_replica import LIKELIEST, NEXT, TEXT

ASK = [{"role": "user", "content": "Hello"}]
PROMPT = "Hello\n"
"""Without a template, the contents are joined by newlines."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with http_run(tmp_path_factory.mktemp("chat"), replicas=2) as run:
        yield run


@pytest.fixture(scope="module")
def chat(run):
    return run.client().chat.completions


def streamed(chunks) -> dict[int, dict]:
    """By choice: its text, log-probabilities, and reasons to end."""
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found = choices.setdefault(choice.index, {"text": "", "logprobs": [], "finish": []})
            found["text"] += choice.delta.content or ""
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
            found["finish"] += [choice.finish_reason] if choice.finish_reason else []
    return choices


def test_an_answer_has_text_usage_and_the_version_that_answered(chat):
    answer = chat.with_raw_response.create(model="clif", messages=ASK, temperature=0)
    whole = answer.parse()
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop" and text.endswith(TEXT)
    # A token for each byte, and the one that ends the answer.
    assert whole.usage.completion_tokens == len(text.encode()) + 1
    assert whole.usage.prompt_tokens == len(PROMPT)
    assert (whole.model, answer.headers["x-clif-version"]) == ("base", "0")
    assert whole.system_fingerprint.endswith("-v0000")


def test_a_stream_has_the_same_text_as_an_answer_in_one(chat):
    asked = {"model": "clif", "messages": ASK, "n": 3, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = chat.create(**asked)
    chunks = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))
    choices = streamed(chunks)
    assert {c.index: c.message.content for c in whole.choices} == {i: c["text"] for i, c in choices.items()}
    assert {c.index: c.logprobs.content for c in whole.choices} == {i: c["logprobs"] for i, c in choices.items()}
    assert [c["finish"] for c in choices.values()] == [["stop"]] * 3
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_each_event_has_the_usage_so_far_where_it_is_asked_for(chat):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat.create(model="clif", messages=ASK, stream=True, stream_options=options))
    counted = [chunk.usage.completion_tokens for chunk in chunks]
    assert counted == sorted(counted) and counted[0] < counted[-1]
    assert all(chunk.usage.prompt_tokens == len(PROMPT) for chunk in chunks)


def test_a_text_is_streamed_in_whole_characters(chat):
    pieces = [c.choices[0].delta.content for c in chat.create(model="clif", messages=ASK, stream=True) if c.choices]
    assert len([piece for piece in pieces if piece]) > len(TEXT) / 2, "it comes as it grows"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(filter(None, pieces))


def test_each_choice_has_a_seed_of_its_own_and_a_seed_gives_the_same_answers(chat):
    def texts(**asked):
        return [c.message.content for c in chat.create(model="clif", messages=ASK, n=4, **asked).choices]

    assert len(set(texts(seed=7))) == 4
    assert texts(seed=7) == texts(seed=7) != texts(seed=9)
    assert len(set(texts(temperature=0))) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(chat, stream):
    asked = {"model": "clif", "messages": ASK, "stop": ["are cut", "nowhere"], "stream": stream}
    answer = chat.create(**asked)
    found = streamed(answer)[0] if stream else None
    text = found["text"] if found else answer.choices[0].message.content
    assert text.endswith("texts ") and (found["finish"] if found else [answer.choices[0].finish_reason]) == ["stop"]


def test_max_tokens_and_max_completion_tokens_cut_an_answer(chat):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat.create(model="clif", messages=ASK, **{name: 5})
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def test_ignore_eos_goes_on_to_max_tokens(chat):
    answer = chat.create(model="clif", messages=ASK, max_tokens=300, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 300)


def test_log_probabilities_have_the_bytes_of_the_text(chat):
    answer = chat.create(model="clif", messages=ASK, logprobs=True, top_logprobs=3).choices[0]
    content = answer.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == answer.message.content
    assert {token.logprob for token in content} == {LIKELIEST}
    assert [top.logprob for top in content[0].top_logprobs] == [LIKELIEST, NEXT, NEXT - 1]
    assert chat.create(model="clif", messages=ASK, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_messages_have_texts_or_lists_of_them_and_answers_may_be_sent_back(chat):
    first = chat.create(model="clif", messages=ASK, temperature=0).choices[0].message
    parts = [{"type": "text", "text": "Go "}, {"type": "text", "text": "on"}]
    asked = [*ASK, first, {"role": "developer", "content": parts}]
    answer = chat.create(model="clif", messages=asked, temperature=0)
    assert answer.usage.prompt_tokens == len(f"{PROMPT}{first.content}\nGo on\n".encode())


def test_what_clients_send_by_default_has_no_effect_and_is_taken(chat):
    harmless = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "none", "n": 1,
        "service_tier": "auto", "parallel_tool_calls": True, "frequency_penalty": 0, "presence_penalty": 0,
        "logit_bias": {}, "response_format": {"type": "text"}, "stop": None, "seed": None, "logprobs": False,
    }  # fmt: skip
    assert chat.create(model="clif", messages=ASK, **harmless, extra_body={"top_k": -1, "min_p": 0.0}).choices


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"temperature": 5000}, "temperature", "it must be"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "this server allows 16"),
        ({"seed": -1}, "seed", "from 0"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": 5}, "stop", "valid string or"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": "\ufffd"}, "stop", "match pattern"),
        ({"logit_bias": {"700": 1}}, "logit_bias", "0 to 256"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "is no token id"),
        ({"logit_bias": {"0" * 5000: 1}}, "logit_bias", "is no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"top_logprobs": 2}, "top_logprobs", "belongs to logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "give one"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"extra_body": {"foo": 1}}, "foo", "unknown parameter: foo"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty", "is not offered"),
        ({"store": True}, "store", "is not offered"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "is not offered"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "is not offered"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string or"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "text goes in",
        ),
        ({"messages": [*ASK, {"role": "user", "content": "", "name": "x"}]}, "messages[1].name", "is not offered"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(chat, asked, param, said):
    with pytest.raises(openai.BadRequestError) as error:
        chat.create(**{"model": "clif", "messages": ASK, **asked})
    assert error.value.param == param and said in error.value.message
    assert error.value.type == "invalid_request_error"


def test_an_unknown_model_is_not_found(chat):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="no model gpt-4") as error:
            chat.create(model="gpt-4", messages=ASK, stream=stream)
        assert (error.value.param, error.value.code) == ("model", "model_not_found")


def test_what_exceeds_the_context_is_refused_with_the_numbers(chat):
    with pytest.raises(openai.BadRequestError, match=r"512 tokens, prompt and answer.* has 601") as error:
        chat.create(model="clif", messages=[{"role": "user", "content": "x" * 600}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="has 6, and 507 are asked for"):
        chat.create(model="clif", messages=ASK, max_tokens=507)
    assert chat.create(model="clif", messages=ASK, max_tokens=506).choices


def test_bodies_that_are_no_json_are_refused(run: HttpRun):

    url = f"{run.url}/v1/chat/completions"
    for body in (b"", b"{", b"[1]", b'{"model": "clif", "messages": "\xff"}', b"[" * 100_000):
        answer = httpx.post(url, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", body
    assert httpx.post(url, data={"model": "clif"}).status_code == 415


def test_an_answer_in_json_follows_what_is_asked(chat, run: HttpRun):
    """The simulated replicas do not follow it: here it is checked that the request has it."""
    asked = []
    submit = run.dispatcher.submit
    run.dispatcher.submit = lambda now, request, arrival_s=None: (
        asked.append(request) or submit(now, request, arrival_s)
    )
    try:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        chat.create(model="clif", messages=ASK, response_format=shape)
        chat.create(model="clif", messages=ASK, response_format={"type": "json_object"}, logit_bias={"65": -5})
    finally:
        run.dispatcher.submit = submit
    wanted = [request.sampling.constraint for request in asked]
    assert json.loads(wanted[0].schema) == schema and wanted[1].kind == "json_object"
    assert asked[1].sampling.logit_bias == ((65, -5.0),)
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as error:
        shape["json_schema"]["schema"] = {"type": "string", "pattern": "(?=a)b"}
        chat.create(model="clif", messages=ASK, response_format=shape)
    assert error.value.code == "invalid_schema"


def test_a_hundred_clients_at_a_time_each_get_their_own_answer(run: HttpRun):
    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[int, str]:
        asked = {"model": "clif", "messages": ASK, "seed": number}
        if number % 2:
            return number, (await client.chat.completions.create(**asked)).choices[0].message.content
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        return number, streamed(chunks)[0]["text"]

    async def ask_all() -> list[tuple[int, str]]:
        async with run.async_client() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(100)))

    assert asyncio.run(ask_all()) == [(number, f"{number}: {TEXT}") for number in range(100)]
    assert run.used_tokens == 0 and run.dispatcher.outstanding == 0
