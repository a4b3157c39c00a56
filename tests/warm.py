"""Python scripts started in tenths of a second: forked of a server process that has imported torch and all of CLIF.

What a start costs otherwise is the import, four seconds of CPU for each rank. The interpreter's own start and the
launcher's way to it are what such a start leaves out: some tests start everything for real, see `Launched`.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PRELOADED = (
    "torch",
    "torch.distributed.run",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "clif.rank.worker",
    "ranks",
    "warm",
)
TORCHRUN = "torchrun"
"""As first argument in place of a script."""


def context() -> ForkServerContext:
    """The server's context: one server for all tests of a process."""
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(list(PRELOADED))
    return made


def rank_name(rank: int | str) -> str:
    """What the kernel calls a rank that torchrun forked; a command line of its own it has not."""
    return f"test rank {rank}"


class Script:
    """A script that runs, as a subprocess.Popen of it: arguments[0] is its path, or TORCHRUN.

    output, errors: files that get what it says, after what they hold.
    """

    def __init__(
        self, arguments: Sequence[str], output: Path, errors: Path, env: Mapping[str, str], cwd: Path = REPO
    ) -> None:
        places = (str(output), str(errors))
        self._process: BaseProcess = context().Process(
            target=_run, args=(tuple(arguments), places, dict(env), str(cwd)), daemon=False
        )
        self._process.start()
        # A test that failed leaves nothing that runs on; at its end, Python would wait for it.
        weakref.finalize(self, _stop, self._process)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _stop(process: BaseProcess) -> None:
    if process.is_alive():
        process.terminate()


def run(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60.0, cwd: Path = REPO
) -> subprocess.CompletedProcess[str]:
    """A script from its start to its end, as subprocess.run would."""
    (done,) = run_all(arguments, [os.environ if env is None else env], timeout, cwd)
    return done


def run_all(
    arguments: Sequence[str], envs: Sequence[Mapping[str, str]], timeout: float = 60.0, cwd: Path = REPO
) -> list[subprocess.CompletedProcess[str]]:
    """The same script in several environments at once: the ranks of a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        places = [(Path(folder) / f"{i}.out", Path(folder) / f"{i}.err") for i in range(len(envs))]
        scripts = [Script(arguments, *place, env, cwd) for place, env in zip(places, envs, strict=True)]
        try:
            codes = [script.wait(timeout) for script in scripts]
        finally:
            for script in scripts:
                script.kill()
        said = [[file.read_text() for file in place] for place in places]
    return [subprocess.CompletedProcess(arguments, code, *texts) for code, texts in zip(codes, said, strict=True)]


def _run(arguments: tuple[str, ...], places: tuple[str, str], env: dict[str, str], cwd: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for place, number in zip(places, (1, 2), strict=True):
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    if arguments[0] == TORCHRUN:
        _torchrun(arguments[1:])
    else:
        _script(arguments)


def _script(arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(arguments)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        # A process of multiprocessing leaves without.
        atexit._run_exitfuncs()


def _torchrun(arguments: Sequence[str]) -> None:
    """torchrun's own agent, whose ranks are forked of it and not interpreters that it starts."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def launch(config: LaunchConfig, entrypoint: Any) -> Any:
        config.start_method = "fork"
        return elastic_launch(config, _script)

    torchrun.elastic_launch = launch
    # Its own waits at the end for all ranks, and does not leave at a signal.
    api._wrap = _forked_rank
    torchrun.main(list(arguments))


def _forked_rank(local_rank: int, function: Any, arguments: Any, envs: Any, _: Any, __: Any, results: Any, *rest: Any):
    """arguments: as torchrun would start an interpreter with them, `-u script arguments`."""
    import torch.multiprocessing as torch_mp

    os.environ.update(envs[local_rank])
    # The agent's handlers, and the signal at its end, are not a rank's that was started by a path.
    torch_mp._prctl_pr_set_pdeathsig(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch_mp._set_thread_name(rank_name(os.environ["RANK"]))
    try:
        _script(arguments[local_rank][1:])
    except SystemExit as end:
        if end.code:
            raise
    results[local_rank].put(None)
