"""Starts ranks on gloo in one machine, in tenths of a second: see warm.py; FileStore."""

from __future__ import annotations

import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import warm

from clif.config import config_from_tree
from clif.distributed.launch_env import RankEnv
from clif.distributed.topology import make_topology


def run_ranks(
    world: int,
    body: Callable[..., Any],
    *args: Any,
    layout: dict | None = None,
    device: str = "cpu",
    timeout_s: float = 30,
    ranks_per_gpu: int = 1,
    limit_s: float = 60,
) -> list[Any]:
    """Run body(topology, *args) on every rank; returns their results. body must be importable by name.

    device cuda: on NCCL, one GPU per rank; with ranks_per_gpu above 1 on gloo.

    A rank's exception is raised here with its traceback; a rank that hangs is an error after limit_s, too.
    """
    tree = {
        "model": {"path": "none", "device": device},
        "train": {"enabled": False},
        "layout": layout or {},
        "dist": {"timeout_s": timeout_s, "ranks_per_gpu": ranks_per_gpu},
    }
    context = warm.context()
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, queue, body, args, tree), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            results = dict(queue.get(timeout=limit_s) for _ in range(world))
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    failed = {rank: out[1] for rank, out in results.items() if out[0] == "error"}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
    return [pickle.loads(results[rank][1]) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, queue: Any, body: Callable, args: tuple, tree: dict) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        topology = make_topology(config_from_tree(tree), RankEnv(rank, world, rank, world), store)
        # Pickled here, by value: torch's own way would leave tensors in this process, which is about to end.
        queue.put((rank, ("ok", pickle.dumps(body(topology, *args)))))
        # Nobody leaves while others may still talk to it.
        store.add("left", 1)
        while store.add("left", 0) < world:
            time.sleep(0.01)
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, ("error", traceback.format_exc())))
        raise
