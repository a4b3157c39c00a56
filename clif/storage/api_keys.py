"""Keys of the HTTP server's clients: how they are made, kept as hashes, and read. Free of torch.

A key has 256 random bits, so that a plain hash of it cannot be guessed. It is in no file, log or message: what is kept
is its hash, and what is passed on is its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from clif.errors import ConfigError, InputError, plain

VARIABLE = "CLIF_API_KEYS"
PREFIX = "clif-"
LEAST_CHARACTERS = 32
"""Of a key: a shorter one could be guessed from its hash."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
_HASH = r"^[0-9a-f]{64}$"
_HASHED = "sha256="
Limit = Annotated[int, Meta(ge=1, le=10**12)]
Role = Literal["user", "admin"]


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client's key. role: an admin may also use /admin, and see and change what others have created.

    Limits, None for those of the server alone: requests and tokens (of prompts and answers) in a minute, requests at
    the same time, tokens of an answer, rows of feedback in an hour. models: names that it may ask for; empty: all.
    """

    name: Annotated[str, Meta(pattern=_NAME)]
    sha256: Annotated[str, Meta(pattern=_HASH)]
    role: Role = "user"
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_running: Limit | None = None
    max_tokens: Limit | None = None
    feedback_per_hour: Limit | None = None
    models: tuple[str, ...] = ()


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def line_of(key: ApiKey) -> str:
    """The key as a line of serve.http.keys_file."""
    return msgspec.json.encode(key).decode()


def parse_keys(text: str, what: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text, a JSON object a line. what: the file's name. Raises InputError with the line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found.append(msgspec.json.decode(line, type=ApiKey))
        except msgspec.MsgspecError as error:
            raise InputError(
                f"{what}, line {number}: {plain(error)}: write it as `clif keys new NAME` prints it"
            ) from error
    _check_distinct(found, what)
    return tuple(found)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Of serve.http.keys_file. Raises InputError when it is missing, holds no key, or is open to other users."""
    what = f"serve.http.keys_file {path}"
    try:
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read()
        text = content.decode()
    except OSError as error:
        raise InputError(
            f"{what} cannot be read ({error.strerror}): make it with clif keys new NAME --file {path}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text: write it with clif keys new NAME --file {path}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"{what} is open to other users: chmod 600 {path}")
    return parse_keys(text, what)


def append_key(path: Path, key: ApiKey) -> None:
    """Add a key to a file, which is made for its user alone. Raises InputError for a name that it has, or OSError."""
    known = read_keys(path) if path.exists() else ()
    _check_distinct([*known, key], str(path))
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        content = file.read()
        whole = not content or content.endswith(b"\n")
        file.write((b"" if whole else b"\n") + line_of(key).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def from_variable(value: str) -> tuple[ApiKey, ...]:
    """The keys of the variable CLIF_API_KEYS: name:key or name:key:admin, separated by commas.

    A key may also stand as sha256=<its hash>. Raises InputError, which shows no key.
    """
    found = []
    for number, entry in enumerate(filter(None, (part.strip() for part in value.split(","))), 1):
        name, key, role = (*entry.split(":"), "user", "")[:3] if 1 <= entry.count(":") <= 2 else ("", "", "")
        hashed = key.removeprefix(_HASHED) if key.startswith(_HASHED) else hash_of(key)
        long = key.startswith(_HASHED) or len(key) >= LEAST_CHARACTERS
        if not re.match(_NAME, name) or role not in ("user", "admin") or not long or not re.match(_HASH, hashed):
            raise InputError(
                f"entry {number} of {VARIABLE} is no key: write name:key or name:key:admin, separated by commas, with "
                f"keys of `clif keys new NAME`, which have more than {LEAST_CHARACTERS} characters"
            )
        found.append(ApiKey(name=name, sha256=hashed, role="admin" if role == "admin" else "user"))
    _check_distinct(found, VARIABLE)
    return tuple(found)


def hash_variable(environ: MutableMapping[str, str]) -> None:
    """Put hashes in the place of the keys in CLIF_API_KEYS, so that no child process gets a key. Raises InputError."""
    if VARIABLE in environ:
        keys = from_variable(environ[VARIABLE])
        environ[VARIABLE] = ",".join(f"{key.name}:{_HASHED}{key.sha256}:{key.role}" for key in keys)


def keys_at(path: Path | None, environ: MutableMapping[str, str], host: str, local: bool) -> tuple[ApiKey, ...]:
    """The keys that clients need: of serve.http.keys_file, otherwise of CLIF_API_KEYS; none: no key is needed.

    host, local: serve.http.host, and whether only this host reaches it. Raises InputError for keys that cannot be used,
    and for a server without any that other hosts reach.
    """
    keys = read_keys(path) if path is not None else from_variable(environ.get(VARIABLE, ""))
    if path is not None and not keys:
        raise InputError(f"serve.http.keys_file {path} holds no key: clif keys new NAME --file {path}")
    if not keys and not local:
        raise ConfigError(
            f"serve.http.host {host} is reached by other hosts, and no key is needed there: make keys with clif keys "
            f"new NAME --file keys.jsonl and set serve.http.keys_file=keys.jsonl, or {VARIABLE}=name:key, or set "
            "serve.http.host=127.0.0.1"
        )
    return keys


def _check_distinct(keys: Iterable[ApiKey], what: str) -> None:
    names: set[str] = set()
    hashes: set[str] = set()
    for key in keys:
        if key.name in names or key.sha256 in hashes:
            raise InputError(f"{what} has the key {key.name} twice: remove one, or give another name")
        names.add(key.name)
        hashes.add(key.sha256)
