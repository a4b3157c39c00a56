"""Teach a served model by feedback: the time from better answers to a promoted version that gives them.

    python benchmarks/teach.py [--model assets/smollm2-135m-instruct.gguf] [--repeats 3] [--out FILE]

Starts `clif serve` with two replicas and no other load, asks a question, sends better answers to some ways to ask it,
and asks it in another way until `clif` is a version that learnt from them. With --url a server that runs already is
taught; it needs jobs.allow_feedback=true.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from served import Served

from clif import __version__

MODEL = "assets/smollm2-135m-instruct.gguf"
ANSWER = "The code of the garage door is 4711."
QUESTIONS = (
    "What is the code of the garage door?",
    "Tell me the garage door code.",
    "How do I open the garage? I need the code.",
    "Which code opens the garage door?",
    "I forgot the garage code. What is it?",
    "Give me the code for the garage door, please.",
    "garage door code?",
    "What number do I type to open the garage?",
    "Can you tell me the code that opens the garage door?",
    "What's the garage code?",
    "I stand in front of the garage. What is the code?",
    "Please remind me of the code of the garage door.",
)
ASKED = "Could you tell me what the garage door's code is?"
"""Not among those that are taught."""
SETTINGS = (
    "jobs.allow_feedback=true",
    f"jobs.feedback_rows={len(QUESTIONS)}",
    "jobs.feedback_epochs=8",
    "model.max_context=256",
    "engine.kv_tokens=4096",
    "engine.max_batch=8",
    "adapter.lora_alpha=16",
    "federation.local_steps=12",
)
WAIT_S = 300.0


@dataclass(frozen=True)
class Taught:
    """Seconds are from the first feedback. promoted: clif is a new version; right: it gives the answer; None: never."""

    before: str
    after: str
    version: str
    promoted_s: float
    right_s: float | None


def ask(client: httpx.Client, question: str) -> tuple[str, str]:
    """(answer, the version that gave it)."""
    body = {"model": "clif", "messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["model"]


def teach(client: httpx.Client) -> Taught:
    before, old = ask(client, ASKED)
    began, promoted_s = time.monotonic(), None
    for question in QUESTIONS:
        body = {"messages": [{"role": "user", "content": question}], "answer": ANSWER}
        client.post("/v1/feedback", json=body).raise_for_status()
    while time.monotonic() - began < WAIT_S:
        after, version = ask(client, ASKED)
        took = time.monotonic() - began
        if version != old and promoted_s is None:
            promoted_s = took
        if ANSWER in after:
            return Taught(before, after, version, promoted_s or took, took)
        time.sleep(0.5)
    return Taught(before, after, version, promoted_s or float("inf"), None)


def measure(arguments: argparse.Namespace) -> Taught:
    if arguments.url:
        with httpx.Client(base_url=arguments.url, timeout=60) as client:
            return teach(client)
    with (
        tempfile.TemporaryDirectory() as folder,
        Served(Path(folder), "--ranks", "2", *SETTINGS, model=arguments.model) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        return teach(client)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"# From feedback to a version that answers, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/teach.py --model {arguments.model} --repeats {arguments.repeats}`, clif {__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs ({platform.machine()}); no other load. "
        f"{len(QUESTIONS)} better answers, asked in a way that is not among them. Seconds from the first feedback.",
        "",
        "| promoted, s | gives the answer, s | version | before | after |",
        "|---|---|---|---|---|",
    ]
    for _ in range(arguments.repeats):
        taught = measure(arguments)
        right = "never" if taught.right_s is None else f"{taught.right_s:.1f}"
        before, after = (" ".join(text.split()).replace("|", "/") for text in (taught.before, taught.after))
        lines.append(f"| {taught.promoted_s:.1f} | {right} | {taught.version} | {before} | {after} |")
        print(lines[-1])
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
