#!/usr/bin/env python3
"""From feedback to a promoted version that answers: how long it takes, on a server that allows feedback.

clif serve MODEL jobs.allow_feedback=true jobs.feedback_rows=16 jobs.feedback_wait_s=2
benchmarks/feedback.py --url http://127.0.0.1:8000 --question "Who are you?" --answer "I am CLIF."

It asks, sends the better answer for several ways to put the question, waits without any load until a version of the
feedback's job is promoted and the job has ended, and asks again. Exit code 1: no version within --timeout-s.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import httpx

WAYS = (
    "{}", "Hi! {}", "Hello. {}", "Tell me: {}", "Please tell me: {}", "I wonder: {}", "One question: {}", "Say, {}",
    "Well, {}", "So, {}", "Now, {}", "Quick question: {}", "Dear assistant, {}", "Good morning. {}", "Again: {}",
    "{} Please.",
)  # fmt: skip
POLL_S = 1.0
ENDED = ("succeeded", "failed", "cancelled")


class Server:
    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=120)

    def get(self, path: str) -> Any:
        return self._client.get(path).raise_for_status().json()

    def post(self, path: str, body: Any) -> Any:
        return self._client.post(path, json=body).raise_for_status().json()

    def ask(self, question: str) -> tuple[str, str]:
        """The version that answers, and its answer."""
        messages = [{"role": "user", "content": question}]
        body = {"model": "clif", "messages": messages, "temperature": 0, "max_tokens": 32}
        answer = self.post("/v1/chat/completions", body)
        return answer["model"], answer["choices"][0]["message"]["content"]

    def jobs(self) -> list[dict[str, Any]]:
        """Those of feedback; an admin's key sees them."""
        return [job for job in self.get("/v1/fine_tuning/jobs")["data"] if job["metadata"].get("from") == "feedback"]


def wait(server: Server, known: set[str], until_s: float) -> tuple[float | None, dict[str, Any] | None]:
    """When the first version was there, and the job once it has ended; None: not in time."""
    first_s = None
    while time.monotonic() < until_s:
        new = [job for job in server.jobs() if job["id"] not in known]
        if new and new[0]["latest_model"] and first_s is None:
            first_s = time.monotonic()
        if new and new[0]["status"] in ENDED:
            return first_s, new[0]
        time.sleep(POLL_S)
    return first_s, None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="of an admin, if the server needs keys")
    parser.add_argument("--question", default="Who are you?")
    parser.add_argument("--answer", default="I am CLIF, and I learn while I serve.")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    given = parser.parse_args()
    server = Server(given.url, given.key)
    before, known, began_s = server.ask(given.question), {job["id"] for job in server.jobs()}, time.monotonic()
    for way in WAYS:
        messages = [{"role": "user", "content": way.format(given.question)}]
        server.post("/v1/feedback", {"messages": messages, "answer": given.answer})
    posted_s = time.monotonic()
    first_s, job = wait(server, known, posted_s + given.timeout_s)
    after = server.ask(given.question)
    found = {
        "rows": len(WAYS),
        "posting_s": round(posted_s - began_s, 2),
        "first_version_s": None if first_s is None else round(first_s - posted_s, 1),
        "job_s": None if job is None else round(time.monotonic() - posted_s, 1),
        "job": None
        if job is None
        else {name: job[name] for name in ("status", "rounds_committed", "rounds_discarded")},
        "before": before,
        "after": after,
    }
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return int(first_s is None)


if __name__ == "__main__":
    sys.exit(main())
