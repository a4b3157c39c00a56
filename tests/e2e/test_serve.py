"""`clif serve` as its users start it: a real model, and what becomes of clients when a process is killed."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from http_run import eventually
from served import TINY, Served

from clif import LLM, Sampling

PROMPTS = ["Once upon a time", "In the beginning", "naïve 猫"]
SMALL = ("train.enabled=false", "model.max_context=256", "engine.kv_tokens=4096")
STREAMS = 12


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.slow  # 20 s on an idle machine: a server and the library each load a model
def test_greedy_tokens_over_http_are_those_of_the_library(tmp_path: Path) -> None:
    with LLM(TINY, model={"max_context": 256, "dtype": "float32"}) as llm:
        expected = llm.generate(PROMPTS, Sampling(max_tokens=24))
    with Served(tmp_path, *SMALL, "model.dtype=float32") as server:
        completions = client_of(server).completions
        answer = completions.create(model="clif", prompt=PROMPTS, temperature=0, max_tokens=24)
        assert [choice.text for choice in answer.choices] == [completion.text for completion in expected]
        assert answer.usage.completion_tokens == sum(len(completion.token_ids) for completion in expected)
        chunks = completions.create(model="base", prompt=PROMPTS[0], temperature=0, max_tokens=24, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0].text


def test_every_stream_has_one_end_when_the_control_process_is_killed(tmp_path: Path) -> None:
    with Served(tmp_path, *SMALL[:2], "engine.kv_tokens=16384", "engine.emulated=20") as server:
        asked = {"model": "clif", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "stream": True}
        begun: list[int] = []

        def follow(number: int) -> list[str]:
            """The lines of a stream up to its end, or to the end of the connection."""
            lines = []
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    if len(lines) == 3:
                        begun.append(number)
            return [line for line in lines if line]

        with ThreadPoolExecutor(STREAMS) as pool:
            following = [pool.submit(follow, number) for number in range(STREAMS)]
            eventually(lambda: len(begun) == STREAMS)
            server.processes["control"].send_signal(signal.SIGKILL)
            ends = [stream.result() for stream in following]
        for lines in ends:
            errors = [line for line in lines if '"error"' in line]
            assert len(errors) == 1 and errors == lines[-1:] and "the control process ended" in errors[0]
            assert "data: [DONE]" not in lines
