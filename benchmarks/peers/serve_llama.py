"""llama.cpp: `llama-server` with a slot for each request, asked by as many connections; answers come whole.

Built with -march=native, weights in bfloat16, threads pinned by itself, flash attention on, one KV cache for all slots.
A LoRA of each request is chosen by its scale; requests of different adapters do not share a batch there.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from protocol import Work, answer_turns, first_tokens

START_S = 60.0


def prepare(job: dict[str, Any]) -> Any:
    port, cores, slots = free_port(), job["cores"], job["requests"]
    room = slots * (job["prompt"] + job["answer"] + 16)
    words = [job["program"], "-m", job["gguf_bf16"], "--port", str(port), "-np", str(slots), "-c", str(room)]
    words += [
        "-t",
        str(len(cores)),
        "-tb",
        str(len(cores)),
        "--cpu-range",
        f"{cores[0]}-{cores[-1]}",
        "--cpu-strict",
        "1",
    ]
    words += ["-b", "2048", "-ub", "512", "-fa", "on", "-kvu", "--no-cache-prompt", "--no-webui"]
    words += job.get("options", [])
    for folder in job["adapters"]:
        words += ["--lora", f"{folder}/lora.gguf"]
    # OpenMP would pin its threads a second time.
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_CPU_AFFINITY"}
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
    atexit.register(server.kill)
    wait_until_ready(port, server)
    pool = ThreadPoolExecutor(slots)

    def turn(asked: dict[str, Any]) -> Work:
        bodies = [
            json.dumps(body(ids, number, job)) for ids, number in zip(asked["prompts"], asked["adapters"], strict=True)
        ]
        return lambda: first_tokens(list(pool.map(lambda text: ask(port, text), bodies)), job["answer"])

    shown = " ".join(word for word in words[3:] if "/" not in word)
    return f"llama-server, {version(job['program'])}, {shown}", turn


def body(ids: list[int], number: int, job: dict[str, Any]) -> dict[str, Any]:
    asked = {"prompt": ids, "n_predict": job["answer"], "ignore_eos": True, "temperature": 0, "return_tokens": True}
    if job["adapters"]:
        asked["lora"] = [{"id": i, "scale": float(i == number)} for i in range(len(job["adapters"]))]
    return {**asked, "cache_prompt": False, "n_probs": 0, "samplers": ["top_k"], "top_k": 1}


def ask(port: int, text: str) -> list[int]:
    """The tokens of an answer. Raises RuntimeError."""
    line = http.client.HTTPConnection("127.0.0.1", port)
    line.request("POST", "/completion", text, {"Content-Type": "application/json"})
    reply = line.getresponse()
    found = json.loads(reply.read())
    line.close()
    if reply.status != 200:
        raise RuntimeError(f"status {reply.status}: {found}")
    tokens: list[int] = found["tokens"]
    return tokens


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            line = http.client.HTTPConnection("127.0.0.1", port)
            line.request("GET", "/health")
            if line.getresponse().status == 200:
                return
        except OSError:
            pass
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"llama-server did not start (code {server.poll()})")
        time.sleep(0.1)


def version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stderr
    return next((line for line in said.splitlines() if line.startswith("version")), "version unknown")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    answer_turns(prepare)
