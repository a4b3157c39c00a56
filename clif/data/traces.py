"""Recorded request traces: when requests came, and how long they and their answers were."""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from clif.data.lines import read_lines
from clif.errors import InputError

TraceFormat = Literal["azure", "burstgpt", "mooncake"]


class TraceError(InputError):
    """The trace cannot be replayed; the message names the place and says what is expected."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request arrives at at_s, seconds from the start. The token numbers are known only from a trace."""

    at_s: float
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


def read_trace(
    path: Path,
    format: TraceFormat,
    speed: float = 1.0,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_requests: int | None = None,
) -> list[Arrival]:
    """Arrivals in order of time, counted from start_s after the trace's first request and divided by speed.

    start_s: seconds of trace time. duration_s: seconds of replay, that is duration_s * speed of trace time.
    Raises TraceError for a malformed line (file, line number, what was expected) and for an empty window.
    """
    arrivals = sorted(_READERS[format](path), key=lambda arrival: arrival.at_s)
    if not arrivals:
        raise TraceError(f"{path} holds no requests")
    first, length_s = arrivals[0].at_s, arrivals[-1].at_s - arrivals[0].at_s
    end_s = math.inf if duration_s is None else duration_s
    timed = [msgspec.structs.replace(arrival, at_s=(arrival.at_s - first - start_s) / speed) for arrival in arrivals]
    window = [arrival for arrival in timed if 0 <= arrival.at_s < end_s]
    if not window:
        raise TraceError(
            f"{path}: no request within {end_s * speed:g} s from {start_s:g} s on (trace time), "
            f"the trace is {length_s:g} s long: change load.trace.start_s or load.duration_s"
        )
    return window[:max_requests]


def _read_azure(path: Path) -> Iterator[Arrival]:
    expected = "TIMESTAMP,ContextTokens,GeneratedTokens as in 2023-11-16 18:17:03.9799600,4808,10"
    return _read_csv(path, expected, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _date)


def _read_burstgpt(path: Path) -> Iterator[Arrival]:
    expected = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type as in 5,ChatGPT,472,18,490,API log"
    return _read_csv(path, expected, ("Timestamp", "Request tokens", "Response tokens"), float)


def _read_csv(path: Path, expected: str, columns: Sequence[str], seconds: Callable[[str], float]) -> Iterator[Arrival]:
    """columns: those of the time, the prompt's and the answer's tokens; others are not needed."""
    # One header and no quoted line breaks: so a row is a line and gets its own number.
    lines = read_lines(path, TraceError)
    number, header = next(lines, (1, ""))
    names = [name.strip() for name in header.split(",")]
    if missing := [column for column in columns if column not in names]:
        raise TraceError(f"{path}, line {number}: the header lacks {', '.join(missing)}: expected {expected}")
    time, prompt, answer = (names.index(column) for column in columns)
    for number, line in lines:
        try:
            cells = next(csv.reader([line], strict=True))
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells under {len(names)} columns")
            arrival = _arrival(seconds(cells[time]), int(cells[prompt]), int(cells[answer]))
        except (ValueError, csv.Error) as error:
            raise TraceError(f"{path}, line {number}: {error}: expected {expected}") from error
        yield arrival


def _read_mooncake(path: Path) -> Iterator[Arrival]:
    """hash_ids (shared prefixes) are not used: prompts come from the data set."""
    expected = '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [...]} (milliseconds)'
    for number, line in read_lines(path, TraceError):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__} instead of an object")
            keys = ("timestamp", "input_length", "output_length")
            timestamp, prompt, answer = (_number(value, key) for key in keys)
            arrival = _arrival(timestamp / 1000, int(prompt), int(answer))
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}: expected {expected}") from error
        yield arrival


def _arrival(at_s: float, prompt_tokens: int, answer_tokens: int) -> Arrival:
    if not math.isfinite(at_s):
        raise ValueError(f"the time {at_s} is not finite")
    if prompt_tokens < 0 or answer_tokens < 0:
        raise ValueError("a number of tokens is negative")
    return Arrival(at_s=at_s, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)


def _number(value: dict[str, Any], key: str) -> float:
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f'"{key}" is {"missing" if number is None else "not a number"}')
    return number


def _date(text: str) -> float:
    """Seconds since 1970. Digits after the microsecond are cut; a time without zone is taken as UTC."""
    date = datetime.datetime.fromisoformat(text.strip())
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


_READERS: dict[TraceFormat, Callable[[Path], Iterator[Arrival]]] = {
    "azure": _read_azure,
    "burstgpt": _read_burstgpt,
    "mooncake": _read_mooncake,
}
