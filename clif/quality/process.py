"""The process in which answers are scored, so that the control loop never waits for a metric.

It reads its work from a file and writes its scores to one: neither side waits for the other, and no pipe can be full.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import msgspec

from clif.quality.work import Score, Work


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a measurement. error: why there are no scores; empty: nothing went wrong."""

    scores: tuple[Score, ...] = ()
    error: str = ""


class Scoring(Protocol):
    """Scores one measurement at a time, elsewhere."""

    def start(self, work: Work) -> None: ...

    def poll(self) -> Outcome | None:
        """What came of it, once; None: it is not complete."""
        ...

    def stop(self) -> None:
        """Give it up, if one is under way."""
        ...


class ScoringProcess:
    """A process for each measurement; it lasts for as long as its metrics take."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, work: Work) -> None:
        """Raises OSError where no process can be started."""
        self.stop()
        self._folder = tempfile.TemporaryDirectory(prefix="clif-scoring-")
        asked, said, errors = self._paths(self._folder)
        asked.write_bytes(msgspec.json.encode(work))
        command = [sys.executable, "-P", "-m", "clif.quality"]
        with asked.open("rb") as source, said.open("wb") as output, errors.open("wb") as trouble:
            self._process = subprocess.Popen(command, stdin=source, stdout=output, stderr=trouble)

    def poll(self) -> Outcome | None:
        if self._process is None or self._folder is None or self._process.poll() is None:
            return None
        _, said, errors = self._paths(self._folder)
        try:
            return msgspec.json.decode(said.read_bytes(), type=Outcome)
        except msgspec.DecodeError:
            lines = errors.read_text(errors="replace").strip().splitlines()
            return Outcome(error=lines[-1] if lines else f"its process ended with status {self._process.returncode}")
        finally:
            self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()
        self._process = self._folder = None

    @staticmethod
    def _paths(folder: tempfile.TemporaryDirectory[str]) -> list[Path]:
        return [Path(folder.name) / name for name in ("work.json", "outcome.json", "errors")]
