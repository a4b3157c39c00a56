"""Who calls: every route but those of OPEN needs a key, where there are keys; /admin needs an admin's. Free of torch.

Without any key the server listens on this host alone, and every client there is an admin. A web page that a user of
this host visits is not: requests under another host's name, or from another origin, are refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from clif.config import HttpConfig
from clif.errors import InputError
from clif.frontend.errors import ApiError
from clif.frontend.quotas import Bucket, Clock, KeyUse
from clif.storage.api_keys import ApiKey, hash_of, keys_at

log = logging.getLogger(__name__)
OPEN = frozenset({"/health", "/ready", "/", "/favicon.ico"})
"""Paths that need no key. The live page asks for one and shows nothing without it: what it shows comes from others."""
ADMIN = "/admin"
CHECK_S = 1.0
"""The keys' file is looked at once in this time: a key that is taken out of it is refused from then on."""
ANYONE = ApiKey(name="", sha256="", role="admin")
SCOPE = "clif.caller"
"""Where the caller of a request stands in its ASGI scope."""


@dataclass(frozen=True)
class Caller:
    """The client of a request: its key, and what this has used up."""

    key: ApiKey
    use: KeyUse

    @property
    def name(self) -> str:
        """Of the key; empty: none was needed. It goes where the key itself never does."""
        return self.key.name

    @property
    def admin(self) -> bool:
        return self.key.role == "admin"

    @property
    def max_tokens(self) -> int | None:
        """Longest answer that it may ask for, besides the server's own limit."""
        return self.key.max_tokens

    def may_see(self, owner: str) -> bool:
        """Whether it may see and change what this key has created."""
        return self.admin or owner == self.name

    def check_model(self, model: str) -> None:
        """Raises ApiError for a model that the key may not ask for. A name allows its versions, as clif@v0007."""
        if self.key.models and not {model, model.partition("@")[0]} & set(self.key.models):
            raise ApiError(403, f"the key {self.name} may not use the model {model}", "model", "model_not_allowed")

    def charge_prompt(self, tokens: int) -> None:
        """Tokens of prompts, before they are computed. Raises ApiError when they exceed the key's quota."""
        take(self.use.tokens, tokens, f"tokens of the key {self.name} in a minute")

    def charge_answer(self, tokens: int) -> None:
        """Tokens of an answer, once they are there: they count against the requests that follow."""
        if self.use.tokens is not None:
            self.use.tokens.charge(tokens)


def caller_of(connection: HTTPConnection) -> Caller:
    caller = connection.scope[SCOPE]
    assert isinstance(caller, Caller)
    return caller


def take(bucket: Bucket | None, amount: int, what: str) -> None:
    """Raises ApiError when so many units are not at hand."""
    if bucket is None:
        return
    wait_s = bucket.wait_s(amount)
    if wait_s == float("inf"):
        raise ApiError(429, f"{amount} exceed the quota, {bucket.most} {what}", code="rate_limit_exceeded")
    if wait_s > 0:
        message = f"the quota is used up, {bucket.most} {what}: try again in {wait_s:.1f} s"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
    bucket.charge(amount)


class Access:
    """The keys, read again when their file changes.

    read: all keys, none where none is needed; it raises InputError. stamp: changes when they may have changed. A file
    that has become unusable leaves the keys as they were, with an error in the log.
    """

    def __init__(
        self,
        read: Callable[[], tuple[ApiKey, ...]],
        stamp: Callable[[], object] = lambda: None,
        host: str = "127.0.0.1",
        clock: Clock = time.monotonic,
    ) -> None:
        self._read, self._stamp, self._host, self._clock = read, stamp, host, clock
        self._seen, self._checked_s = stamp(), clock()
        self._by_hash = {key.sha256: key for key in read()}
        self._uses: dict[str, KeyUse] = {}

    @classmethod
    def configured(cls, http: HttpConfig, environ: MutableMapping[str, str] = os.environ) -> Access:
        """Raises InputError for keys that cannot be used."""

        def read() -> tuple[ApiKey, ...]:
            return keys_at(http.keys_file, environ, http.host, http.local)

        def stamp() -> object:
            if http.keys_file is None:
                return None
            try:
                found = http.keys_file.stat()
            except OSError as error:
                return error.errno
            return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode

        return cls(read, stamp, http.host)

    @property
    def needed(self) -> bool:
        """Whether clients need a key."""
        return bool(self._by_hash)

    def caller(self, scope: MutableMapping[str, Any]) -> Caller:
        """Raises ApiError for a client without a key, and for one whose key does not suffice."""
        self._refresh()
        headers, path = Headers(scope=scope), scope["path"]
        key = self._key(headers, path)
        if key.role != "admin" and (path == ADMIN or path.startswith(f"{ADMIN}/")):
            raise ApiError(403, f"{path} needs the key of an admin, and {key.name} is of a user", code="admin_only")
        use = self._uses.get(key.name)
        if use is None or use.key != key:
            use = self._uses[key.name] = KeyUse(key, self._clock)
        return Caller(key, use)

    def _key(self, headers: Headers, path: str) -> ApiKey:
        if not self.needed:
            self._check_origin(headers)
            return ANYONE
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and given:
            hashed = hash_of(given.strip())
            # Which hashes lie close to one that was looked up tells nothing about any key.
            key = self._by_hash.get(hashed)
            if key is not None and hmac.compare_digest(key.sha256, hashed):
                return key
        if path in OPEN:
            return ApiKey(name="", sha256="")
        message = "wrong API key" if given else "no API key"
        raise ApiError(401, f"{message}: send it as the header Authorization: Bearer KEY", code="invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = urlsplit(f"//{host}").hostname if _is_address(host) else None
        if host and not (name == self._host or is_loopback(name or "")):
            raise ApiError(403, "without API keys this server answers under the names of this host alone")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "without API keys no page of another origin may use this server")

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked_s < CHECK_S:
            return
        self._checked_s = now
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._by_hash = {key.sha256: key for key in self._read()}
        except InputError as error:
            log.error("the API keys stay as they were: %s", error)
            return
        names = {key.name for key in self._by_hash.values()}
        self._uses = {name: use for name, use in self._uses.items() if name in names}
        log.info("the API keys were read again: %d", len(names))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    """Whether a Host header can be taken apart."""
    try:
        urlsplit(f"//{host}")
    except ValueError:
        return False
    return True
