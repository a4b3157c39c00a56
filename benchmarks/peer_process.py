"""A contender in an environment of its own: a driver of benchmarks/peers/, which speaks JSON lines (peers/protocol.py).

It rests, stopped by the kernel, while others compute: pools of threads that wait by turning would take their cores.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from turns import Contender, Limits, Outcome, Turn

DRIVERS = Path(__file__).resolve().parent / "peers"
START_S = 600.0
"""Seconds for loading and compiling."""


@dataclass
class PeerContender(Contender):
    """python: of the peer's environment. driver: a file of benchmarks/peers/. job: as the protocol has it, less what
    the limits say. inputs: the message of a turn."""

    python: str
    driver: str
    job: dict[str, Any]
    inputs: Callable[[Turn], dict[str, Any]]
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def start(self, limits: Limits) -> None:
        self._limits, self._rest = limits, b""
        environment = {**os.environ, **limits.environment(), "HF_HUB_OFFLINE": "1"}
        # Paths of CLIF's environment are none of the peer's.
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [self.python, str(DRIVERS / self.driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        self._send({**self.job, "cores": list(limits.cores), "memory_bytes": limits.memory_bytes})
        if not self.failed and (answer := self._receive(START_S)) is not None:
            self.settings = f"{answer['settings']}; {answer['versions']}"
        self._signal(signal.SIGSTOP)

    def begin(self, turn: Turn) -> None:
        self._signal(signal.SIGCONT)
        self._send(self.inputs(turn))

    def finish(self) -> tuple[Outcome, float] | None:
        answer = self._receive(self._limits.turn_s)
        memory = self._memory_mib()
        self._signal(signal.SIGSTOP)
        return None if answer is None else (Outcome(answer["seconds"], answer["result"]), memory)

    def stop(self) -> None:
        """End its whole session: engines and servers of its own are in it."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            assert file is not None
            file.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.failed = self._end()

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Its next answer; None if there is none."""
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                self.failed = f"no answer within {seconds:g} s"
                self._signal(signal.SIGKILL)
                return None
            if not (piece := os.read(self.process.stdout.fileno(), 1 << 16)):
                self.failed = self._end()
                return None
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        self.failed = answer.get("error", "")
        return None if self.failed else answer

    def _end(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its line"
        self.log.seek(0)
        last = (self.log.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        return f"ended with code {code}: {last[:200]}"

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def _memory_mib(self) -> float:
        """Peaks of all its processes together."""
        total = 0
        try:
            found = psutil.Process(self.process.pid)
            for one in [found, *found.children(recursive=True)]:
                status = Path(f"/proc/{one.pid}/status").read_text()
                total += int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else 0
        except (psutil.NoSuchProcess, FileNotFoundError):
            return 0.0
        return total / 1024
