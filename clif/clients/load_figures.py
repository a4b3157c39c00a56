"""The figures of a load test, and their table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clif.clients.load_run import Outcome
from clif.metrics.figures import wilson

PERCENTILES = (50, 90, 95, 99)
LATE_MS = 5.0
"""A median lag of the client beyond this is said: then the client is the bottleneck."""


@dataclass(frozen=True)
class Promise:
    """The latencies that a request must keep to count as met, milliseconds; None: not promised."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def kept(self, outcome: Outcome) -> bool:
        """Whether a request was answered whole and in time."""
        pairs = ((outcome.ttft_s, self.ttft_ms), (outcome.tpot_s, self.tpot_ms))
        in_time = all(took is None or limit is None or took * 1000 <= limit for took, limit in pairs)
        return not outcome.error and bool(outcome.deltas) and in_time


def figures(outcomes: Sequence[Outcome], promise: Promise) -> dict[str, Any]:
    """Figures of all planned requests. Milliseconds from the planned time; null where nothing was measured.

    attainment: the share of all requests that were answered whole within the promise, with its 95 % interval (Wilson);
    goodput_rps: their number over duration_s, from the first planned time to the last end. itl: between events with
    text. send_lag: from the planned time to the sending. held_back: requests that waited for --concurrency.
    """
    met = sum(map(promise.kept, outcomes))
    duration = _duration(outcomes)
    tokens = sum(o.tokens for o in outcomes)
    whole = [o for o in outcomes if not o.error]
    return {
        "requests": len(outcomes),
        "answered": len(whole),
        "errors": dict(Counter(o.error for o in outcomes if o.error).most_common()),
        "error_examples": _examples(outcomes),
        "duration_s": duration,
        "requests_per_s": len(whole) / duration if duration else None,
        "output_tokens_per_s": tokens / duration if duration else None,
        "prompt_tokens": sum(o.prompt_tokens or 0 for o in outcomes),
        "output_tokens": tokens,
        "tokens_counted_by": "server" if all(o.completion_tokens is not None for o in whole) else "client",
        "promise": {"ttft_ms": promise.ttft_ms, "tpot_ms": promise.tpot_ms},
        "met": met,
        "attainment": met / len(outcomes) if outcomes else None,
        "attainment_interval": wilson(met, len(outcomes)),
        "goodput_rps": met / duration if duration else None,
        "ttft_ms": percentiles(o.ttft_s for o in outcomes),
        "itl_ms": percentiles(gap for o in outcomes for gap in o.gaps_s),
        "tpot_ms": percentiles(o.tpot_s for o in outcomes),
        "e2e_ms": percentiles(o.e2e_s for o in outcomes),
        "send_lag_ms": percentiles(None if o.sent_s is None else o.sent_s - o.planned_s for o in outcomes),
        "held_back": sum(o.held_back for o in outcomes),
    }


def percentiles(seconds: Iterable[float | None]) -> dict[str, float | None]:
    """Percentiles of what was measured, and the mean, in milliseconds."""
    known = np.array([s for s in seconds if s is not None]) * 1000
    found = {f"p{p}": float(np.percentile(known, p)) if len(known) else None for p in PERCENTILES}
    return {"mean": float(known.mean()) if len(known) else None, **found}


def _duration(outcomes: Sequence[Outcome]) -> float | None:
    ends = [o.ended_s for o in outcomes if o.ended_s is not None]
    return max(ends) - min(o.planned_s for o in outcomes) if ends else None


def _examples(outcomes: Sequence[Outcome]) -> dict[str, str]:
    found: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.error and outcome.detail:
            found.setdefault(outcome.error, outcome.detail)
    return found


def print_figures(result: dict[str, Any], console: Console | None = None) -> None:
    """The figures as a table, readable in a plain log as well."""
    console = console or Console(highlight=False)
    table = Table("", *(["mean", *(f"p{p}" for p in PERCENTILES)]), box=box.ASCII)
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "send_lag_ms"):
        table.add_row(name.replace("_", " "), *map(_number, result[name].values()))
    console.print(table)
    for line in _lines(result):
        console.print(Text(line), soft_wrap=True)


def _lines(result: dict[str, Any]) -> Iterable[str]:
    yield (
        f"{result['answered']} of {result['requests']} requests answered in {_number(result['duration_s'])} s: "
        f"{_number(result['requests_per_s'])} requests/s, {_number(result['output_tokens_per_s'])} tokens/s"
    )
    interval = result["attainment_interval"]
    if interval is not None:
        promise = ", ".join(
            f"{k.replace('_ms', '')} <= {v:g} ms" for k, v in result["promise"].items() if v is not None
        )
        yield (
            f"attainment of {promise or 'any answer'}: {result['attainment']:.1%} (95 %: {interval[0]:.1%} to "
            f"{interval[1]:.1%}), goodput {_number(result['goodput_rps'])} requests/s"
        )
    for kind, count in result["errors"].items():
        example = result["error_examples"].get(kind)
        yield f"error: {count} x {kind}" + (f", e.g. {example}" if example else "")
    if result["held_back"]:
        yield f"{result['held_back']} requests waited for --concurrency: their latency counts that"
    elif (result["send_lag_ms"]["p50"] or 0) > LATE_MS:
        yield "this client is too slow for the load: it sends late, and the latencies count that"
    if result["tokens_counted_by"] == "client":
        yield "the server gives no usage: an event with text counts as a token"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
