"""The process of the HTTP front end: its listening socket, its start, and its start again after it died."""

from __future__ import annotations

import errno
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

from clif.config import HttpConfig
from clif.control.policy.phases import ControlError
from clif.distributed.addresses import in_url
from clif.storage.files import write_atomic
from clif.storage.run_folder import HTTP_ADDRESS_FILE

BACKLOG = 4096
BIND_S = 10.0
"""A front end of the start before leaves within seconds of its control process; until then it holds the port."""
MOST_STARTS, SHORT_S = 10, 10.0
"""A front end that ends so often in a row, each time within so many seconds, cannot run here."""
WAIT_S, MOST_WAIT_S = 0.5, 30.0
LEAVES_S = 10.0


def former_port(run_dir: Path) -> int:
    """The port of an earlier start in this folder, which clients know; 0: there is none."""
    try:
        return int((run_dir / HTTP_ADDRESS_FILE).read_text().rsplit(":", 1)[1])
    except (OSError, ValueError, LookupError):
        return 0


def listen(config: HttpConfig, former: int = 0) -> socket.socket:
    """The socket that clients connect to. It outlives the front end's process. Raises ControlError.

    former: the port of the start before, which a free one (serve.http.port 0) is to be again after a restart.
    """
    assert config.port is not None
    port = config.port or former
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    deadline = time.monotonic() + BIND_S
    while True:
        try:
            return socket.create_server((config.host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ControlError(
                    f"cannot listen on {config.host} port {port} ({error.strerror}): set serve.http.port to a "
                    "free one (0: any), and serve.http.host to an own address"
                ) from error
        time.sleep(0.2)


def start_again(short_lives: int, ended: str) -> float:
    """Seconds until the next start, after so many short lives in a row. Raises ControlError when it is hopeless.

    What ends it may come from clients, so that a long life ends the count: the run goes on.
    """
    if short_lives >= MOST_STARTS:
        raise ControlError(f"the HTTP front end ended {MOST_STARTS} times right after its start, the last one: {ended}")
    return min(MOST_WAIT_S, WAIT_S * 2 ** (short_lives - 1)) if short_lives > 1 else 0.0


class FrontendProcess:
    """A FrontendChild: python -P -m clif.frontend, which inherits the socket."""

    def __init__(self, run_dir: Path, listener: socket.socket) -> None:
        self._run_dir, self._listener = run_dir, listener
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = self._next_s = -math.inf
        self._short_lives = 0
        self._killed = ""
        host, port = listener.getsockname()[:2]
        self.url = f"http://{in_url(host)}:{port}"
        write_atomic(run_dir / HTTP_ADDRESS_FILE, self.url.encode())

    def step(self, now: float, next_id: int) -> str:
        ended = ""
        if self._process is not None:
            if self._process.poll() is None:
                return ""
            ended, self._killed = self._killed or _ending(self._process.returncode), ""
            self._process = None
            self._short_lives = self._short_lives + 1 if now - self._started_s < SHORT_S else 0
            self._next_s = now + start_again(self._short_lives, ended)
        if now >= self._next_s:
            self._started_s = now
            command = [sys.executable, "-P", "-m", "clif.frontend", "--run-dir", str(self._run_dir)]
            command += ["--fd", str(self._listener.fileno()), "--first-id", str(next_id)]
            self._process = subprocess.Popen(command, pass_fds=[self._listener.fileno()])
        return ended

    def kill(self, reason: str) -> None:
        if self._process is not None:
            self._process.kill()
            self._killed = reason

    def close(self) -> None:
        """It was told to leave: wait for it, and end it if it does not."""
        self._listener.close()
        if self._process is None:
            return
        try:
            self._process.wait(LEAVES_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
