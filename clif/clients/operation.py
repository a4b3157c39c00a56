"""A run that an operator looks at or steers: named by the URL of its server, or by its folder. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from clif.clients.endpoint import CONNECT_S, Endpoint, message_of, said
from clif.errors import InputError, plain
from clif.storage.run_folder import HTTP_ADDRESS_FILE, STATUS_FILE

ANSWER_S = 60.0
OLD_S = 10.0
"""A status that is older is not written any more."""
OVER = ("done", "stopping")
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Status:
    """body: as clif/control/run_status.py makes it. note: how far it can be relied on; empty: it is of now."""

    body: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Server:
    """The server of a run, for operators. url: without /v1."""

    url: str
    headers: dict[str, str]

    @classmethod
    def of(cls, target: str, key: str | None = None) -> Server:
        """target: a URL, or a run's folder. Raises InputError."""
        folder = Path(target)
        if folder.is_dir():
            target = _read(folder / HTTP_ADDRESS_FILE, "a run has a server if serve.http.port is set").decode()
        elif ":" not in target:
            raise InputError(f"{plain(target)} is no folder of a run, and no URL: write http://HOST:PORT")
        endpoint = Endpoint.of(target, key)
        return cls(endpoint.url.removesuffix("/v1"), endpoint.headers)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What a route below /admin answers. Raises InputError if the server does not answer or refuses."""
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        url = f"{self.url}/admin{path}"
        try:
            answer = httpx.request(method, url, json=body, headers=self.headers, timeout=timeout)
        except httpx.HTTPError as error:
            raise InputError(f"{self.url} does not answer ({said(error)}): start it, or name another") from error
        if answer.status_code != httpx.codes.OK:
            raise InputError(message_of(answer.status_code, answer.content))
        try:
            return msgspec.json.decode(answer.content)
        except msgspec.DecodeError as error:
            raise InputError(f"{url} gives no JSON: it is no server of CLIF") from error

    def status(self) -> Status:
        answer = self.ask("GET", "/status")
        body = answer["status"]
        if "run" not in body:
            raise InputError(f"{self.url} has no status yet: {answer['reason']}")
        return Status(body, "" if answer["ready"] else f"requests are not accepted: {answer['reason']}")


def status_of(target: str, key: str | None = None, wall: Callable[[], float] = time.time) -> Status:
    """Of a folder what its status.json says: any host that sees it may ask. Raises InputError. wall: since 1970."""
    folder = Path(target)
    if not folder.is_dir():
        return Server.of(target, key).status()
    body: dict[str, Any] = _decoded(folder / STATUS_FILE)
    return Status(body, _note(body, (folder / SUMMARY_FILE).exists(), wall()))


def _note(body: dict[str, Any], summarised: bool, now: float) -> str:
    age = max(0.0, now - body["written_unix"])
    if body["run"]["phase"] in OVER and (summarised or age > OLD_S):
        return f"the run is over, since {duration(age)}"
    if age > OLD_S:
        return f"written {duration(age)} ago: the control process has ended, or its host is not there"
    return ""


def _decoded(path: Path) -> dict[str, Any]:
    content = _read(path, "name the folder of a run that has begun")
    try:
        tree = msgspec.json.decode(content)
        assert isinstance(tree, dict) and {"run", "written_unix"} <= tree.keys()
    except (msgspec.DecodeError, AssertionError) as error:
        raise InputError(f"{path} is damaged: a run that is under way writes it anew within a second") from error
    return tree


def _read(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({plain(error.strerror)}): {advice}") from error


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
