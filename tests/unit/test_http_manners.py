"""What a server owes to clients that leave, come in crowds, or are there when something dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from http_run import HttpRun, eventually, http_config, http_run

ASK = {"model": "clif", "messages": [{"role": "user", "content": "Hello"}]}
LONG = {**ASK, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
RAW_LONG = {**ASK, "max_tokens": 400, "ignore_eos": True}


def rows_of(run: HttpRun) -> list[dict[str, Any]]:
    """Of requests, after the run."""
    return run.rows("requests")


def free(run: HttpRun) -> bool:
    return run.dispatcher.outstanding == 0 and run.used_tokens == 0


def ask_in_background(run: HttpRun, pool: ThreadPoolExecutor, **asked: Any) -> Any:
    before = run.dispatcher.outstanding
    answer = pool.submit(run.client().chat.completions.create, **{**LONG, **asked})
    eventually(lambda: run.dispatcher.outstanding > before)
    return answer


def test_a_client_that_leaves_cancels_its_requests_and_frees_their_blocks(tmp_path):
    with http_run(tmp_path) as run:
        chunks = run.client().chat.completions.create(**LONG, n=3, stream=True)
        next(iter(chunks))
        assert run.dispatcher.outstanding == 3
        chunks.close()
        eventually(lambda: free(run), 5.0)
        run.hold()
        with pytest.raises(httpx.ReadTimeout, match="timed out"):
            httpx.post(f"{run.url}/v1/chat/completions", json={**RAW_LONG, "n": 2}, timeout=0.3)
        eventually(lambda: run.dispatcher.outstanding == 0, 5.0)
        run.release()
        eventually(lambda: free(run), 5.0)
    ends = [(row["finish"], row["detail"]) for row in rows_of(run)]
    assert ends == [("cancelled", "the client left")] * 5


def test_a_crowd_is_told_when_to_come_again_and_the_others_are_answered(tmp_path):
    with (
        http_run(tmp_path, serve={"http": {"port": 0, "max_waiting": 4, "max_running": 6}}) as run,
        ThreadPoolExecutor(8) as pool,
    ):
        run.hold()
        waiting = [ask_in_background(run, pool, max_tokens=5) for _ in range(4)]
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match=r"4 requests are ahead.*max_waiting is 4") as error:
                run.client().chat.completions.create(**ASK, stream=stream)
            assert error.value.status_code == 503 and error.value.code == "overloaded"
            assert int(error.value.response.headers["retry-after"]) >= 1
        run.release()
        assert all(answer.result().choices for answer in waiting)
        assert run.client().chat.completions.create(**ASK).choices, "it is taken again"


def test_an_answer_that_takes_too_long_is_cancelled(tmp_path):
    with http_run(tmp_path, serve={"http": {"port": 0, "timeout_s": 0.5}}) as run:
        chunks = iter(run.client().chat.completions.create(**LONG, stream=True))
        assert next(chunks).choices[0].delta.role == "assistant"
        run.hold()
        with pytest.raises(openai.APIError, match=r"within 0\.5 s"):
            list(chunks)
        run.release()
        asked = {"max_output_tokens": 400, "extra_body": {"ignore_eos": True}}
        events = iter(run.client().responses.create(model="clif", input="Hello", stream=True, **asked))
        assert next(events).type == "response.created"
        run.hold()
        seen = []
        with pytest.raises(openai.APIError, match=r"within 0\.5 s"):
            for event in events:
                seen.append(event.type)
        assert seen[-1] == "response.failed"
        with pytest.raises(openai.InternalServerError, match=r"within 0\.5 s") as error:
            run.client().chat.completions.create(**ASK)
        assert error.value.status_code == 504
        eventually(lambda: run.dispatcher.outstanding == 0)


def test_a_drain_lets_running_streams_finish_and_takes_no_new_request(tmp_path):
    run = HttpRun(http_config(tmp_path))
    run.start()
    chunks = iter(run.client().chat.completions.create(**LONG, stream=True))
    next(chunks)
    run.drain()
    eventually(lambda: run.get("/ready").status_code == 503)
    with pytest.raises(openai.InternalServerError, match="shutting down") as error:
        run.client().chat.completions.create(**ASK)
    assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "2")
    assert run.get("/health").status_code == 200
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finish[-1] == "length"
    run.stop()
    with pytest.raises(httpx.ConnectError, match="refused"):
        run.get("/health")


def test_a_new_front_end_answers_on_the_same_port_and_the_requests_of_the_one_that_died_are_cancelled(tmp_path):
    with http_run(tmp_path) as run, ThreadPoolExecutor(4) as pool:
        run.hold()
        asked = [ask_in_background(run, pool, stream=stream) for stream in (False, True)]
        old = run.frontend_pid
        os.kill(old, signal.SIGKILL)
        for answer in asked:
            with pytest.raises(openai.APIConnectionError, match="Connection"):
                answer.result()
        eventually(lambda: run.dispatcher.outstanding == 0)
        run.release()
        eventually(lambda: run.frontend_pid != old and is_ready(run))
        assert run.client().chat.completions.create(**ASK).choices[0].finish_reason == "stop"
    ends = [row["finish"] for row in rows_of(run)]
    assert ends == ["cancelled", "cancelled", "stop"]


def is_ready(run: HttpRun) -> bool:
    try:
        return run.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
