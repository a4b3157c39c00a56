"""Decode steps of families of models on a CPU: all layers in one call, part by part, and another checkout's own way.

    python benchmarks/cpu_families.py [--against ../before] [--shapes window gemma] [--rows 1 8 32] [--out benchmarks]

Weights are random. Each turn measures every way for some milliseconds, in processes that take turns; the least time of
all turns counts. Pin the threads (GOMP_CPU_AFFINITY="0 1") and leave their cores idle.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkout

checkout.use_checkout()

import torch
from cpu_kernels import machine

from clif.config import config_from_tree
from clif.engine.engine import Engine
from clif.engine.runner import ModelRunner
from clif.engine.scheduler import Chunk
from clif.engine.scheduler import Sequence as Served
from clif.models.weights.loading import load_model
from clif.types import Request, Sampling

BLOCK, CONTEXT = 16, 512
SMALL = {"vocab_size": 49152, "max_position_embeddings": 1024, "tie_word_embeddings": True, "eos_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "window": {
        "model_type": "mistral", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "sliding_window": 256,
    },
    "gemma": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 256,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 14,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
"""What a config.json says: SmolLM2-135M with windows and without, Gemma 3 270M, half of the layers of Qwen 3 0.6B."""
ONE_CALL, PARTS, BEFORE = "one call", "part by part", "before"


class Steps:
    """Decode steps of one model, each row behind CONTEXT - 1 tokens."""

    def __init__(self, shape: str, rows: int) -> None:
        """rows: the most."""
        with tempfile.TemporaryDirectory(prefix="clif-family-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SMALL | SHAPES[shape]))
            config = config_from_tree(
                {
                    "model": {"path": f"random:{folder}", "dtype": "bfloat16", "max_context": CONTEXT},
                    "engine": {"max_batch": rows, "kv_tokens": rows * CONTEXT, "block_size": BLOCK},
                    "train": {"enabled": False},
                }
            )
            loaded = load_model(config.model, torch.device("cpu"))
        self.runner: ModelRunner = Engine.from_config(config, loaded).runner
        self._compiled = self.runner._compiled
        for cache in self.runner.cache.layers:
            cache.normal_()

    def least_ms(self, rows: int, way: str, seconds: float) -> float:
        """The least time of a step in one way, of as many as fit, from the filled batch to the greedy tokens."""
        self.runner._compiled = None if way == PARTS else self._compiled
        batch, least, end = self.runner.fill([_chunk(row) for row in range(rows)]), float("inf"), 0.0
        while not end or time.perf_counter() < end:
            begin = time.perf_counter()
            self.runner.compute(batch)
            now = time.perf_counter()
            # The first one touches memory.
            least, end = (min(least, now - begin), end) if end else (least, now + seconds)
        return 1e3 * least


def _chunk(row: int) -> Chunk:
    prompt = tuple(range(1, CONTEXT + 1))
    sequence = Served(Request(id=row, prompt=prompt, sampling=Sampling(max_tokens=1)), 0.0, [*prompt])
    sequence.blocks = [*range(row * (CONTEXT // BLOCK), (row + 1) * (CONTEXT // BLOCK))]
    return Chunk(sequence, CONTEXT - 1, CONTEXT, True)


def work(shape: str, rows: Sequence[int], ways: Sequence[str], seconds: float) -> None:
    """Answer each line of the standard input with the least times of a turn, way by way and size by size."""
    steps = Steps(shape, max(rows))
    for _ in sys.stdin:
        print(json.dumps({way: [steps.least_ms(n, way, seconds) for n in rows] for way in ways}), flush=True)


def start(python: str, shape: str, options: argparse.Namespace, ways: Sequence[str]) -> subprocess.Popen[str]:
    command = [python, __file__, "--worker", shape, "--ways", *ways, "--rows", *map(str, options.rows)]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def turns(shape: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """The least time of a step [ms] by way, for each number of rows."""
    workers = [start(sys.executable, shape, options, (ONE_CALL, PARTS))]
    if options.against:
        workers.append(start(str(options.against / ".venv/bin/python"), shape, options, (BEFORE,)))
    found: dict[str, list[float]] = {}
    for turn in range(options.turns + 1):
        for worker in workers:
            assert worker.stdin and worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"a process that measures {shape} has ended: run it by itself with --worker {shape}")
            # In the first turn the other process still loads its model.
            for way, times in json.loads(line).items() if turn else ():
                found[way] = [min(pair) for pair in zip(found.get(way, times), times, strict=True)]
    for worker in workers:
        worker.communicate()
    return found


def report(shape: str, rows: Sequence[int], found: dict[str, list[float]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    for i, n in enumerate(rows):
        ms = {way: times[i] for way, times in found.items()}
        rates = (f"{1e3 * n / ms[way]:.0f}" if way in ms else "-" for way in (BEFORE, PARTS, ONE_CALL))
        ratios = (f"{ms[way] / ms[ONE_CALL]:.2f}" if way in ms else "-" for way in (BEFORE, PARTS))
        yield f"| {shape} | {n} | {' | '.join((*rates, *ratios))} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--against", type=Path, help="a checkout of another commit, with a .venv")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way and number of rows in a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder of a dated file with the figures")
    parser.add_argument("--worker", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--ways", nargs="+", default=[BEFORE], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.worker:
        work(options.worker, options.rows, options.ways, options.seconds)
        return
    lines = [
        "| shape | rows | before, tokens/s | part by part | one call | before / one call, times | parts / one call |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in options.shapes:
        lines += report(shape, options.rows, turns(shape, options))
    text = "\n".join([machine(options.threads), "", *lines, ""])
    print(text)
    if options.out:
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        (options.out / f"cpu-families-{today}.md").write_text(f"# Families of models on a CPU, {today}\n\n{text}")


if __name__ == "__main__":
    main()
