"""Recorded request traces: arrivals and the lengths of prompts and answers."""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from clif.data.lines import json_object, read_lines
from clif.errors import InputError, plain

TraceFormat = Literal["azure", "burstgpt", "mooncake"]
BLOCK_TOKENS = 512
"""Tokens of a prompt that one of Mooncake's hash_ids stands for."""
MOST_TOKENS = 10_000_000
"""Upper bound for a prompt or an answer; more is an error in the trace."""
LATEST_S = 1e12
"""Upper bound of a time in seconds, 30,000 years; larger values have another unit."""


class TraceError(InputError):
    """The trace cannot be replayed; the message names file and line and says what is expected."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request arrives at at_s, seconds from the start. The token numbers are known only from a trace.

    blocks: names of the prompt's blocks of BLOCK_TOKENS; prompts with equal first blocks have equal beginnings.
    """

    at_s: float
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    blocks: tuple[int, ...] = ()


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
    # There is one header and no quoted line break, so a row is a line and its number is that of the line.
    lines = read_lines(path, TraceError)
    number, header = next(lines, (1, ""))
    names = [name.strip() for name in header.split(",")]
    if missing := [column for column in columns if column not in names]:
        raise TraceError(f"{path}, line {number}: the header lacks {', '.join(missing)}: expected {expected}")
    time, prompt, answer = (names.index(column) for column in columns)
    for number, line in lines:
        try:
            cells = next(csv.reader([line], strict=True), [])
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells under {len(names)} columns")
            arrival = _arrival(seconds(cells[time]), int(cells[prompt]), int(cells[answer]))
        except (ValueError, ArithmeticError, csv.Error) as error:
            raise TraceError(f"{path}, line {number}: {plain(error)}: expected {expected}") from error
        yield arrival


def _read_mooncake(path: Path) -> Iterator[Arrival]:
    expected = '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [...]} (milliseconds)'
    for number, line in read_lines(path, TraceError):
        try:
            value = json_object(line)
            keys = ("timestamp", "input_length", "output_length")
            timestamp, prompt, answer = (_number(value, key) for key in keys)
            arrival = _arrival(timestamp / 1000, _whole(prompt), _whole(answer), _blocks(value))
        except (ValueError, ArithmeticError) as error:
            raise TraceError(f"{path}, line {number}: {plain(error)}: expected {expected}") from error
        yield arrival


def _arrival(at_s: float, prompt_tokens: int, answer_tokens: int, blocks: tuple[int, ...] = ()) -> Arrival:
    if not math.isfinite(at_s):
        raise ValueError(f"the time {at_s} is not finite")
    if abs(at_s) > LATEST_S:
        raise ValueError(f"the time {at_s:g} s is more than {LATEST_S:g} s: correct it, or its unit")
    if prompt_tokens < 0 or answer_tokens < 0:
        raise ValueError("a number of tokens is negative")
    if max(prompt_tokens, answer_tokens) > MOST_TOKENS:
        raise ValueError(f"a number of tokens is above {MOST_TOKENS:,}")
    return Arrival(at_s=at_s, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, blocks=blocks)


def _number(value: dict[str, Any], key: str) -> float:
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f'"{key}" is {"missing" if number is None else "not a number"}')
    return number


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(f"{number} is no whole number of tokens")
    return int(number)


def _blocks(value: dict[str, Any]) -> tuple[int, ...]:
    """hash_ids, which a trace may leave out."""
    names = value.get("hash_ids") or []
    if not isinstance(names, list) or not all(type(name) is int and name >= 0 for name in names):
        raise ValueError('"hash_ids" must be a list of whole numbers from 0')
    return tuple(names)


def _date(text: str) -> float:
    """Seconds since 1970. Digits after the microsecond are cut; a time without zone is taken as UTC."""
    date = datetime.datetime.fromisoformat(text.strip())
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


_READERS: dict[TraceFormat, Callable[[Path], Iterator[Arrival]]] = {
    "azure": _read_azure,
    "burstgpt": _read_burstgpt,
    "mooncake": _read_mooncake,
}
