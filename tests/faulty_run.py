"""launch/run.py in which chosen ranks meet errors. CLIF_FAULTS: "rank:method:call", joined by commas.

method: of ModelRunner, TrainRunner or Pass, say forward or backward; its call of that number (from 1) raises instead.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clif.engine.runner import ModelRunner
from clif.training.passes import Pass
from clif.training.train_runner import TrainRunner


def break_call(owner: type, method: str, number: int) -> None:
    original: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise torch.OutOfMemoryError(f"injected into call {number} of {method}")
        return original(*args, **kwargs)

    setattr(owner, method, counted)


for fault in filter(None, os.environ.get("CLIF_FAULTS", "").split(",")):
    rank, method, number = fault.split(":")
    if rank == os.environ.get("RANK"):
        owner = next(owner for owner in (ModelRunner, TrainRunner, Pass) if hasattr(owner, method))
        break_call(owner, method, int(number))
runpy.run_path(str(Path(__file__).parents[1] / "launch" / "run.py"), run_name="__main__")
