"""Contenders of a benchmark that do little or go wrong, importable by name in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

from turns import Ready, Turn


def recording(log: str, name: str) -> Ready:
    """Writes who it is at each turn; its result is (process, number, threads of OpenMP, cores)."""

    def turn(turn: Turn):
        number = turn.repeat

        def run() -> tuple[int, int, str, list[int]]:
            with Path(log).open("a") as file:
                file.write(f"{name}{number} ")
            return os.getpid(), number, os.environ["OMP_NUM_THREADS"], sorted(os.sched_getaffinity(0))

        return run

    return Ready(f"settings of {name}", turn)


def breaking() -> Ready:
    def run() -> None:
        raise ValueError("out of luck\nand more")

    return Ready("", lambda turn: run)


def greedy() -> Ready:
    """Wants 4 GiB."""
    return Ready("", lambda turn: lambda: len(bytearray(4 << 30)))


def dying() -> Ready:
    return Ready("", lambda turn: lambda: os._exit(3))


def hanging() -> Ready:
    time.sleep(600)
    raise AssertionError("it was left alone")
