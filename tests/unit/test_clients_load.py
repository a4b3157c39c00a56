"""The load test, against a server over a socket: what it sends, what it measures, and what it says of failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import OpenAiServer, running
from rich.console import Console
from typer.testing import CliRunner

from clif.cli import app
from clif.clients.endpoint import Endpoint
from clif.clients.load_figures import Promise, figures, print_figures
from clif.clients.load_plan import Planned, PromptError, Workload, arrivals_config
from clif.clients.load_run import LoadTest, Outcome, run_load_test
from clif.errors import InputError
from clif.metrics.figures import wilson

HELLO = ({"role": "user", "content": "hello"},)


@pytest.fixture(scope="module")
def shared() -> Iterator[OpenAiServer]:
    with running(OpenAiServer()) as server:
        yield server


@pytest.fixture
def server(shared: OpenAiServer) -> OpenAiServer:
    shared.delay_s, shared.most_open, shared.waits_for = 0.0, 0, 0
    shared.seen.clear()
    return shared


def sent(server: OpenAiServer, model: str, count: int = 1, **options: int | float) -> list[Outcome]:
    test = LoadTest(Endpoint.of(server.url), model, **options)
    return run_load_test(test, [Planned(0.0, HELLO, 4)] * count)


def test_an_answer_is_measured_from_its_planned_time_with_the_servers_count_of_tokens(server):
    (outcome,) = sent(server, "good")
    assert outcome.error == "" and (outcome.prompt_tokens, outcome.completion_tokens) == (7, 4)
    assert len(outcome.deltas) == 4 and outcome.ttft_s == outcome.deltas[0]
    assert outcome.sent_s <= outcome.deltas[0] <= outcome.deltas[-1] <= outcome.ended_s
    (body,) = server.seen
    assert body["stream_options"] == {"include_usage": True} and body["max_tokens"] == 4


@pytest.mark.parametrize("model", ["split", "no-usage"])
def test_answers_in_pieces_and_without_usage_are_measured_alike(server, model):
    (outcome,) = sent(server, model)
    assert outcome.error == "" and outcome.tokens == 4


@pytest.mark.parametrize(
    ("model", "kind", "detail"),
    [
        ("http503", "HTTP 503", "come back later"),
        ("breaks", "broken connection", ""),
        ("cut", "broken connection", ""),
        ("error-event", "bad stream", "the engine is gone"),
        ("garbage", "bad stream", "no chat completion"),
        ("stalls", "timeout", "ReadTimeout"),
    ],
)
def test_each_failure_has_its_kind(server, model, kind, detail):
    (outcome,) = sent(server, model, silent_s=0.3)
    assert outcome.error == kind and detail in outcome.detail
    assert figures([outcome], Promise())["met"] == 0


def test_a_server_that_is_not_there_is_no_connection():
    (outcome,) = run_load_test(LoadTest(Endpoint.of("127.0.0.1:1"), "m"), [Planned(0.0, HELLO, 4)])
    assert outcome.error == "no connection"


def test_requests_above_the_cap_wait_and_their_latency_counts_that(server):
    server.delay_s = 0.1
    outcomes = sent(server, "good", count=6, concurrency=2)
    assert server.most_open == 2
    assert sum(o.held_back for o in outcomes) == 4
    assert max(o.ttft_s for o in outcomes) > 0.3, "three turns of 0.1 s, all planned for the same moment"
    result = figures(outcomes, Promise(ttft_ms=200))
    assert result["held_back"] == 4 and result["met"] < 6


def test_an_open_load_does_not_wait_for_answers(server):
    server.waits_for = 20
    assert [o.error for o in sent(server, "good", count=20)] == [""] * 20


def outcome(ttft: float, gap: float, tokens: int = 11, error: str = "") -> Outcome:
    deltas = [1.0 + ttft + gap * i for i in range(tokens)]
    return Outcome(1.0, 1.001, deltas[-1], deltas=deltas, completion_tokens=tokens, error=error)


def test_goodput_and_attainment_count_whole_answers_within_the_promise():
    outcomes = [outcome(0.1, 0.01), outcome(0.1, 0.03), outcome(0.5, 0.01), outcome(0.1, 0.01, error="HTTP 500")]
    result = figures(outcomes, Promise(ttft_ms=200, tpot_ms=20))
    assert (result["met"], result["attainment"]) == (1, 0.25)
    assert result["attainment_interval"] == wilson(1, 4)
    assert result["duration_s"] == pytest.approx(0.6) and result["goodput_rps"] == pytest.approx(1 / 0.6)
    assert result["errors"] == {"HTTP 500": 1} and result["answered"] == 3
    assert result["tpot_ms"]["p99"] == pytest.approx(30, rel=0.05)
    assert result["send_lag_ms"]["p50"] == pytest.approx(1.0)


def test_figures_of_nothing_are_null_and_can_be_printed():
    console = Console(record=True, width=120)
    print_figures(figures([], Promise()), console)
    assert "0 of 0 requests answered in - s" in console.export_text()


# --- what is planned -----------------------------------------------------------------------------


def test_arrivals_are_poisson_and_the_same_for_the_same_seed():
    workload = Workload(arrivals_config(50.0, 20.0, None), prompt_tokens=9, max_tokens=5, seed=3)
    plan = workload.plan()
    assert plan == workload.plan()
    assert 850 < len(plan) < 1150 and plan[-1].at_s < 20
    assert all(p.max_tokens == 5 and len(p.messages[0]["content"].split()) == 9 for p in plan)
    assert len(Workload(arrivals_config(5.0, None, 7)).plan()) == 7


def test_a_trace_determines_times_and_lengths(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,30,4\n2023-11-16 18:17:07,50,6\n")
    config = arrivals_config(None, None, None, {"path": file, "format": "azure", "speed": 2.0, "lengths": "trace"})
    plan = Workload(config).plan()
    assert [(p.at_s, len(p.messages[0]["content"].split()), p.max_tokens) for p in plan] == [(0, 30, 4), (2, 50, 6)]


def test_prompts_come_from_json_lines_without_their_answers(tmp_path):
    file = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "no"}]
    rows = [{"prompt": "a", "completion": "no"}, {"messages": talk}, {"instruction": "c", "input": "d", "output": "no"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    plan = Workload(arrivals_config(10.0, None, 6), prompts=file).plan()
    assert sorted(p.messages[0]["content"] for p in plan) == ["a", "a", "b", "b", "c\nd", "c\nd"]
    file.write_text('{"prompt": "a"}\n{"text": "b"}')
    with pytest.raises(PromptError, match=r"line 2: no prompt: write messages, prompt or instruction"):
        Workload(arrivals_config(10.0, None, 6), prompts=file).plan()


def test_impossible_loads_are_refused():
    with pytest.raises(InputError, match="rate_rps: Input should be greater than 0"):
        arrivals_config(-1.0, None, None)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_all_figures_with_what_made_them(server, tmp_path):
    file = tmp_path / "out.json"
    words = ["loadtest", server.url, "--rate", "200", "--requests", "12", "--ttft-ms", "60000", "--json", str(file)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "12 of 12 requests answered" in done.output and "attainment of ttft <= 60000 ms: 100.0% (95 %" in done.output
    tree = json.loads(file.read_text())
    assert tree["model"] == "good" and tree["planned"] == 12 and tree["figures"]["answered"] == 12
    assert {"clif", "python", "command_line", "cpu", "version.numpy"} <= tree["provenance"].keys()


def test_two_sources_of_arrivals_are_refused():
    with pytest.raises(InputError, match="--rate and --trace both give the arrivals"):
        CliRunner().invoke(app, ["loadtest", "--rate", "1", "--trace", str(Path(__file__))], catch_exceptions=False)
