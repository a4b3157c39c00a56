"""What clients and operators may ask of the control server, by type of action, and which version answers a request."""

from __future__ import annotations

from typing import Any

import msgspec

from clif.config import Config
from clif.control.dispatcher import Dispatcher
from clif.control.frontend import Handlers
from clif.control.ports import Ports
from clif.control.run_state import RunState
from clif.control.run_status import StatusReport
from clif.control.versions import Versions
from clif.types import Request
from clif.wire.frontend import GetConfig


class Clients:
    """Connects the front end to the parts of the server. Built after them; does nothing without a front end.

    handlers: of all actions but GetConfig.
    """

    def __init__(
        self,
        config: Config,
        ports: Ports,
        state: RunState,
        dispatcher: Dispatcher,
        versions: Versions,
        handlers: Handlers,
        status: StatusReport,
    ) -> None:
        self._config, self._versions, self._status = config, versions, status
        self._dispatcher = dispatcher
        versions.waiting = self.versions_waited_for
        self._frontend, self._status_file = ports.frontend, ports.status_file
        own: Handlers = {GetConfig: lambda now, action: self.config_as_run()}
        if self._frontend is not None:
            self._frontend.attach(state, dispatcher, self.resolve, {**own, **handlers}, status.body)

    def resolve(self, model: str, request: Request) -> Request:
        """The request, bound to the version that the model's name means. Raises Refused."""
        return msgspec.structs.replace(request, version=self._versions.resolve(model, request.id))

    def versions_waited_for(self) -> set[int]:
        """By accepted requests, also those that are not submitted yet, of which no replica knows."""
        came = self._frontend.versions_waited_for() if self._frontend is not None else set()
        return came | set(self._dispatcher.versions_waited_for())

    def config_as_run(self) -> dict[str, Any]:
        return self._config.model_dump(mode="json")

    def take(self, now: float, payload: bytes) -> None:
        """A message of the front end."""
        if self._frontend is not None:
            self._frontend.take(now, payload)

    def step(self, now: float) -> None:
        """At the end of each step of the server: what came together goes out, and the front end is kept running."""
        if self._status_file is not None and self._status_file.due(now):
            self._status_file.write(now, self._status.body(now))
        if self._frontend is not None:
            self._frontend.watch(now)
            self._frontend.flush(now)

    def drop_replies(self) -> None:
        """What they report is lost."""
        if self._frontend is not None:
            self._frontend.drop_replies()

    def close(self, now: float) -> None:
        """The last answers go out, and the front end leaves."""
        if self._status_file is not None:
            self._status_file.close(now, self._status.body(now))
        if self._frontend is not None:
            self._frontend.flush(now)
            self._frontend.close()
