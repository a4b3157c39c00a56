"""Contenders of a benchmark, each in a process of its own, that take turns. Free of torch.

No contender shares memory, threads or an allocator with another; all have the same cores, to which their threads are
pinned, and the same limit of memory. A contender that fails, exceeds the limit or hangs is reported, and the others
continue.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

SPAWN = multiprocessing.get_context("spawn")
MIB = 1 << 20


class Turn(NamedTuple):
    """One turn of every contender. repeat: 0 is the warm-up.

    rows: requests at once by adapter version, (48, 16) for 48 of the first and 16 of the second; empty in training.
    """

    repeat: int
    rows: tuple[int, ...] = ()


class Outcome(NamedTuple):
    seconds: float
    result: Any


@dataclass(frozen=True)
class Ready:
    """A prepared contender.

    settings: a line for the report. turn: makes the inputs of a turn and returns the timed call, whose result is kept.
    """

    settings: str
    turn: Callable[[Turn], Callable[[], Any]]


@dataclass(frozen=True)
class Limits:
    """Limits of each contender: cores by number, bytes of memory, seconds for each answer."""

    cores: tuple[int, ...]
    memory_bytes: int
    turn_s: float

    def environment(self) -> dict[str, str]:
        """For OpenMP: a thread on each core, for all contenders alike."""
        return {
            "OMP_NUM_THREADS": str(len(self.cores)),
            "GOMP_CPU_AFFINITY": " ".join(map(str, self.cores)),
            "TQDM_DISABLE": "1",
        }


@dataclass
class Contender(ABC):
    """A process and its results by turn, without warm-ups. failed: the reason, or empty."""

    name: str
    settings: str = field(default="", kw_only=True)
    outcomes: dict[Turn, Outcome] = field(default_factory=dict, kw_only=True)
    peak_mib: float = field(default=0.0, kw_only=True)
    failed: str = field(default="", kw_only=True)

    @abstractmethod
    def start(self, limits: Limits) -> None:
        """Prepare the contender, and wait until it is ready."""

    @abstractmethod
    def begin(self, turn: Turn) -> None:
        """Let it compute a turn, if it has not failed."""

    @abstractmethod
    def finish(self) -> tuple[Outcome, float] | None:
        """The outcome of the turn that was begun, and the peak memory in MiB; None if there is none."""

    @abstractmethod
    def stop(self) -> None:
        """End it, whatever it does."""

    def take_turn(self, turn: Turn) -> None:
        """Run one turn. A warm-up is not recorded."""
        if not self.failed:
            self.begin(turn)
        if self.failed or (found := self.finish()) is None:
            return
        outcome, self.peak_mib = found
        if turn.repeat > 0:
            self.outcomes[turn] = outcome

    def seconds(self, rows: tuple[int, ...] = ()) -> list[float]:
        """By repeat."""
        return [outcome.seconds for turn, outcome in sorted(self.outcomes.items()) if turn.rows == rows]

    def first_result(self, rows: tuple[int, ...] = ()) -> Any:
        """Of the first repeat."""
        return self.outcomes[Turn(1, rows)].result


@dataclass
class OwnContender(Contender):
    """A contender in this Python environment. prepare: a function that its process imports by name."""

    prepare: Callable[..., Ready]
    arguments: tuple[Any, ...]

    def start(self, limits: Limits) -> None:
        self._limits = limits
        self._line, theirs = SPAWN.Pipe()
        arguments = (theirs, limits, self.prepare, self.arguments)
        self.process = SPAWN.Process(target=answer_turns, args=arguments, name=self.name, daemon=True)
        with _environment(limits.environment()):
            self.process.start()
        theirs.close()
        self.settings = self._receive() or ""

    def begin(self, turn: Turn) -> None:
        try:
            self._line.send(turn)
        except (BrokenPipeError, ConnectionResetError):
            self.failed = self._end()

    def finish(self) -> tuple[Outcome, float] | None:
        found: tuple[Outcome, float] | None = self._receive()
        return found

    def stop(self) -> None:
        self._line.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()

    def _receive(self) -> Any:
        """Its next answer; None if there is none."""
        try:
            if not self._line.poll(self._limits.turn_s):
                self.failed = f"no answer within {self._limits.turn_s:g} s"
                self.process.kill()
                return None
            good, answer = self._line.recv()
        except (EOFError, ConnectionResetError):
            good, answer = False, self._end()
        if not good:
            self.failed = answer
        return answer if good else None

    def _end(self) -> str:
        self.process.join(5)
        return f"ended with code {self.process.exitcode}"


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Set environment variables for new processes: OpenMP reads them before any line of Python runs."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer_turns(line: Connection, limits: Limits, prepare: Callable[..., Ready], arguments: tuple[Any, ...]) -> None:
    """The contender's process. Its answers: (True, settings), then (True, (outcome, peak MiB)) by turn.

    After an error the last one is (False, its description).
    """
    os.sched_setaffinity(0, limits.cores)
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    try:
        ready = prepare(*arguments)
        line.send((True, ready.settings))
        while True:
            work = ready.turn(line.recv())
            start = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - start
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
            line.send((True, (Outcome(seconds, result), peak_mib)))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - it is the other process that reports it
        traceback.print_exc()
        line.send((False, f"{type(error).__name__}: {error}".splitlines()[0]))


def race(
    contenders: Sequence[Contender], repeats: int, limits: Limits, loads: Sequence[tuple[int, ...]] = ((),)
) -> None:
    """Run all contenders through a warm-up and all repeats: A B C, then C B A, so that drift affects all alike.

    loads: the rows of the turns of a repeat. All of a load's turns follow each other.
    """
    try:
        for contender in contenders:
            contender.start(limits)
        for number in range(repeats + 1):
            for rows in loads:
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    contender.take_turn(Turn(number, rows))
    finally:
        for contender in contenders:
            contender.stop()


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to most)."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def table(
    title: str,
    tokens: int,
    contenders: Sequence[Contender],
    check: Callable[[Any, Any], str],
    rows: tuple[int, ...] = (),
) -> list[str]:
    """Markdown: tokens/s and the first contender's ratio to each. check: its result beside that of another."""
    ours = contenders[0]
    lines = [f"## {title}", "", f"| contender | tokens/s | {ours.name} is faster by | check | peak memory, MiB |"]
    lines.append("|---|---|---|---|---|")
    for one in contenders:
        if one.failed or ours.failed:
            lines.append(f"| {one.name} | | | {one.failed} | {one.peak_mib:.0f} |")
            continue
        theirs, own = one.seconds(rows), ours.seconds(rows)
        rates, ratios = (
            spread([tokens / s for s in theirs], 0),
            spread([s / o for s, o in zip(theirs, own, strict=True)], 2),
        )
        checked = check(ours.first_result(rows), one.first_result(rows))
        lines.append(f"| {one.name} | {rates} | {ratios} | {checked} | {one.peak_mib:.0f} |")
    return [*lines, ""]


def split_table(tokens: int, contenders: Sequence[Contender], one_version: int, split: tuple[int, ...]) -> list[str]:
    """Markdown: each contender's tokens/s with all rows of one version, and with the same number of several."""
    said = " + ".join(map(str, split))
    lines = [f"## {said} rows of {len(split)} adapter versions against {one_version} of one", ""]
    lines += [f"| contender | tokens/s, one version | {said} | ratio in a repeat |", "|---|---|---|---|"]
    for one in contenders:
        if one.failed:
            lines.append(f"| {one.name} | | | {one.failed} |")
            continue
        whole, parts = one.seconds((one_version,)), one.seconds(split)
        rates = [spread([tokens / s for s in seconds], 0) for seconds in (whole, parts)]
        ratio = spread([w / p for w, p in zip(whole, parts, strict=True)], 3)
        lines.append(f"| {one.name} | {rates[0]} | {rates[1]} | {ratio} |")
    return [*lines, ""]


def settings_lines(contenders: Sequence[Contender]) -> list[str]:
    return [*[f"* {one.name}: {one.settings}" for one in contenders if one.settings], ""]
