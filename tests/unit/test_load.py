"""The load: the same for the same seed, with the statistics that were asked for, and nothing dropped."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import clif.data.load
from clif.config import Config, config_from_tree
from clif.data.instruct import DataError, Row
from clif.data.load import LoadError, generate_arrivals, make_load
from clif.data.traces import TraceError
from clif.errors import ConfigError
from clif.tokenizer import ChatTokenizer
from clif.types import Slo

WORDS = ["turn", "the", "light", "in", "kitchen", "on", "off", "please"]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="the"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return ChatTokenizer(words, None, [len(WORDS)])


@pytest.fixture
def rows() -> list[Row]:
    texts = ("turn the light on", "turn light off", "kitchen on please", "off")
    prompts = [({"role": "user", "content": text},) for text in texts]
    return [Row(id=i, messages=m, answer="a", split="test" if i == 3 else "train") for i, m in enumerate(prompts)]


def config(tmp_path, **load: object) -> Config:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "p", "completion": "c"}))
    return config_from_tree(
        {
            "run": {"seed": 5},
            "model": {"path": "m", "max_context": 16},
            "data": {"path": str(data)},
            "slo": {"ttft_ms": 500, "tpot_ms": 100, "deadline_ms": 4000},
            "load": load,
        }
    )


def trace(tmp_path, *lengths: tuple[int, int]) -> dict[str, object]:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 1000 * i, "input_length": p, "output_length": a} for i, (p, a) in enumerate(lengths)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return {"path": str(path), "format": "mooncake"}


@given(st.floats(0.1, 50), st.floats(0.1, 50))
def test_constant_load_is_evenly_spaced_and_ends_in_time(rate, duration):
    times = [a.at_s for a in generate_arrivals("constant", rate, duration, seed=0)]
    assert times[0] == 0
    assert len(times) == pytest.approx(rate * duration, abs=1)
    assert times[-1] < duration
    assert all(b - a == pytest.approx(1 / rate) for a, b in pairwise(times))


def test_constant_load_brings_no_request_at_its_very_end():
    assert len(generate_arrivals("constant", 0.1, 30, seed=0)) == 3


@pytest.mark.parametrize(("kind", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 3.0)])
def test_random_load_has_the_rate_and_the_burstiness_that_were_asked_for(kind, cv):
    times = [a.at_s for a in generate_arrivals(kind, 20.0, 2000.0, seed=1, cv=cv)]
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert 0 <= times[0] <= times[-1] < 2000
    assert len(times) / 2000 == pytest.approx(20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("kind", ["constant", "poisson", "gamma"])
def test_max_requests_cuts_the_load_and_the_seed_fixes_it(kind):
    whole = generate_arrivals(kind, 5.0, 20.0, seed=3, cv=2.0)
    assert generate_arrivals(kind, 5.0, 20.0, seed=3, cv=2.0, max_requests=4) == whole[:4]
    if kind != "constant":
        assert generate_arrivals(kind, 5.0, 20.0, seed=4, cv=2.0) != whole


@pytest.mark.parametrize("kind", ["constant", "poisson", "gamma"])
def test_a_load_of_too_many_requests_is_an_error_that_comes_at_once(kind, monkeypatch):
    monkeypatch.setattr(clif.data.load, "MOST_REQUESTS", 1000)
    with pytest.raises(LoadError, match=r"more than 1,000 requests come in 60 s .*: lower load\.duration_s"):
        generate_arrivals(kind, 1e300, 60.0, seed=0, cv=100)
    assert len(generate_arrivals(kind, 1e300, 60.0, seed=0, cv=100, max_requests=7)) == 7


def test_a_load_without_any_request_is_an_error():
    with pytest.raises(LoadError, match=r"raise load\.duration_s or load\.rate_rps"):
        generate_arrivals("poisson", 1e-6, 1.0, seed=0)


def test_requests_carry_ids_prompts_sampling_and_slo_of_the_configuration(tmp_path, rows, tokenizer):
    conf = config(tmp_path, kind="poisson", rate_rps=10, duration_s=5, max_tokens=9, top_k=3, temperature=0.5)
    load = make_load(conf, rows, tokenizer)
    assert make_load(conf, rows, tokenizer) == load
    assert [s.request.id for s in load] == list(range(len(load)))
    assert [s.at_s for s in load] == sorted(s.at_s for s in load)
    trained = {tuple(tokenizer.encode_chat(row.messages)) for row in rows[:3]}
    assert {s.request.prompt for s in load} == trained
    assert {s.request.slo for s in load} == {Slo(ttft_s=0.5, tpot_s=0.1, deadline_s=4.0)}
    assert {(s.request.sampling.max_tokens, s.request.sampling.top_k) for s in load} == {(9, 3)}
    assert len({s.request.sampling.seed for s in load}) == len(load)


def test_greedy_requests_have_no_seed_and_no_load_is_no_request(tmp_path, rows, tokenizer):
    load = make_load(config(tmp_path, kind="constant", duration_s=3), rows, tokenizer)
    assert [s.request.sampling.seed for s in load] == [None] * 3
    assert make_load(config(tmp_path), rows, tokenizer) == []


def test_trace_lengths_are_met_exactly_and_too_long_requests_are_not_dropped(tmp_path, rows, tokenizer):
    lengths = ((2, 5), (1000, 7), (0, 0))
    tree = trace(tmp_path, *lengths) | {"lengths": "trace", "speed": 2}
    load = make_load(config(tmp_path, kind="trace", trace=tree), rows, tokenizer)
    assert [s.at_s for s in load] == [0, 0.5, 1]
    asked = [(len(s.request.prompt), s.request.sampling.max_tokens) for s in load]
    assert asked == [(2, 5), (1000, 7), (1, 1)]
    assert all(s.request.sampling.ignore_eos for s in load)


def test_trace_lengths_are_scaled_then_cut_and_a_line_says_how_many(tmp_path, rows, tokenizer, caplog):
    tree = trace(tmp_path, (2, 5), (1000, 70), (12, 4)) | {"lengths": "trace", "prompt_scale": 0.25}
    tree |= {"answer_scale": 2, "max_prompt_tokens": 100, "max_answer_tokens": 12}
    caplog.set_level("INFO")
    load = make_load(config(tmp_path, kind="trace", trace=tree), rows, tokenizer)
    assert [(len(s.request.prompt), s.request.sampling.max_tokens) for s in load] == [(1, 10), (100, 12), (3, 8)]
    assert "3 prompts and 3 answers of 3 were scaled or cut" in caplog.text


def test_a_trace_that_no_memory_holds_is_refused_before_it_is_made(tmp_path, rows, tokenizer):
    tree = trace(tmp_path, *[(9_000_000, 1)] * 50) | {"lengths": "trace"}
    with pytest.raises(TraceError, match=r"450,000,000 tokens together.* set load\.trace\.max_prompt_tokens"):
        make_load(config(tmp_path, kind="trace", trace=tree), rows, tokenizer)
    make_load(config(tmp_path, kind="trace", trace=tree | {"max_prompt_tokens": 9}), rows, tokenizer)


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize(("scale", "block"), [(1.0, 512), (0.1, 51.2), (0.001, 0.512)])
def test_prompts_share_their_beginnings_as_the_hash_ids_of_the_trace_say(tmp_path, rows, tokenizer, scale, block):
    requests = [
        (1600, [7, 8, 9, 10]), (1600, [7, 8, 9, 10]), (1500, [7, 8, 11]), (2000, [7]), (700, [8, 9]), (600, [12]),
    ]  # fmt: skip
    tree = trace(tmp_path, *[(length, 5) for length, _ in requests]) | {"lengths": "trace", "prompt_scale": scale}
    file = tmp_path / "trace.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(x | {"hash_ids": r[1]}) for x, r in zip(lines, requests, strict=True)))
    load = make_load(config(tmp_path, kind="trace", trace=tree), rows, tokenizer)
    prompts = [s.request.prompt for s in load]
    assert [len(p) for p in prompts] == [max(1, round(length * scale)) for length, _ in requests]
    assert prompts[0] == prompts[1]
    # What differs is drawn at random, of 8 tokens: it may be equal for a while.
    for a, b, blocks in ((0, 2, 2), (0, 3, 1), (2, 3, 1), (0, 4, 0), (4, 5, 0)):
        assert round(blocks * block) <= shared(prompts[a], prompts[b]) <= round(blocks * block) + 6


def test_trace_times_with_data_lengths_use_whole_prompts(tmp_path, rows, tokenizer):
    tree = trace(tmp_path, (2, 5), (1000, 7))
    load = make_load(config(tmp_path, kind="trace", trace=tree, split="test", max_tokens=6), rows, tokenizer)
    assert [s.request.prompt for s in load] == [tuple(tokenizer.encode_chat(rows[3].messages))] * 2
    assert [(s.request.sampling.max_tokens, s.request.sampling.ignore_eos) for s in load] == [(6, False)] * 2


@pytest.mark.parametrize("temperature", [1e-300, 1e300, -1])
def test_a_temperature_that_cannot_be_meant_is_refused(tmp_path, temperature):
    with pytest.raises(ConfigError, match=r"load\.temperature is .*: it must be 0 \(greedy\) or from 1e-08 to 1000"):
        config(tmp_path, kind="constant", temperature=temperature)


def test_what_cannot_be_made_is_an_error(tmp_path, rows, tokenizer):
    with pytest.raises(DataError, match='no row has the split "dev"'):
        make_load(config(tmp_path, kind="constant", split="dev"), rows, tokenizer)
    tree = trace(tmp_path, (2, 5)) | {"start_s": 10}
    with pytest.raises(TraceError, match="the trace is 0 s long"):
        make_load(config(tmp_path, kind="trace", trace=tree), rows, tokenizer)
