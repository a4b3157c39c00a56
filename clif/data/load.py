"""The load of a run: arrival, content and SLO of each request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import msgspec
import numpy as np

from clif.config import Config, LoadConfig, SloConfig
from clif.data.instruct import DataError, Row, split_rows
from clif.data.lengths import BlockText, fit
from clif.data.traces import Arrival, read_trace
from clif.errors import InputError
from clif.tokenizer import ChatError, ChatTokenizer
from clif.types import Request, Sampling, Slo

MOST_REQUESTS = 2_000_000
"""Upper bound of a generated load, which is made before the run."""
WORDS_FROM = 200
"""Number of the data set's prompts whose tokens make up the blocks of a trace."""


class LoadError(InputError):
    """The configured load cannot be made; the message says what to change."""


class ScheduledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request and its arrival, seconds from the start of the load."""

    at_s: float
    request: Request


def make_load(config: Config, rows: Sequence[Row], tokenizer: ChatTokenizer) -> list[ScheduledRequest]:
    """All requests of a run in order of arrival, ids 0..n-1; the same for the same configuration and rows.

    No request is dropped here: the dispatcher rejects those that exceed model.max_context, with a reason.
    Raises LoadError, TraceError or DataError.
    """
    load, seed, slo = config.load, config.run.seed, slo_of(config.slo)
    arrivals = read_arrivals(load, seed)
    if not arrivals:
        return []
    pool = split_rows(rows, load.split)
    rng = np.random.default_rng([seed, 1])
    picks = rng.integers(len(pool), size=len(arrivals))
    seeds = rng.integers(2**31, size=len(arrivals))

    @cache
    def prompt(index: int) -> tuple[int, ...]:
        return _prompt(pool[index], tokenizer)

    @cache
    def blocks() -> BlockText:
        words = {token for index in range(min(len(pool), WORDS_FROM)) for token in prompt(index)}
        return BlockText(words, load.trace.prompt_scale if load.trace else 1.0, seed)

    def request(number: int, arrival: Arrival) -> Request:
        ids, sampling = prompt(int(picks[number])), load.sampling(int(seeds[number]))
        if arrival.prompt_tokens is not None and arrival.answer_tokens is not None:
            # The trace determines the lengths.
            length, sampling = arrival.prompt_tokens, _fixed_length(sampling, arrival.answer_tokens)
            ids = blocks().prompt(arrival.blocks, length, number) if arrival.blocks else _resize(ids, length)
        return Request(id=number, prompt=ids, sampling=sampling, slo=slo)

    return [ScheduledRequest(at_s=a.at_s, request=request(number, a)) for number, a in enumerate(arrivals)]


def read_arrivals(load: LoadConfig, seed: int) -> list[Arrival]:
    """The arrivals of requests, with token numbers if the trace determines them. Raises LoadError or TraceError."""
    if load.kind == "none":
        return []
    if load.kind != "trace":
        return generate_arrivals(load.kind, load.rate_rps, load.duration_s, seed, load.cv, load.max_requests)
    trace = load.trace
    if trace is None:
        raise LoadError('load.kind is "trace" but the section load.trace is missing: add it')
    arrivals = read_trace(trace.path, trace.format, trace.speed, trace.start_s, load.duration_s, load.max_requests)
    if trace.lengths == "trace":
        return fit(arrivals, trace)
    return [Arrival(at_s=arrival.at_s) for arrival in arrivals]


def generate_arrivals(
    kind: Literal["constant", "poisson", "gamma"],
    rate_rps: float,
    duration_s: float,
    seed: int,
    cv: float = 1.0,
    max_requests: int | None = None,
) -> list[Arrival]:
    """Arrivals in [0, duration_s): evenly spaced, or with random gaps of mean 1 / rate_rps seconds.

    cv: coefficient of variation of gamma gaps. Raises LoadError if no request falls into the time, or too many.
    """
    most = MOST_REQUESTS + 1 if max_requests is None else max_requests
    if kind == "constant":
        # The small term prevents that rounding, as in 0.1 * 30 > 3, adds a request at the end.
        number = math.ceil(min(rate_rps * duration_s - 1e-9, most))
        times = [k / rate_rps for k in range(number)]
    else:
        times = _random_times(_gaps(kind, rate_rps, cv, seed), duration_s, most)
    if len(times) > MOST_REQUESTS:
        raise LoadError(
            f"more than {MOST_REQUESTS:,} requests come in {duration_s:g} s at {rate_rps:g} requests/s: lower "
            "load.duration_s or load.rate_rps, or set load.max_requests"
        )
    if not times:
        raise LoadError(
            f"no request comes in {duration_s:g} s at {rate_rps:g} requests/s: raise load.duration_s or load.rate_rps"
        )
    return [Arrival(at_s=time) for time in times]


def _gaps(kind: Literal["poisson", "gamma"], rate_rps: float, cv: float, seed: int) -> Callable[[], float]:
    rng = np.random.default_rng([seed, 0])
    if kind == "poisson":
        return lambda: float(rng.exponential(1 / rate_rps))
    shape = 1 / cv**2
    return lambda: float(rng.gamma(shape, 1 / (rate_rps * shape)))


def _random_times(gap: Callable[[], float], duration_s: float, most: int) -> list[float]:
    times: list[float] = []
    time = gap()
    while time < duration_s and len(times) < most:
        times.append(time)
        time += gap()
    return times


def _prompt(row: Row, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    try:
        ids = tuple(tokenizer.encode_chat(row.messages))
    except ChatError as error:
        raise DataError(f"row {row.id} (from 0): {error}") from error
    if not ids:
        raise DataError(f"row {row.id}: its prompt encodes to no token: remove the row")
    return ids


def _resize(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """ids cut or repeated to length."""
    return (ids * (length // len(ids) + 1))[:length]


def _fixed_length(sampling: Sampling, length: int) -> Sampling:
    """Exactly length tokens."""
    return msgspec.structs.replace(sampling, max_tokens=length, ignore_eos=True)


def slo_of(slo: SloConfig) -> Slo:
    deadline_s = None if slo.deadline_ms is None else slo.deadline_ms / 1000
    return Slo(ttft_s=slo.ttft_ms / 1000, tpot_s=slo.tpot_ms / 1000, deadline_s=deadline_s)
