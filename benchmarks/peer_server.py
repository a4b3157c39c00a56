"""Servers of others that speak OpenAI's protocol, with a thread on every core; one rests while others answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from peer_files import PeerFiles

STARTS_S = 600.0
MODEL = "clif"
"""The name that all servers answer to."""


@dataclass
class PeerServer:
    """words: its command; PORT stands for the port. environment: besides this process's own."""

    name: str
    words: list[str]
    environment: dict[str, str]
    settings: str
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    url: str = ""

    def start(self) -> None:
        """Raises RuntimeError if it does not get ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [word.replace("PORT", str(port)) for word in self.words]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | self.environment
        self.process = subprocess.Popen(
            words, stdout=self.log, stderr=self.log, env=environment, start_new_session=True
        )
        self.url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_S
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self._said()
                self.stop()
                raise RuntimeError(f"{self.name} did not start: {said[-2000:]}")
            time.sleep(0.2)

    def rest(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.log.close()

    def _said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def vllm_server(python: str, files: PeerFiles, cores: tuple[int, ...], streams: int) -> PeerServer:
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", files.model, "--served-model-name", MODEL]
    words += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", str(streams), "--port", "PORT"]
    words += ["--host", "127.0.0.1", "--disable-log-stats"]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    said = (
        f"bfloat16, max_num_seqs {streams}, torch.compile on, prefix caching as by default, threads bound to all cores"
    )
    return PeerServer("vLLM on CPU", words, environment, said)


def llama_server(program: str, files: PeerFiles, cores: tuple[int, ...], streams: int) -> PeerServer:
    words = [program, "-m", files.gguf_bf16, "--alias", MODEL, "--port", "PORT", "-np", str(streams)]
    words += [
        "-c",
        str(512 * streams),
        "-t",
        str(len(cores)),
        "-tb",
        str(len(cores)),
        "-fa",
        "on",
        "-kvu",
        "--no-webui",
    ]
    return PeerServer("llama.cpp server", words, {}, f"bfloat16, {len(cores)} threads, {streams} slots, -fa on -kvu")


def known_servers(paths: dict[str, str], files: PeerFiles, cores: tuple[int, ...], streams: int) -> list[PeerServer]:
    """Those whose interpreter or program is given, by name."""
    makers = {"vllm": vllm_server, "llama": llama_server}
    return [
        make(paths[name], files, cores, streams) for name, make in makers.items() if Path(paths.get(name, "")).is_file()
    ]
