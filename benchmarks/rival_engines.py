"""Other engines and trainers that benchmarks/engine.py compares with, if their environments are there.

An environment is a Python interpreter, given as `--peer vllm=/path/to/venv/bin/python`; a program, as
`--peer llama=/path/to/llama-server`. Without one, this Python environment is looked at. A contender that is not found
is left out, and the report says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import Work
from peer_files import PeerFiles
from peer_process import PeerContender
from turns import Contender, Turn

from clif.errors import InputError


@dataclass(frozen=True)
class Rival:
    """title: in the report. driver: in benchmarks/peers. module: which its environment must have; "": a program.

    adapters: the most versions at once that it serves.
    """

    title: str
    driver: str
    module: str
    adapters: int = 0


SERVING = {
    "openvino": Rival("OpenVINO GenAI", "serve_openvino.py", "openvino_genai", 1),
    "vllm": Rival("vLLM on CPU", "serve_vllm.py", "vllm", 2),
    "llama": Rival("llama.cpp server", "serve_llama.py", "", 2),
}
TRAINING = {
    "unsloth": Rival("Unsloth", "train_unsloth.py", "unsloth"),
    "torchtune": Rival("torchtune", "train_torchtune.py", "torchtune"),
}


@dataclass(frozen=True)
class Field:
    """Contenders in other environments that were found, and a line for each that was not."""

    serving: list[Contender]
    training: list[Contender]
    left_out: list[str]


def parse(given: Sequence[str]) -> dict[str, str]:
    """name=path as a table. Raises InputError."""
    found = dict(one.split("=", 1) if "=" in one else (one, "") for one in given)
    known = {**SERVING, **TRAINING}
    for name, path in found.items():
        if name not in known or not path:
            raise InputError(f"--peer {name}={path}: give NAME=PATH, where NAME is one of {', '.join(known)}")
    return found


def why_not(rival: Rival, path: str) -> str:
    """Why it cannot run, or nothing. path: "" for this environment."""
    if not rival.module:
        return "" if path and Path(path).is_file() else "no program given" if not path else f"no file {path}"
    python = path or sys.executable
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({rival.module!r}) is None)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python}: {error}"
    return f"{rival.module} is not installed in {'this environment' if not path else python}" if done.returncode else ""


def vocabulary(files: PeerFiles) -> int:
    size: int = json.loads((Path(files.model) / "config.json").read_text())["vocab_size"]
    return size


def serving_job(work: Work, files: PeerFiles) -> dict[str, Any]:
    sizes = {"requests": work.at_once, "prompt": work.prompt, "answer": work.answer, "kv_tokens": work.kv_tokens}
    return {**asdict(files), "adapters": work.adapters, **sizes}


def serving_contender(rival: Rival, path: str, work: Work, files: PeerFiles) -> PeerContender:
    vocab = vocabulary(files)

    def inputs(turn: Turn) -> dict[str, Any]:
        return {"prompts": work.prompts(turn, vocab), "adapters": work.versions(turn)}

    python = path if rival.module and path else sys.executable
    job = {**serving_job(work, files), "program": path}
    return PeerContender(rival.title, python, rival.driver, job, inputs)


def training_contender(rival: Rival, path: str, work: Work, files: PeerFiles) -> PeerContender:
    config, vocab = work.config(), vocabulary(files)
    names = ("samples", "length", "targets", "steps")
    settings = {"lr": config.train.lr, "weight_decay": config.train.weight_decay, "clip_norm": config.train.clip_norm}
    sizes = {"r": config.adapter.r, "lora_alpha": config.adapter.lora_alpha}

    def inputs(turn: Turn) -> dict[str, Any]:
        steps = work.training(turn, vocab)
        return {"steps": [[{"ids": s.ids, "target_start": s.target_start} for s in step] for step in steps]}

    job = {**asdict(files), **settings, **sizes, **{name: getattr(work, name) for name in names}}
    return PeerContender(rival.title, path or sys.executable, rival.driver, job, inputs)
