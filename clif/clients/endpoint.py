"""Where a server is, and what went wrong with a request to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from clif.errors import InputError, plain
from clif.types import CLIF

KEY_VARIABLE = "CLIF_API_KEY"
CONNECT_S = 10.0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI server. url: ends in /v1. key: of the client; None: none is sent."""

    url: str
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Endpoint:
        """From what a user gives: with or without scheme and /v1. Raises InputError for what is no URL."""
        full = url if "://" in url else f"http://{url}"
        try:
            parsed = httpx.URL(full)
        except httpx.InvalidURL as error:
            raise InputError(f"{plain(url)} is no URL ({error}): write http://HOST:PORT") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"{plain(url)} is no URL of a server: write http://HOST:PORT")
        base = full.rstrip("/")
        return cls(base if base.endswith("/v1") else f"{base}/v1", key or os.environ.get(KEY_VARIABLE))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def models(self) -> list[str]:
        """The models that the server has. Raises InputError if it does not answer or refuses."""
        try:
            answer = httpx.get(f"{self.url}/models", headers=self.headers, timeout=CONNECT_S)
        except httpx.HTTPError as error:
            raise InputError(f"{self.url} does not answer ({said(error)}): start a server, or name another") from error
        if answer.status_code != httpx.codes.OK:
            raise InputError(f"{self.url} refuses: {message_of(answer.status_code, answer.content)}")
        try:
            return [str(model["id"]) for model in msgspec.json.decode(answer.content)["data"]]
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            raise InputError(f"{self.url}/models gives no list of models: it is no OpenAI server") from error

    def choose_model(self, wanted: str | None) -> str:
        """The model by this name, by default the active adapter of CLIF, otherwise the server's first.

        Raises InputError where there is none.
        """
        if wanted is not None:
            return wanted
        models = self.models()
        if not models:
            raise InputError(f"{self.url} has no model: give --model")
        return CLIF if CLIF in models else models[0]


def said(error: Exception) -> str:
    """What an exception of httpx says: some have no text."""
    return str(error) or type(error).__name__


def message_of(status: int, body: bytes) -> str:
    """The message of an error's body, as OpenAI writes it, with the status."""
    try:
        tree: Any = msgspec.json.decode(body)
        return f"{plain(tree['error']['message'])} (HTTP {status})"
    except (msgspec.DecodeError, LookupError, TypeError):
        return f"HTTP {status} {plain(body[:200].decode(errors='replace'))}".rstrip()
