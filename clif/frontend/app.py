"""The routes of the front end, as one ASGI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from clif import __version__
from clif.frontend import chat, completions, feedback, files, jobs, models, responses
from clif.frontend.auth import Access
from clif.frontend.direct import Direct
from clif.frontend.errors import handle_errors
from clif.frontend.limits import Guard
from clif.frontend.openapi import complete
from clif.frontend.operation import add_operation
from clif.frontend.route_parts import Parts
from clif.frontend.strict import with_components


class App(FastAPI):
    """Without pages of documentation, which would load scripts from elsewhere: the document is at /openapi.json."""

    def __init__(self) -> None:
        super().__init__(title="CLIF", version=__version__, docs_url=None, redoc_url=None)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = get_openapi(title=self.title, version=self.version, routes=self.routes)
            self.openapi_schema = complete(with_components(document))
        return self.openapi_schema


def make_app(parts: Parts) -> FastAPI:
    """Each group of routes is a function routes(parts) -> APIRouter of a module."""
    app = App()
    handle_errors(app)
    http = parts.config.serve.http
    serving = [group.routes(parts) for group in (chat, completions, responses)]
    app.add_middleware(Direct, routes=[r for router in serving for r in router.routes if isinstance(r, APIRoute)])
    app.add_middleware(Guard, access=Access.configured(http), http=http)
    for router in (*serving, *(group.routes(parts) for group in (feedback, files, jobs, models))):
        app.include_router(router)
    add_operation(app, parts)
    return app
