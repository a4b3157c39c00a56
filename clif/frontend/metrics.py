"""GET /metrics, in Prometheus' text format: the run's status as families of samples. Free of torch.

A metric has vLLM's name where it means the same, so that dashboards and routers made for vLLM read it; all others begin
with `clif:`. Counts come from the control process: they go on when the front end is started again, and begin at 0 with
the control process.

Sources: names and meanings in vLLM's documentation, "Production Metrics".
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from clif.frontend.link import Link
from clif.frontend.request_ids import RequestIds
from clif.types import CLIF

SUCCESS = {"stop": "stop", "length": "length", "cancelled": "abort"}
"""Ends of requests, in vLLM's words; a rejected or failed one is no success."""
LATENCIES = (
    ("ttft_s", "vllm:time_to_first_token_seconds", "Arrival to first token."),
    ("itl_s", "vllm:inter_token_latency_seconds", "Gap between two tokens of an answer."),
    ("e2e_s", "vllm:e2e_request_latency_seconds", "Arrival to the end of an answer."),
    ("queue_s", "vllm:request_queue_time_seconds", "Arrival to the hand-over to a replica."),
)
LEVELS = ("low", "medium", "high")
REPLICA_STATES = ("serving", "idle", "combined", "failed")
LIVE_JOBS = ("validating_files", "queued", "running", "paused")
OTHER = "other"


class Responses:
    """ASGI middleware that counts answers by route and status; of paths without a route as one. Each gets its id."""

    def __init__(self, app: Any, counts: Counter[tuple[str, int]]) -> None:
        self._app, self._counts, self._ids = app, counts, RequestIds()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", OTHER)
                self._counts[route, message["status"]] += 1
                message = {**message, "headers": [*message.get("headers", ()), self._ids.header(scope)]}
            await send(message)

        await self._app(scope, receive, counting)


class StatusCollector(Collector):
    """Reads the latest status at each scrape. responses: by route and status, see Responses. wall: seconds since 1970.

    Nothing but the front end's own numbers is there before the first status.
    """

    def __init__(
        self, link: Link, responses: Mapping[tuple[str, int], int], wall: Callable[[], float] = time.time
    ) -> None:
        self._link, self._responses, self._wall = link, responses, wall

    def collect(self) -> Iterable[Metric]:
        yield from self._frontend()
        status = msgspec.json.decode(self._link.readiness.body)
        if "run" in status:
            yield from serving(status)
            yield from run(status)
            yield from training(status)
            yield from versions(status)
            yield gauge("clif:status_age_seconds", "Age of what these metrics say.", self._wall() - status["unix"])

    def _frontend(self) -> Iterator[Metric]:
        yield gauge("clif:ready", "1 if requests are accepted.", int(self._link.readiness.ready))
        waiting = self._link.waiting_requests
        yield gauge("clif:http_requests_waiting", "Those of them without a first token.", waiting)
        yield gauge("clif:http_requests_running", "Requests of HTTP clients that are open.", self._link.open_requests)
        yield gauge("clif:http_tasks", "Tasks of the front end: as many as before once no client is there.", tasks())
        family = CounterMetricFamily(
            "clif:http_responses", "Answers of this front end, by status.", labels=["route", "code"]
        )
        for (route, code), count in sorted(self._responses.items()):
            family.add_metric([route, str(code)], count)
        yield family


def tasks() -> int:
    """Tasks of the event loop that runs here; 0 where none does."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


def serving(status: dict[str, Any]) -> Iterator[Metric]:
    """What vLLM has, too. Its running requests are those in batches, and its waiting ones all others."""
    totals, outstanding, kv = status["totals"], status["run"]["outstanding"], status["kv"]
    running = min(outstanding, status["run"]["in_batches"])
    yield vllm_gauge("vllm:num_requests_running", "Requests in the replicas' batches.", running)
    yield vllm_gauge("vllm:num_requests_waiting", "Requests that wait for a batch.", outstanding - running)
    used = kv["used"] / kv["tokens"] if kv["tokens"] else 0.0
    yield vllm_gauge("vllm:kv_cache_usage_perc", "Used part of the KV caches, 0 to 1.", used)
    yield vllm_counter("vllm:prompt_tokens", "Tokens of prompts that got an answer.", totals["prompt_tokens"])
    yield vllm_counter("vllm:generation_tokens", "Tokens of answers.", totals["generated_tokens"])
    ends = CounterMetricFamily(
        "vllm:request_success", "Requests that ended in good order.", labels=["model_name", "finished_reason"]
    )
    for reason, name in SUCCESS.items():
        ends.add_metric([CLIF, name], totals["requests"][reason])
    yield ends
    for key, name, text in LATENCIES:
        yield histogram(name, text, totals[key])


def run(status: dict[str, Any]) -> Iterator[Metric]:
    """The run's state."""
    shown, promise, states = status["run"], status["promise"], status["states"]
    about = {"version": status["version"], "model": shown["model"], "run": shown["name"]}
    info = GaugeMetricFamily("clif:info", "What runs here.", labels=[*about])
    info.add_metric([*about.values()], 1)
    yield info
    yield gauge("clif:run_seconds", "How long the run has taken.", shown["seconds"])
    ends = status["totals"]["requests"]
    yield labelled(CounterMetricFamily, "clif:requests", "Requests that ended.", "finish", ends)
    yield counter("clif:requests_slo_met", "Requests that got the promised latencies.", status["totals"]["slo_met"])
    promised = {"ttft": promise["ttft_ms"] / 1000, "tpot": promise["tpot_ms"] / 1000}
    yield labelled(GaugeMetricFamily, "clif:promise_seconds", "Latencies that are promised.", "kind", promised)
    yield gauge("clif:oldest_wait_seconds", "Age of the oldest request without a token.", promise["oldest_wait_s"])
    counts = {state: states.get(state, 0) for state in REPLICA_STATES}
    yield labelled(GaugeMetricFamily, "clif:replicas", "Replicas by state.", "state", counts)
    yield gauge("clif:replicas_drained", "Replicas that an operator has drained.", status["drained_count"])
    levels = {level: int(shown["pressure"] == level) for level in LEVELS}
    yield labelled(GaugeMetricFamily, "clif:pressure", "1 for the present service pressure.", "level", levels)


def training(status: dict[str, Any]) -> Iterator[Metric]:
    now, totals = status["training"], status["totals"]
    yield gauge("clif:training_paused", "1 if an operator has paused training.", int(bool(now["paused"])))
    yield gauge("clif:round_running", "1 while a round is under way.", int(now["round"] is not None))
    yield counter("clif:training_steps", "Optimizer steps of all replicas.", now["steps"])
    if now["last_loss"] is not None:
        yield gauge("clif:training_loss", "Loss of the last optimizer step, nats per answer token.", now["last_loss"])
    yield counter("clif:trained_tokens", "Tokens trained in rounds that ended.", totals["trained_tokens"])
    yield counter("clif:trained_samples", "Samples trained in rounds that ended.", totals["trained_samples"])
    yield labelled(CounterMetricFamily, "clif:rounds", "Rounds that ended.", "state", totals["rounds"])
    jobs = {job: status["jobs"]["live"].get(job, 0) for job in LIVE_JOBS}
    yield labelled(GaugeMetricFamily, "clif:jobs", "Training jobs that have not ended.", "status", jobs)
    waiting = status["jobs"]["feedback_waiting"]
    yield gauge("clif:feedback_waiting", "Rows of feedback that wait to become a job.", waiting)


def versions(status: dict[str, Any]) -> Iterator[Metric]:
    """Of the latest versions, so that the number of series stays bounded."""
    yield gauge("clif:adapter_version", "Active version of adapter clif; 0: the base.", status["run"]["version"])
    rows = {row["id"]: row for row in status["versions"]}
    columns = (
        (CounterMetricFamily, "clif:version_requests", "Requests that a version answered.", "requests"),
        (CounterMetricFamily, "clif:version_tokens", "Tokens that a version answered.", "tokens"),
        (GaugeMetricFamily, "clif:version_heldout_loss", "Held-out loss, nats per answer token.", "heldout_loss"),
    )
    for kind, name, text, column in columns:
        known = {name: row[column] for name, row in rows.items() if row[column] is not None}
        yield labelled(kind, name, text, "version", known)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def vllm_gauge(name: str, text: str, value: float) -> Metric:
    return labelled(GaugeMetricFamily, name, text, "model_name", {CLIF: value})


def vllm_counter(name: str, text: str, value: float) -> Metric:
    return labelled(CounterMetricFamily, name, text, "model_name", {CLIF: value})


def labelled(kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family: Metric = kind(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)  # type: ignore[attr-defined]
    return family


def histogram(name: str, text: str, body: dict[str, Any]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["model_name"])
    total, buckets = 0, []
    for bound, count in zip((*map(str, body["bounds"]), "+Inf"), body["counts"], strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric([CLIF], buckets, body["sum"])
    return family


def registry(link: Link, responses: Mapping[tuple[str, int], int]) -> CollectorRegistry:
    """A registry of its own: none is shared with whatever else the process imports."""
    own = CollectorRegistry()
    own.register(StatusCollector(link, responses))
    return own


def routes(link: Link, responses: Mapping[tuple[str, int], int]) -> APIRouter:
    router, metrics = APIRouter(tags=["operation"]), registry(link, responses)

    @router.get("/metrics", response_class=Response)
    async def metrics_text() -> Response:
        """Metrics for Prometheus, in its text format."""
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    return router
