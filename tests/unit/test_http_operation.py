"""/metrics, /admin and the history, over HTTP."""

import asyncio
import json
import os
import re
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_run import HttpRun, eventually, http_config
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner, Result

from clif.cli import app
from clif.clients.operation import Server, status_of
from clif.errors import InputError
from clif.frontend.history import AGES, COLUMNS, History

REPO = Path(__file__).resolve().parents[2]
ASK = [{"role": "user", "content": "Hello"}]


def _ready(run: HttpRun) -> bool:
    try:
        return run.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


COMMANDS = """status URL, status RUN, status URL --json, admin RUN states, admin URL rounds, admin URL events --json,
admin URL jobs, admin URL config, admin URL pause --reason demo, admin URL resume --json, admin URL drain 1,
admin URL undrain 1, admin --json URL versions, admin URL versions, admin URL activate 0, admin URL canary,
admin URL canary 7 0.5, admin URL drain 9, admin URL load folder --adapter support""".replace("\n", " ").split(", ")


def command(words: str) -> Result:
    return CliRunner().invoke(app, words.split(), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[HttpRun, dict[str, Any]]:
    """A run that has ended, and what its routes said last."""
    run, said = HttpRun(http_config(tmp_path_factory.mktemp("operation")), replicas=2), {}
    with run:
        client = run.client()
        for tokens in (1, 5, 64):
            client.chat.completions.create(model="clif", messages=ASK, max_tokens=tokens)
        with client.chat.completions.create(model="clif", messages=ASK, stream=True) as stream:
            next(iter(stream))
        assert run.post("/v1/chat/completions", {"model": "clif"}).status_code == 400
        assert run.get("/v1/nothing").status_code == 404
        eventually(lambda: run.get("/admin/status").json()["status"]["totals"]["requests"]["cancelled"] == 1)
        eventually(lambda: len(run.get("/admin/history").json()["rows"]) >= 2)
        for path in ("metrics", "admin/status", "admin/history", "admin/config"):
            said[path] = run.get(f"/{path}")
        os.kill(run.frontend_pid, signal.SIGKILL)
        eventually(lambda: _ready(run))
        eventually(lambda: "clif:run_seconds" in run.get("/metrics").text)
        said["again"] = run.get("/metrics")
        said["paused"] = run.post("/admin/training/pause", {"reason": "a test"}).json()
        said["drained"] = run.post("/admin/replicas/1/drain", {}).json()
        eventually(lambda: run.get("/admin/status").json()["status"]["drained_count"] == 1)
        said["refused"] = run.post("/admin/replicas/0/drain", {})
        said["resumed"] = httpx.post(f"{run.url}/admin/training/resume").json()
        said["undrained"] = httpx.post(f"{run.url}/admin/replicas/1/undrain").json()
        said["versions"] = run.get("/admin/versions").json()
        said["not versions"] = [
            run.post("/admin/versions/active", {"version": 9}),
            httpx.put(f"{run.url}/admin/versions/canary", json={"version": 9, "share": 0.5}),
            httpx.put(f"{run.url}/admin/versions/canary", json={"version": 9, "share": 2}),
            run.post("/admin/versions/9/pin", {}),
            run.post("/admin/versions/9/unpin", {}),
            run.post("/admin/versions/9/export", {"path": "x"}),
            run.post("/admin/adapters", {"path": "x"}),
            httpx.delete(f"{run.url}/admin/adapters/support"),
            run.post("/admin/versions/active", {"version": 0, "folder": "x"}),
        ]
        said["base"] = run.post("/admin/versions/active", {"version": 0}).json()
        said["no canary"] = httpx.delete(f"{run.url}/admin/versions/canary").json()
        said["cli"] = {
            words: command(words.replace("RUN", str(run.config.run_dir)).replace("URL", run.url)) for words in COMMANDS
        }
        with httpx.stream("GET", f"{run.url}/admin/live") as live:
            lines = live.iter_lines()
            said["live"] = [json.loads(line[6:]) for line in (next(lines) for _ in range(8)) if line[:6] == "data: "]
    return run, said


def families(said: dict[str, Any], which: str = "metrics") -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(said[which].text)}


def value(said: dict[str, Any], name: str, **labels: str) -> float:
    """Of the one sample with these labels."""
    samples = [s for family in families(said).values() for s in family.samples if s.name == name]
    (found,) = [s for s in samples if labels.items() <= s.labels.items()]
    return float(found.value)


def test_metrics_are_the_counts_of_the_tables(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    run, said = ended
    rows = run.rows("requests")
    for finish, n in Counter(row["finish"] for row in rows).items():
        assert value(said, "clif:requests_total", finish=finish) == n
    success = {"stop": "stop", "length": "length", "cancelled": "abort"}
    for finish, name in success.items():
        counted = value(said, "vllm:request_success_total", finished_reason=name, model_name="clif")
        assert counted == sum(row["finish"] == finish for row in rows)
    assert value(said, "vllm:prompt_tokens_total") == sum(row["prompt_tokens"] for row in rows)
    assert value(said, "vllm:generation_tokens_total") == sum(row["output_tokens"] for row in rows)
    answered = [row for row in rows if row["output_tokens"]]
    for name, column in (("time_to_first_token", "ttft_s"), ("e2e_request_latency", "e2e_s")):
        assert value(said, f"vllm:{name}_seconds_count") == len(answered)
        assert value(said, f"vllm:{name}_seconds_sum") == pytest.approx(sum(r[column] for r in answered), abs=1e-4)
    assert value(said, "vllm:inter_token_latency_seconds_count") == len(run.rows("gaps"))
    assert value(said, "clif:version_requests_total", version="base") == len(answered)
    assert value(said, "clif:requests_slo_met_total") == sum(row["slo_met"] for row in rows)


def test_histograms_are_cumulative_and_end_in_their_count(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    found = [family for family in families(ended[1]).values() if family.type == "histogram"]
    assert len(found) == 4
    for family in found:
        buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
        (total,) = [s.value for s in family.samples if s.name.endswith("_count")]
        assert buckets == sorted(buckets) and buckets[-1] == total


def test_counts_go_on_when_the_front_end_is_started_again(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    before, after = (families(ended[1], which) for which in ("metrics", "again"))
    for name in before.keys() - {"clif:http_responses"}:
        if before[name].type in ("counter", "histogram"):
            assert before[name].samples == after[name].samples, name
    assert before["vllm:generation_tokens"].samples[0].value > 0


def test_answers_are_counted_by_route_and_status(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    _, said = ended
    assert value(said, "clif:http_responses_total", route="/v1/chat/completions", code="200") == 4
    assert value(said, "clif:http_responses_total", route="/v1/chat/completions", code="400") == 1
    assert value(said, "clif:http_responses_total", route="other", code="404") == 1


def test_every_metric_of_the_dashboard_exists(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    _, said = ended
    names = {s.name for family in families(said).values() for s in family.samples}
    # These are there once a round has run.
    names |= {"clif:training_loss", "clif:version_heldout_loss"}
    dashboard = json.loads((REPO / "configs/grafana/clif.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if isinstance(v["query"], dict)]
    asked = {name for query in queries for name in re.findall(r"\b(?:vllm|clif):\w+", query)}
    assert len(asked) > 20 and asked <= names, asked - names
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_documented_metrics_are_those_that_there_are(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    there = {s.name for family in families(ended[1]).values() for s in family.samples}
    there |= {"clif:training_loss", "clif:version_heldout_loss"}
    there = {re.sub(r"_(bucket|count|sum)$", "", name) for name in there}
    documented = set(re.findall(r"`((?:vllm|clif):\w+)`", (REPO / "docs/operations.md").read_text()))
    assert documented == there


def test_the_status_and_the_configuration_are_shown(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    run, said = ended
    status = said["admin/status"].json()
    assert status["ready"] and status["status"]["states"].keys() <= {"serving", "idle"}
    assert status["status"]["promise"]["ttft_ms"] == run.config.slo.ttft_ms
    assert said["admin/config"].json() == run.config.model_dump(mode="json")


def test_the_history_has_a_row_for_each_second_and_every_event(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    _, said = ended
    history = said["admin/history"].json()
    rows = [dict(zip(history["columns"], row, strict=True)) for row in history["rows"]]
    assert [row["unix"] for row in rows] == sorted(row["unix"] for row in rows)
    assert {row["replicas"] for row in rows} <= {"ss", "si", "is", "ii"}
    assert [event["number"] for event in history["events"]] == list(range(1, len(history["events"]) + 1))


def test_the_live_stream_sends_the_status_with_a_row(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    message = ended[1]["live"][0]
    assert len(message["row"]) == len(COLUMNS) and message["status"]["run"]["phase"] == "open"
    assert "ttft_s" not in message["status"]["totals"], "what no page shows is not sent"


def test_an_operators_actions_are_answered_with_what_is_so_now(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    _, said = ended
    assert said["paused"] == {"paused": True, "reason": "a test"} and not said["resumed"]["paused"]
    assert said["drained"]["drained"] == "an operator asked for it" and said["undrained"]["drained"] == ""
    assert said["refused"].status_code == 409 and "the last one" in said["refused"].json()["error"]["message"]


def test_actions_on_versions_reach_them_and_what_is_wrong_is_named(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    _, said = ended
    assert said["versions"]["versions"] == [] and said["versions"]["canary"] is None
    assert [answer.status_code for answer in said["not versions"]] == [404, 404, 400, 404, 404, 404, 403, 400, 400]
    assert "unknown parameter: folder" in said["not versions"][-1].text
    assert "serve.adapter_root" in said["not versions"][6].text
    assert said["base"]["id"] == "base" and said["no canary"]["canary"] is None


def printed(ended: tuple[HttpRun, dict[str, Any]], words: str) -> str:
    result: Result = ended[1]["cli"][words]
    assert result.exit_code == 0, (words, result.output, result.exception)
    return str(result.output)


def test_the_commands_show_the_run(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    for words in ("status URL", "status RUN"):
        assert "phase" in printed(ended, words) and "promise 60000 ms" in printed(ended, words)
    assert json.loads(printed(ended, "status URL --json"))["run"]["phase"] == "open"
    assert "| 1       |" in printed(ended, "admin RUN states")
    assert json.loads(printed(ended, "admin URL config"))["serve"]["http"]["port"] == 0
    assert json.loads(printed(ended, "admin URL events --json"))["events"]
    assert json.loads(printed(ended, "admin --json URL versions"))["versions"] == []
    assert printed(ended, "admin URL rounds") == printed(ended, "admin URL jobs") == "", "there is none yet"


def test_the_commands_steer_it(ended: tuple[HttpRun, dict[str, Any]]) -> None:
    assert "demo" in printed(ended, "admin URL pause --reason demo")
    assert json.loads(printed(ended, "admin URL resume --json")) == {"paused": False, "reason": ""}
    assert "an operator asked for it" in printed(ended, "admin URL drain 1")
    assert "an operator" not in printed(ended, "admin URL undrain 1")
    assert "base" in printed(ended, "admin URL activate 0")
    assert "| canary | - " in printed(ended, "admin URL canary")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("admin URL drain 9", "there is no replica 9: their numbers are 0 to 1 (HTTP 404)"),
        ("admin URL canary 7 0.5", "there is no stored version 7 (HTTP 404)"),
        ("admin URL load folder --adapter support", "serve.adapter_root is not set"),
    ],
)
def test_what_is_refused_is_one_sentence(ended: tuple[HttpRun, dict[str, Any]], words: str, sentence: str) -> None:
    error = ended[1]["cli"][words].exception
    assert isinstance(error, InputError) and sentence in str(error)


def test_a_folder_says_how_old_its_status_is_and_whether_the_run_is_over(tmp_path: Path) -> None:
    body = {"written_unix": 1000.0, "run": {"phase": "open"}}
    (tmp_path / "status.json").write_text(json.dumps(body))
    assert status_of(str(tmp_path), wall=lambda: 1002.0).note == ""
    assert status_of(str(tmp_path), wall=lambda: 1180.0).note.startswith("written 3 min ago: the control process has")
    (tmp_path / "status.json").write_text(json.dumps({**body, "run": {"phase": "done"}}))
    (tmp_path / "summary.json").write_text("{}")
    assert status_of(str(tmp_path), wall=lambda: 1003.0).note == "the run is over, since 3 s"


def test_what_is_no_run_and_no_server_is_named(tmp_path: Path) -> None:
    for target, sentence in (
        (str(tmp_path / "nothing"), "is no folder of a run, and no URL"),
        (str(tmp_path), "name the folder of a run that has begun"),
        ("http://127.0.0.1:9", "does not answer"),
    ):
        with pytest.raises(InputError, match=sentence):
            status_of(target)
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        status_of(str(tmp_path))
    with pytest.raises(InputError, match=r"serve\.http\.port"):
        Server.of(str(tmp_path))


def status_at(unix: float, events: tuple[int, ...] = ()) -> dict[str, Any]:
    latency = {"p50": 5.0, "p99": 9.0}
    run = {"outstanding": 3, "in_batches": 2, "ttft_ms": latency, "itl_ms": latency, "pressure": "low"}
    return {
        "unix": unix,
        "run": {**run, "training_steps": 0, "last_loss": None, "version": 0},
        "promise": {"met": 1, "finished": 1},
        "totals": {"requests": {"stop": 1}, "generated_tokens": 5},
        "states": {"idle": 1},
        "replicas": [{"state": "idle"}],
        "events": [{"number": n} for n in events],
    }


def filled(seconds: int) -> History:
    history = History()

    async def fill() -> None:
        for second in range(seconds):
            await history.add(status_at(float(second)), True)

    asyncio.run(fill())
    return history


def test_a_day_is_kept_in_a_bounded_number_of_rows_and_the_old_ones_are_further_apart() -> None:
    history = History()
    for second in range(100_000):
        history._append([float(second)], 0)
    day = history.body()["rows"]
    times = [row[0] for row in day]
    assert times == sorted(set(times)) and len(times) <= sum(count for _, count in AGES)
    apart = [b - a for a, b in pairwise(times)]
    assert apart[-500:] == [1.0] * 500 and max(apart) <= 60.0
    assert times[-1] - times[0] >= 24 * 3600 - 120


def test_latencies_are_shown_only_where_requests_ended() -> None:
    rows = filled(3).body()["rows"]
    at = COLUMNS.index("ttft_p50_ms")
    assert [row[at] for row in rows] == [5.0, None, None]


def test_events_are_taken_once_each() -> None:
    history = History()

    async def fill() -> None:
        await history.add(status_at(1.0, (1, 2)), True)
        await history.add(status_at(2.0, (2, 3)), True)

    asyncio.run(fill())
    assert [event["number"] for event in history.body()["events"]] == [1, 2, 3]
    assert [event["number"] for event in json.loads(history.message)["events"]] == [3]
