"""The header x-request-id: of the client's choice, or of the server's. Clients show it with their errors."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import MutableMapping
from typing import Any

HEADER = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Ids that no other start of the front end gives."""

    def __init__(self) -> None:
        self._start, self._numbers = f"req-{secrets.token_hex(5)}", itertools.count()

    def header(self, scope: MutableMapping[str, Any]) -> tuple[bytes, bytes]:
        """Of the answer to a request: the id that it came with, unless that has other than plain characters."""
        for name, value in scope["headers"]:
            if name == HEADER and _SANE.fullmatch(value):
                return HEADER, value
        return HEADER, f"{self._start}-{next(self._numbers):x}".encode()
