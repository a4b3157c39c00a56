"""Sections of the configuration about the HTTP front end. Free of torch."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from clif.config.base import Positive, PositiveFloat, Section


class HttpConfig(Section):
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Where clients reach the server that speaks OpenAI's protocol, see [api](api.md). 0: a free one, which is in the
    log and in `http.address` in the run's folder. `null`: there is no server."""
    host: str = "127.0.0.1"
    """[address] The server listens here. An address that other hosts reach needs keys."""
    keys_file: Path | None = None
    """Keys that clients must give, one JSON object per line as `clif keys` writes them: name, hash, quotas. It is open
    to its user alone (mode 0600). `null`: those of the variable `CLIF_API_KEYS`; without these, no key is needed."""
    max_waiting: Positive = 256
    """[requests] Requests without a first token, of all clients. More are answered with 503 and `Retry-After`."""
    max_running: Positive = 4096
    """[requests] Requests that have not ended, of all clients. More are answered with 503 and `Retry-After`. As many
    connections may be open, and 512 for other purposes, if the limit of open files is twice that."""
    max_body_mib: Annotated[int, Field(gt=0, le=4096)] = 8
    """Longest body of a request, except an uploaded file."""
    max_file_mib: Annotated[int, Field(gt=0, le=65536)] = 512
    """Longest uploaded file."""
    max_tokens: Positive | None = None
    """[tokens] Longest answer that a client may ask for. `null`: what the context leaves."""
    default_max_tokens: Positive | None = None
    """[tokens] Longest answer where a client names none. `null`: what the context leaves."""
    max_n: Annotated[int, Field(gt=0, le=1024)] = 16
    """[answers] Most answers to one prompt, and most prompts of one request."""
    timeout_s: PositiveFloat = 600.0
    """A request that takes longer is cancelled, with an error."""
    stall_s: PositiveFloat = 60.0
    """A client that reads nothing, or sends no further part of its request, for longer is disconnected."""

    @model_validator(mode="after")
    def _lengths(self) -> HttpConfig:
        if self.max_tokens and self.default_max_tokens and self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"serve.http.default_max_tokens {self.default_max_tokens} exceeds serve.http.max_tokens "
                f"{self.max_tokens}: lower the former"
            )
        return self

    @property
    def local(self) -> bool:
        """Whether only this host reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ServeConfig(Section):
    http: HttpConfig = HttpConfig()
    """The section below."""
    adapter_root: Path | None = None
    """An operator may load PEFT folders below this one while the run lasts, and export versions to it. `null`: none."""
