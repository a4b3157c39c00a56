"""From a client's disconnecting to the freed blocks of its request, in milliseconds and steps of the real engine."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from lean_client import Exchange, chat_request, connect
from served import Served

MODEL_CONTEXT, GONE_AFTER = 512, 40
PAUSE_S = 0.5


async def disconnect(url: str, number: int) -> float:
    """Ask for a long answer and leave in its midst; the time.time() of the leaving."""
    connection = await connect(url)
    exchange = Exchange(number)
    asking = asyncio.create_task(connection.ask(exchange, chat_request(url, number, MODEL_CONTEXT - 100)))
    while len(exchange.pieces) < GONE_AFTER:
        assert not asking.done(), f"the answer ended early: {exchange.status} {exchange.error} {exchange.pieces[-1:]}"
        await asyncio.sleep(0.005)
    left = time.time()
    connection.close()
    asking.cancel()
    return left


async def leave_often(url: str, count: int) -> list[float]:
    """A client reads on all the time, so that the engine never rests; others leave one after the other."""
    stays = asyncio.create_task(stay(url))
    left = []
    for number in range(count):
        left.append(await disconnect(url, 1000 + number))
        await asyncio.sleep(PAUSE_S)
    stays.cancel()
    return left


async def stay(url: str) -> None:
    connection = await connect(url)
    for number in range(100_000):
        await connection.ask(Exchange(number), chat_request(url, number, 64))


def measure_freed(folder: Path, repeats: int) -> Iterable[str]:
    """Lines of Markdown. The tiny model of configs/models, one rank."""
    folder.mkdir()
    sizes = [f"model.max_context={MODEL_CONTEXT}", "engine.kv_tokens=8192", "engine.prefix_reuse=false"]
    # One core for the engine, and one for all others.
    one_core = "dist.threads_per_rank=1"
    with Served(folder, *sizes, one_core, "train.enabled=false", "metrics.flush_s=0.1") as server:
        left = asyncio.run(leave_often(server.url, 5 * repeats))
    steps, delays, lengths = [], [], []
    with h5py.File(folder / "run" / "rank-00000.h5") as file:
        ticks, start = file["ticks"][:], float(file.attrs["start_unix"])
    at = ticks["t"] + start
    for moment in left:
        after = np.flatnonzero(at > moment)
        used = ticks["kv_used"][after]
        # The request that leaves has blocks for 40 tokens and more; the one that stays never frees as many at once
        # but at its end, which is the end of a step as well.
        freed = int(np.flatnonzero(np.diff(used, prepend=used[0]) <= -GONE_AFTER)[0])
        steps.append(freed)
        delays.append(1000 * (at[after[freed]] - moment))
        lengths.append(1000 * float(np.median(ticks["seconds"][after[: freed + 1]])))
    yield "## From a disconnect to freed blocks, real engine, tiny model"
    yield ""
    yield (
        f"{len(left)} clients leave in the midst of an answer while another one reads on. Steps that ended after the "
        f"leaving and still held the blocks: median {statistics.median(steps):g}, at most {max(steps)}. Until the end "
        f"of the first step without them: median {statistics.median(delays):.1f} ms, at most {max(delays):.1f} ms, of "
        f"steps of {statistics.median(lengths):.1f} ms."
    )
    yield ""
