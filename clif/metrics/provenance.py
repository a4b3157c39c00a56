"""The provenance of a run's figures: configuration, versions, host, GPUs, commit. Free of torch."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pynvml

import clif
from clif.config import Config

PACKAGES = ("torch", "transformers", "peft", "triton", "deepspeed", "mpi4py", "numpy", "h5py", "msgspec", "pyzmq")


def provenance(config: Config | None = None) -> dict[str, str | float]:
    """Attributes of a metrics file. Versions come from package metadata, so that nothing heavy is imported.

    Unknown values are empty strings. engine: emulated where no model computes anything, otherwise clif. The wall time
    of the start comes from the writer (start_unix).
    """
    versions = {f"version.{name}": _version(name) for name in PACKAGES}
    return {
        "clif": clif.__version__,
        "config": config.model_dump_json() if config is not None else "",
        "engine": "emulated" if config is not None and config.engine.emulated is not None else "clif",
        "python": platform.python_version(),
        **{key: value for key, value in versions.items() if value},
        "host": socket.gethostname(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": float(os.cpu_count() or 0),
        "gpus": ", ".join(gpu_names()),
        "git_commit": git_commit(),
        "command_line": shlex.join(sys.argv),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu_model() -> str:
    """Name of the CPU, if the system reports one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gpu_names() -> list[str]:
    """Names of the host's GPUs; empty where NVML does not answer."""
    return [str(name) for name in _each_gpu(pynvml.nvmlDeviceGetName)]


def gpu_bytes() -> list[int]:
    """Memory of each of the host's GPUs; empty where NVML does not answer."""
    return [int(memory.total) for memory in _each_gpu(pynvml.nvmlDeviceGetMemoryInfo)]


def _each_gpu(ask: Callable[[Any], Any]) -> list[Any]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [ask(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def git_commit() -> str:
    """Commit of the checkout this code runs from, with "-dirty" if it was changed; empty outside of a checkout."""
    package = Path(clif.__file__).parent
    # CLIF may be installed into an environment inside another checkout, which does not track this file.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or ""


def _git(folder: Path, *arguments: str) -> str | None:
    # Many ranks of one host run git at the same time: none may take the index lock.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
