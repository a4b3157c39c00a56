"""The process of the HTTP front end: python -P -m clif.frontend --run-dir RUN --fd N. Started by the control process.

It ends when the control process tells it to, or is gone. Signals are the control process's: it drains, while this one
goes on to carry the last answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from clif.config import Config
from clif.frontend.app import make_app
from clif.frontend.link import Link
from clif.frontend.protocol import Connection, end_stalled, most_connections
from clif.frontend.recent_answers import RecentAnswers
from clif.frontend.route_parts import Parts
from clif.jobs.samples import FILES
from clif.storage.files import keep_private
from clif.tokenizer import ChatTokenizer

CLOSE_S = 5
"""Seconds that open connections have to end once the run is over."""
KEEP_ALIVE_S = 75


class Server(uvicorn.Server):
    """Without handlers of its own for signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P -m clif.frontend", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket, inherited")
    parser.add_argument("--first-id", type=int, required=True, help="id of the first request")
    return parser.parse_args(arguments)


def keep_uploads(run_dir: Path) -> None:
    """Uploads lie where there is room for them from their first byte on: /tmp is memory on some systems."""
    folder = run_dir / FILES
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)


async def serve(arguments: argparse.Namespace) -> None:
    run_dir: Path = arguments.run_dir
    config = Config.model_validate_json((run_dir / "config.json").read_text())
    link = Link(run_dir, arguments.first_id)
    parts = Parts(config, link, ChatTokenizer.load(run_dir / "tokenizer"), recent=RecentAnswers.configured(config.jobs))

    class Limited(Connection):
        most = most_connections(config.serve.http.max_running)

    settings = uvicorn.Config(
        make_app(parts),
        http=Limited,
        ws="none",
        # Below it are reports on what clients send.
        log_level="error",
        access_log=False,
        # Longer than clients keep a connection without use: otherwise it could end while a request is under way.
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=None,
        lifespan="off",
    )
    server = Server(settings)
    receiving = asyncio.create_task(link.receive())
    serving = asyncio.create_task(server.serve([socket.socket(fileno=arguments.fd)]))
    watching = asyncio.create_task(end_stalled(server.server_state.connections, config.serve.http.stall_s))
    following = asyncio.create_task(parts.history.follow(link))
    link.start()
    await asyncio.wait({receiving, serving}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    watching.cancel()
    following.cancel()
    link.close()
    if receiving.done():
        receiving.result()


def main() -> int:
    arguments = parse()
    keep_private()
    keep_uploads(arguments.run_dir)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # It warns of every malformed upload, whose client is told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
        runner.run(serve(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
