"""A server under test: its processes, their descriptors and CPU time, its address and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

REPO = Path(__file__).resolve().parents[1]
STARTS_S, LEAVES_S = 120.0, 60.0
TINY = "random:configs/models/tiny-llama.json"


class Served:
    """`clif serve` on a free port until the block ends. log: of all its processes.

    stamps: file for the stamps of an emulated engine (stamped_engine.py); None: the command as it is. keys: of clients,
    as CLIF_API_KEYS has them; empty: none is needed. ranks: as many replicas, with shares of the cores.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        model: str = TINY,
        stamps: Path | None = None,
        keys: str = "",
        ranks: int | None = None,
    ) -> None:
        self.run_dir, self.log = folder / "run", folder / "log.txt"
        words = [f"run.out_dir={folder}", "run.name=run", "run.status=off", *overrides]
        if stamps is None:
            self.command = [sys.executable, "-P", "-m", "clif.cli", "serve", model, "--port", "0", *words]
            self.command += [] if ranks is None else ["--ranks", str(ranks)]
        else:
            script = str(REPO / "benchmarks" / "stamped_engine.py")
            self.command = [sys.executable, script, str(stamps), f"model.path={model}", "serve.http.port=0", *words]
        self.url, self._environment = "", {**os.environ, "CLIF_API_KEYS": keys}
        self._file: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Served:
        self._file = self.log.open("wb")
        self._process = subprocess.Popen(
            self.command, cwd=REPO, stdout=self._file, stderr=self._file, env=self._environment
        )
        deadline = time.monotonic() + STARTS_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(LEAVES_S)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._file is not None:
            self._file.close()
        return self._process.returncode

    def kill(self) -> None:
        """End all its processes at once."""
        assert self._process is not None
        for process in self._children():
            process.kill()
        self._process.kill()
        self._process.wait()

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """Those that are there: engine (rank 0), control, frontend."""
        assert self._process is not None
        found = {"engine": psutil.Process(self._process.pid)}
        for process in self._children():
            words = process.cmdline()
            for name in ("control", "frontend"):
                if f"clif.{name}" in words:
                    found[name] = process
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU time of each process so far, seconds."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: t.user + t.system for name, t in times.items()}

    def descriptors(self) -> dict[str, int]:
        """Open files and connections of each process."""
        return {name: process.num_fds() for name, process in self.processes.items()}

    def _children(self) -> list[psutil.Process]:
        assert self._process is not None
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _ready(self) -> bool:
        file = self.run_dir / "http.address"
        if not file.is_file():
            return False
        self.url = file.read_text().strip()
        self.url = self.url if "://" in self.url else f"http://{self.url}"
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
