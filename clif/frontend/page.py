"""GET /: the live page, one file without parts from elsewhere. It holds no data, so it needs no key. Free of torch."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)
OTHERS = {
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def policy(page: bytes) -> str:
    """Content-Security-Policy: the page's own script and style by their hashes, its own server, and nothing else."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        allowed[kind.decode()].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(allowed['script'])}",
            f"style-src {' '.join(allowed['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    page = files("clif.frontend").joinpath("page.html").read_bytes()
    headers = {"content-security-policy": policy(page), **OTHERS}

    @router.get("/")
    async def live_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return router
