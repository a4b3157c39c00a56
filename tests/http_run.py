"""A server as clients see it: a real front end in its process, the real control server, and simulated replicas.

All of them talk over ZeroMQ, in real time. The control server and the replicas are threads of the test, so that it can
look at what they hold.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
from control_run import Run, make_config
from scripted_replica import KEYS
from text_replica import TextReplicaThread, tokenizer

from clif.config import Config
from clif.control.frontend_process import FrontendProcess, listen
from clif.storage.files import write_atomic
from clif.wire.keys import ADDRESS_FILE

WAIT_S = 20.0
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"linger_s": 1.0, "max_s": None, "drain_s": 5.0},
    "model": {"max_context": 512},
    "engine": {"max_batch": 32, "kv_tokens": 32768},
    "serve": {"http": {"port": 0}},
    "load": {"kind": "none"},
    "train": {"enabled": False},
    "federation": {"rounds": None},
    "quality": {"exact_match_rows": 0},
}


def http_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    """A run that serves clients alone. sections: changes of its fields; None leaves a field to its default."""
    tree = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in {*SECTIONS, *sections}}
    kept = {
        name: {k: v for k, v in values.items() if v is not None or k in ("max_s", "rounds")}
        for name, values in tree.items()
    }
    return make_config(tmp_path, **kept)


class HttpRun:
    """A run with its server. Start it by `with`; it is drained, as by SIGTERM, at the end."""

    def __init__(self, config: Config, replicas: int = 1) -> None:
        self.config = config
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(1, "control")
        # The store of jobs belongs to the thread that opens it.
        self.run = self._thread.submit(
            lambda: Run(config, replicas, sockets=True, signalled=lambda: "got SIGTERM" if self._over.is_set() else "")
        ).result()
        run_dir = config.run_dir
        KEYS.write(run_dir)
        write_atomic(run_dir / ADDRESS_FILE, self.run.channel.address.encode())
        write_atomic(run_dir / "config.json", config.model_dump_json().encode())
        tokenizer().save(run_dir / "tokenizer")
        self.frontend = FrontendProcess(run_dir, listen(config.serve.http))
        assert self.run.frontend is not None
        self.run.frontend._child = self.frontend
        self.url = self.frontend.url
        self.replicas = [TextReplicaThread(config, number, self.run.channel.address) for number in range(replicas)]
        self._control: Future[None] | None = None

    @property
    def dispatcher(self) -> Any:
        return self.run.server.dispatcher

    @property
    def frontend_pid(self) -> int:
        assert self.frontend._process is not None
        return self.frontend._process.pid

    @property
    def used_tokens(self) -> int:
        """Of the KV caches of all replicas."""
        return sum(thread.replica.scheduler.pool.used_tokens for thread in self.replicas if thread.replica)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, "timeout": WAIT_S, **options}
        )

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, "timeout": WAIT_S, **options}
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=WAIT_S)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=WAIT_S)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Of a table, once the run has ended."""
        return self.run.table(table)

    def hold(self) -> None:
        """From here on no replica takes a step of serving."""
        for thread in self.replicas:
            assert thread.replica is not None
            thread.replica.serves = lambda: False  # type: ignore[method-assign]

    def release(self) -> None:
        for thread in self.replicas:
            assert thread.replica is not None
            thread.replica.serves = lambda: True  # type: ignore[method-assign]

    def drain(self) -> None:
        """As SIGTERM does."""
        self._over.set()

    def start(self) -> None:
        self._control = self._thread.submit(self.run.server.run)
        for thread in self.replicas:
            thread.start()
        eventually(self._ready)

    def stop(self) -> None:
        """Raises what the control server raised."""
        self.drain()
        assert self._control is not None
        try:
            self._control.result(WAIT_S)
        finally:
            for thread in self.replicas:
                thread.end.set()
                thread.join(WAIT_S)
            self.run.channel.close()
            self.run.journal.close()
            self._thread.shutdown(wait=False)

    def __enter__(self) -> "HttpRun":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _ready(self) -> bool:
        assert self._control is not None
        if self._control.done():
            self._control.result()
        try:
            return self.get("/ready").status_code == 200
        except httpx.TransportError:
            return False


def eventually(happened: Callable[[], bool], within_s: float = WAIT_S) -> None:
    """Wait until it has happened. Raises AssertionError if it does not."""
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def http_run(tmp_path: Path, replicas: int = 1, **sections: dict[str, Any]) -> Iterator[HttpRun]:
    with HttpRun(http_config(tmp_path, **sections), replicas) as run:
        yield run
