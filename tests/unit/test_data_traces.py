"""Traces: three formats, one clock, and errors that name file and line."""

from pathlib import Path

import pytest

from clif.data.traces import Arrival, TraceError, read_trace

SHARED = Path(__file__).resolve().parents[3] / "shared"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:05.9799600,3180,8\r\n"
    "2023-11-16 18:17:04.9799600,110,27\r\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    '45.5,GPT-4,1087,0,1087,"API log"\n'
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    "\n"
    '{"timestamp": 3052, "input_length": 7322, "output_length": 490, "hash_ids": [0]}\n'
)


def arrival(at_s: float, prompt: int, answer: int, *blocks: int) -> Arrival:
    return Arrival(at_s=pytest.approx(at_s), prompt_tokens=prompt, answer_tokens=answer, blocks=blocks)


def mooncake(timestamp: object, prompt: object, answer: object, blocks: str = "[]") -> str:
    return f'{{"timestamp": {timestamp}, "input_length": {prompt}, "output_length": {answer}, "hash_ids": {blocks}}}'


AZURE_ARRIVALS = [arrival(0, 4808, 10), arrival(1, 110, 27), arrival(2, 3180, 8)]


def put(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text, newline="")
    return path


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("azure", AZURE, AZURE_ARRIVALS),
        ("azure", AZURE.replace("99600,", "99600+00:00,"), AZURE_ARRIVALS),
        ("burstgpt", BURSTGPT, [arrival(0, 472, 18), arrival(40.5, 1087, 0)]),
        ("mooncake", MOONCAKE, [arrival(0, 6758, 500, 0, 1), arrival(3.052, 7322, 490, 0)]),
    ],
)
def test_each_format_gives_sorted_arrivals_from_zero(tmp_path, format, text, expected):
    assert read_trace(put(tmp_path, text), format) == expected


def test_offset_is_in_trace_time_and_duration_in_replay_time(tmp_path):
    lines = ["Timestamp,Request tokens,Response tokens", *(f"{t},1,1" for t in range(100, 200))]
    path = put(tmp_path, "\n".join(lines))
    window = read_trace(path, "burstgpt", speed=2, start_s=9.5, duration_s=5)
    assert [a.at_s for a in window] == [0.25 + 0.5 * k for k in range(10)]
    assert read_trace(path, "burstgpt", speed=2, start_s=9.5, duration_s=5, max_requests=3) == window[:3]


@pytest.mark.parametrize(
    ("format", "good", "line", "expected"),
    [
        ("azure", AZURE, "yesterday,1,1", "expected TIMESTAMP,ContextTokens"),
        ("azure", AZURE, "2023-11-16 18:17:05.9799600,3180", "2 cells under 3 columns"),
        ("azure", AZURE, "2023-11-16 18:17:05.9799600,3180,8,9", "4 cells under 3 columns"),
        ("azure", AZURE, "2023-11-16 18:17:05.9799600,many,8", "'many'"),
        ("azure", AZURE, "2023-11-16 18:17:05.9799600,-3,8", "negative"),
        ("burstgpt", BURSTGPT, "nan,ChatGPT,1,1,2,API log", "not finite"),
        ("burstgpt", BURSTGPT, 'x,"ChatGPT,1,1,2,API log', "unexpected end of data"),
        ("mooncake", MOONCAKE, '{"timestamp": 1', "expected {"),
        ("mooncake", MOONCAKE, "[]", "a list instead of an object"),
        ("mooncake", MOONCAKE, '{"timestamp": 1, "input_length": 2}', '"output_length" is missing'),
        ("mooncake", MOONCAKE, '{"timestamp": 1, "input_length": "2", "output_length": 1}', "is not a number"),
        ("azure", AZURE, f"2023-11-16 18:17:05.9799600,{10**18},8", "a number of tokens is above 10,000,000"),
        ("azure", AZURE, f"2023-11-16 18:17:05.9799600,{'9' * 5000},8", "Exceeds the limit"),
        ("burstgpt", BURSTGPT, f"{'9' * 400},ChatGPT,1,1,2,API log", "not finite"),
        (
            "burstgpt",
            BURSTGPT,
            "1700000000000000000,ChatGPT,1,1,2,API log",
            "more than 1e+12 s: correct it, or its unit",
        ),
        ("mooncake", MOONCAKE, mooncake("Infinity", 1, 1), "not finite"),
        ("mooncake", MOONCAKE, mooncake("9" * 400, 1, 1), "too large"),
        ("mooncake", MOONCAKE, mooncake(1, "Infinity", 1), "cannot convert float infinity"),
        ("mooncake", MOONCAKE, mooncake(1, "NaN", 1), "cannot convert float NaN"),
        ("mooncake", MOONCAKE, mooncake(1, "1" + "0" * 400, 1), "above 10,000,000"),
        ("mooncake", MOONCAKE, mooncake(1, 1, 10**18), "above 10,000,000"),
        ("mooncake", MOONCAKE, mooncake(1, 1.5, 1), "1.5 is no whole number"),
        ("mooncake", MOONCAKE, mooncake(1, 1, 1, "[-1]"), '"hash_ids" must be a list'),
        ("mooncake", MOONCAKE, mooncake(1, 1, 1, '["a"]'), '"hash_ids" must be a list'),
        ("mooncake", MOONCAKE, mooncake(1, 1, 1, "[true]"), '"hash_ids" must be a list'),
        ("mooncake", MOONCAKE, mooncake(1, 1, 1, "7"), '"hash_ids" must be a list'),
        ("mooncake", MOONCAKE, "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_file_line_and_expectation(tmp_path, format, good, line, expected):
    number = good.count("\n") + 1
    with pytest.raises(TraceError, match=rf"trace, line {number}: ") as caught:
        read_trace(put(tmp_path, good + line + "\n"), format)
    assert expected in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_wrong_header_is_an_error_that_names_the_missing_columns(tmp_path):
    with pytest.raises(TraceError, match="line 1: the header lacks TIMESTAMP, ContextTokens, Gener"):
        read_trace(put(tmp_path, BURSTGPT), "azure")
    with pytest.raises(TraceError, match="line 1: the header lacks"):
        read_trace(put(tmp_path, ""), "azure")


def test_an_empty_window_is_an_error_that_says_how_long_the_trace_is(tmp_path):
    with pytest.raises(TraceError, match=r"within inf s from 100 s on .* the trace is 40.5 s long"):
        read_trace(put(tmp_path, BURSTGPT), "burstgpt", start_s=100)
    with pytest.raises(TraceError, match="holds no requests"):
        read_trace(put(tmp_path, AZURE.splitlines()[0]), "azure")


def test_a_real_azure_trace_is_read_whole():
    path = SHARED / "data" / "traces" / "azure_llm_2023_code.csv"
    if not path.is_file():
        pytest.skip("../shared/data/traces is not here")
    arrivals = read_trace(path, "azure")
    assert len(arrivals) == 8819
    assert arrivals[0].at_s == 0
    assert 57 * 60 < arrivals[-1].at_s < 58 * 60
