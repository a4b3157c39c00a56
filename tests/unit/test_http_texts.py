"""/v1/completions, /v1/responses, /v1/models and the tokenizer's routes, as the openai client sees them."""

import httpx
import openai
import pytest
from http_run import HttpRun, http_run
from text_replica import TEXT, tokenizer

IDS = tokenizer().encode_text("Hello")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with http_run(tmp_path_factory.mktemp("texts")) as run:
        yield run


@pytest.fixture(scope="module")
def completions(run):
    return run.client().completions


@pytest.fixture(scope="module")
def responses(run):
    return run.client().responses


def by_index(chunks, name="text"):
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + getattr(choice, name)
    return found


# --- /v1/completions -----------------------------------------------------------------------------


def test_a_prompt_is_a_text_or_token_ids_and_there_may_be_several(completions):
    texts = [
        [c.text for c in completions.create(model="clif", prompt=prompt, temperature=0).choices]
        for prompt in ("Hello", IDS, ["Hello", "Bye"], [IDS, IDS])
    ]
    assert texts[0] == texts[1] == texts[2][:1] == texts[3][:1] and len(texts[2]) == len(texts[3]) == 2
    assert texts[2][0] != texts[2][1]


def test_choices_are_numbered_prompt_by_prompt_and_stream_as_they_answer(completions):
    asked = {"model": "clif", "prompt": ["Hello", "Bye"], "n": 2, "seed": 5, "max_tokens": 12}
    whole = completions.create(**asked)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    assert [c.text.split(":")[0] for c in whole.choices] == ["5", "6", "5", "6"]
    assert by_index(completions.create(**asked, stream=True)) == {c.index: c.text for c in whole.choices}
    assert whole.usage.prompt_tokens == len("HelloBye") and whole.usage.completion_tokens == 48


@pytest.mark.parametrize("prompt", ["Hello", IDS])
def test_echo_puts_the_prompt_first(completions, prompt):
    asked = {"model": "clif", "prompt": prompt, "seed": 5, "max_tokens": 3, "echo": True, "n": 2}
    assert [c.text for c in completions.create(**asked).choices] == ["Hello5: ", "Hello6: "]
    assert by_index(completions.create(**asked, stream=True)) == {0: "Hello5: ", 1: "Hello6: "}


def test_log_probabilities_have_the_offsets_of_their_tokens(completions):
    asked = {"model": "clif", "prompt": "Hello", "seed": 5, "max_tokens": 3, "logprobs": 2}
    found = completions.create(**asked).choices[0].logprobs
    assert (found.tokens, found.text_offset) == (["5", ":", " "], [0, 1, 2])
    assert [len(top) for top in found.top_logprobs] == [2, 2, 2]
    chunks = [c.choices[0].logprobs for c in completions.create(**asked, stream=True) if c.choices]
    assert sum((chunk.text_offset for chunk in chunks), []) == [0, 1, 2]  # noqa: RUF017


def test_an_echo_with_log_probabilities_has_every_token_also_the_last(completions):
    """As lm-eval-harness reads it: null for the first token, and the one that was answered comes last."""
    asked = {"model": "clif", "prompt": "Hi!", "temperature": 0, "max_tokens": 1, "echo": True, "logprobs": 1}
    (choice,) = completions.create(**asked).choices
    found = choice.logprobs
    assert choice.text.startswith("Hi!") and found.tokens[:3] == ["H", "i", "!"] and len(found.tokens) == 4
    assert found.token_logprobs[0] is None is found.top_logprobs[0] and None not in found.token_logprobs[1:]
    assert found.text_offset[:4] == [0, 1, 2, 3]
    chunks = [c.choices[0].logprobs for c in completions.create(**asked, stream=True) if c.choices]
    assert [token for chunk in chunks if chunk for token in chunk.tokens] == found.tokens
    plain = completions.create(**{**asked, "max_tokens": 200, "echo": False}).choices[0]
    ended = completions.create(**{**asked, "max_tokens": 200}).choices[0]
    assert ended.finish_reason == "stop" and len(ended.logprobs.tokens) == 3 + len(plain.logprobs.tokens) + 1


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"prompt": []}, "prompt", "no entries"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [257]}, "prompt", "0 to 256"),
        ({"prompt": [-1]}, "prompt", "0 to 256"),
        ({"prompt": [1.5]}, "prompt", "valid"),
        ({"prompt": ["a"] * 17}, "prompt", "this server allows 16"),
        ({"suffix": "x"}, "suffix", "is not offered"),
        ({"best_of": 3}, "best_of", "is not offered"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_name(completions, asked, param, said):
    with pytest.raises(openai.BadRequestError) as error:
        completions.create(**{"model": "clif", "prompt": "Hello", **asked})
    assert error.value.param.startswith(param) and said in error.value.message


# --- /v1/responses -------------------------------------------------------------------------------


def test_a_response_has_the_text_and_how_it_ended(responses):
    whole = responses.create(model="clif", input="Hello", instructions="Be brief", temperature=0)
    assert whole.output_text.endswith(TEXT) and whole.status == "completed" and whole.store is False
    assert whole.usage.input_tokens == len("Be brief\nHello\n")
    cut = responses.create(model="clif", input="Hello", max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_an_answer_is_sent_back_with_the_next_input(responses):
    first = responses.create(model="clif", input="Hello", temperature=0)
    items = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "More"}]
    second = responses.create(model="clif", input=items, temperature=0)
    assert second.usage.input_tokens == len(f"Hello\n{first.output_text}\nMore\n".encode())


def test_a_stream_of_a_response_has_all_events_in_order(responses):
    asked = {"model": "clif", "input": "Hello", "include": ["message.output_text.logprobs"]}
    asked["extra_body"] = {"seed": 5}
    events = list(responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    whole = responses.create(**asked)
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-1].response.output_text
    assert sum(len(event.logprobs) for event in deltas) == len(whole.output[0].content[0].logprobs)


def test_the_clients_own_stream_of_a_response_ends_with_the_whole(run: HttpRun):
    with run.client().responses.stream(model="clif", input="Hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text.endswith(TEXT)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"extra_body": {"stop": ["a"]}}, "stop"),
    ],
)
def test_what_needs_a_state_or_tools_is_refused_by_name(responses, asked, param):
    with pytest.raises(openai.BadRequestError) as error:
        responses.create(**{"model": "clif", "input": "Hello", **asked})
    assert error.value.param.startswith(param)


# --- models and tokens ---------------------------------------------------------------------------


def test_models_are_listed_and_each_can_be_looked_up(run: HttpRun):
    models = run.client().models
    assert [model.id for model in models.list()] == ["base", "clif"]
    assert models.retrieve("clif").owned_by == "clif"
    with pytest.raises(openai.NotFoundError, match="clif@v0099"):
        models.retrieve("clif@v0099")


def test_texts_and_conversations_are_tokenised_as_requests_are(run: HttpRun):
    assert run.post("/tokenize", {"prompt": "Hello"}).json() == {"tokens": IDS, "count": 5, "max_model_len": 512}
    messages = {"messages": [{"role": "user", "content": "Hello"}]}
    assert run.post("/tokenize", messages).json()["count"] == 6
    assert run.post("/detokenize", {"tokens": IDS}).json() == {"prompt": "Hello"}
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [9999]}), ("/detokenize", {"tokens": ["a"]})):
        assert run.post(path, body).status_code == 400


def test_health_readiness_and_version_are_told(run: HttpRun):
    assert run.get("/health").json() == {"status": "ok"}
    assert run.get("/ready").json() == {"ready": True, "reason": ""}
    assert set(run.get("/version").json()) == {"version", "engine"}


def test_every_answer_has_an_id_which_is_the_clients_if_it_gives_one(run: HttpRun):
    ids = [run.get("/version").headers["x-request-id"], run.get("/none").headers["x-request-id"]]
    assert len({*ids}) == 2 and all(i.startswith("req-") for i in ids)
    given = {"x-request-id": "mine-1"}
    asked = {"model": "clif", "prompt": "Hello", "max_tokens": 2}
    answer = httpx.post(f"{run.url}/v1/completions", json=asked, headers=given, timeout=20)
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine-1"
    assert run.client().completions.create(**asked)._request_id.startswith("req-")


def test_the_document_names_every_route_and_resolves(run: HttpRun):
    document = run.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/tokenize"} <= set(
        document["paths"]
    )
    text, known = str(document), document["components"]["schemas"]
    assert all(f"#/components/schemas/{name}" not in text or name in known for name in known) and "$defs" not in text
