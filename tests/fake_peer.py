"""A driver of a peer that computes nothing: it speaks the protocol, and goes wrong where its job asks for it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "peers"))

from protocol import answer_turns


def prepare(job: dict[str, Any]) -> Any:
    print("noise on stdout")
    if job.get("wrong") == "start":
        raise ValueError("no such model\nand more")

    def turn(asked: dict[str, Any]) -> Any:
        def run() -> Any:
            if job.get("wrong") == "dying":
                print("last words", file=sys.stderr)
                os._exit(3)
            if job.get("wrong") == "hanging":
                time.sleep(600)
            if job.get("wrong") == "breaking":
                raise ValueError("out of luck")
            if "log" in job:
                with Path(job["log"]).open("a") as file:
                    file.write(f"{job['name']} ")
            cores = sorted(os.sched_getaffinity(0))
            return [os.getpid(), cores, os.environ["OMP_NUM_THREADS"], asked] if job.get("tells") else asked["prompts"]

        return run

    return f"settings of {job.get('name')}", turn


if __name__ == "__main__":
    answer_turns(prepare)
