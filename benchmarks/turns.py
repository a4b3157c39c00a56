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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
MIB = 1 << 20


@dataclass(frozen=True)
class Ready:
    """A prepared contender.

    settings: a line for the report. turn: makes the inputs of a repeat and returns the timed call, whose result is
    kept.
    """

    settings: str
    turn: Callable[[int], Callable[[], Any]]


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
class Contender:
    """A process and its results. seconds and results: by repeat; failed: the reason, or empty."""

    name: str
    prepare: Callable[..., Ready]
    arguments: tuple[Any, ...]
    settings: str = ""
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    peak_mib: float = 0.0
    failed: str = ""

    def start(self, limits: Limits) -> None:
        """Prepare the contender, and wait until it is ready."""
        self._limits = limits
        self._line, theirs = SPAWN.Pipe()
        arguments = (theirs, limits, self.prepare, self.arguments)
        self.process = SPAWN.Process(target=answer_turns, args=arguments, name=self.name, daemon=True)
        with _environment(limits.environment()):
            self.process.start()
        theirs.close()
        self.settings = self._ask(None) or ""

    def take_turn(self, number: int, warm_up: bool) -> None:
        """Run one repeat. A warm-up is not recorded."""
        if self.failed or (answer := self._ask(number)) is None:
            return
        seconds, result, self.peak_mib = answer
        if not warm_up:
            self.seconds.append(seconds)
            self.results.append(result)

    def stop(self) -> None:
        self._line.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()

    def _ask(self, number: int | None) -> Any:
        """Its answer to a turn, or to the start; None if there is none."""
        try:
            if number is not None:
                self._line.send(number)
            if not self._line.poll(self._limits.turn_s):
                self.failed = f"no answer within {self._limits.turn_s:g} s"
                self.process.kill()
                return None
            good, answer = self._line.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            good, answer = False, f"ended with code {self.process.exitcode}"
        if not good:
            self.failed = answer
        return answer if good else None


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
    """The contender's process. Its answers: (True, settings), then (True, (seconds, result, peak MiB)) by turn.

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
            line.send((True, (seconds, result, peak_mib)))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - it is the other process that reports it
        traceback.print_exc()
        line.send((False, f"{type(error).__name__}: {error}".splitlines()[0]))


def race(contenders: Sequence[Contender], repeats: int, limits: Limits) -> None:
    """Run all contenders through a warm-up and all repeats: A B C, then C B A, so that drift affects all alike."""
    try:
        for contender in contenders:
            contender.start(limits)
        for number in range(repeats + 1):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                contender.take_turn(number, warm_up=number == 0)
    finally:
        for contender in contenders:
            contender.stop()


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to most)."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def table(title: str, tokens: int, contenders: Sequence[Contender], check: Callable[[Any, Any], str]) -> list[str]:
    """Markdown: tokens/s and the first contender's ratio to each. check: its result beside that of another."""
    ours = contenders[0]
    lines = [f"## {title}", "", f"| contender | tokens/s | {ours.name} is faster by | check | peak memory, MiB |"]
    lines.append("|---|---|---|---|---|")
    for one in contenders:
        if one.failed or ours.failed:
            lines.append(f"| {one.name} | | | {one.failed} | {one.peak_mib:.0f} |")
            continue
        rates = spread([tokens / s for s in one.seconds], 0)
        ratios = spread([s / o for s, o in zip(one.seconds, ours.seconds, strict=True)], 2)
        checked = check(ours.results[0], one.results[0])
        lines.append(f"| {one.name} | {rates} | {ratios} | {checked} | {one.peak_mib:.0f} |")
    return [*lines, "", *[f"* {one.name}: {one.settings}" for one in contenders], ""]
