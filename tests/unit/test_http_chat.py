"""/v1/chat/completions, as the openai client sees it."""

import pytest
from http_run import HttpRun, http_run
from text_replica import TEXT

ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with http_run(tmp_path_factory.mktemp("chat"), replicas=2) as run:
        yield run


def test_an_answer_has_text_usage_and_the_version_that_answered(run: HttpRun) -> None:
    client = run.client()
    answer = client.chat.completions.with_raw_response.create(model="clif", messages=ASK, temperature=0)
    whole = answer.parse()
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop" and TEXT in text
    # A token for each byte, and the one that ends the answer.
    assert whole.usage.completion_tokens == len(text.encode()) + 1
    assert whole.usage.prompt_tokens == len("Hello\n")
    assert (whole.model, answer.headers["x-clif-version"]) == ("base", "0")
