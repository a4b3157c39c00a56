"""The line between a benchmark of CLIF and a peer's driver: JSON objects, one a line, on stdin and stdout.

The driver runs in the peer's own environment, so this file and the drivers use nothing of CLIF. In comes the job, once,
and then a turn after another:

    {"model": folder, "gguf_bf16": file, "gguf_f16": file, "adapters": [PEFT folders], "cores": [0, 1],
     "memory_bytes": n, "requests": most at once, "prompt": tokens, "answer": tokens, "kv_tokens": n, "program": path}
    {"prompts": [[token ids]], "adapters": [number of the adapter of each prompt, or -1]}
    {"steps": [[{"ids": [token ids], "target_start": n}]]}                             # a turn of training

Out go, for the job and for each turn:

    {"settings": text, "versions": text}
    {"seconds": s, "result": any}
    {"error": text}                                                                       # the last line
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Work = Callable[[], Any]


def answer_turns(prepare: Callable[[dict[str, Any]], tuple[str, Callable[[dict[str, Any]], Work]]]) -> None:
    """The driver's main function. prepare: of a job, the settings as text, and what makes the timed call of a turn."""
    line = os.fdopen(os.dup(1), "w", buffering=1)
    # What libraries print belongs to the log.
    os.dup2(2, 1)
    try:
        job = json.loads(sys.stdin.readline())
        os.sched_setaffinity(0, job["cores"])
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory_bytes"], job["memory_bytes"]))
        settings, turn = prepare(job)
        _say(line, settings=settings, versions=f"Python {sys.version.split()[0]}")
        while asked := sys.stdin.readline():
            work = turn(json.loads(asked))
            start = time.perf_counter()
            result = work()
            _say(line, seconds=time.perf_counter() - start, result=result)
    except Exception as error:  # noqa: BLE001 - the benchmark reports it
        traceback.print_exc()
        _say(line, error=f"{type(error).__name__}: {error}".splitlines()[0])


def versions(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def first_tokens(answers: list[list[int]], length: int) -> list[int]:
    """The first token of each answer, whose lengths are checked. Raises ValueError."""
    if any(len(ids) != length for ids in answers):
        raise ValueError(f"answers of {sorted({len(ids) for ids in answers})} tokens, not {length}")
    return [ids[0] for ids in answers]


def _say(line: Any, **what: Any) -> None:
    line.write(json.dumps(what) + "\n")
    line.flush()
