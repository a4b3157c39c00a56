"""The routes of the front end, as one ASGI application."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI
from starlette.responses import JSONResponse

from clif import __version__
from clif.config import Config
from clif.frontend.link import Link
from clif.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Parts:
    """What routes work with."""

    config: Config
    link: Link
    tokenizer: ChatTokenizer


def make_app(parts: Parts) -> FastAPI:
    app = FastAPI(title="CLIF", version=__version__, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The front end answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are accepted."""
        now = parts.link.readiness
        return JSONResponse({"ready": now.ready, "reason": now.reason}, 200 if now.ready else 503)

    return app
