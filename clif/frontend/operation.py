"""What an operator sees of a run over HTTP: metrics, the live page, and the routes below /admin. Free of torch."""

from __future__ import annotations

from collections import Counter

from fastapi import FastAPI

from clif.frontend import admin, metrics, page
from clif.frontend.route_parts import Parts


def add_operation(app: FastAPI, parts: Parts) -> None:
    """Call it after all other middleware is added: answers of each are counted."""
    responses: Counter[tuple[str, int]] = Counter()
    app.include_router(page.routes())
    app.include_router(metrics.routes(parts.link, responses))
    app.include_router(admin.routes(parts.link, parts.history, parts.config.serve.http.stall_s))
    app.add_middleware(metrics.Responses, counts=responses)
