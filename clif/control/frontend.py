"""Requests and commands of clients: the control server's side of the HTTP front end. Free of torch.

Invariants: every Ask gets exactly one end, whether refused or answered; a front end that dies takes its requests with
it, and nothing else; replies go out after what they report is durable.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from clif.control.dispatcher import Dispatcher, RequestRecord
from clif.control.policy.phases import Phase
from clif.control.run_state import RunState
from clif.control.sources import DueRequest
from clif.jobs.store import StoreFailed
from clif.types import CLIENTS, ID_SPACE, Request, TokenEvent, first_id, of_client
from clif.wire.channels import Channel
from clif.wire.frontend import (
    BEAT_S,
    FRONTEND,
    Answers,
    Ask,
    Command,
    Leave,
    Problem,
    Refusal,
    Refused,
    Reply,
    Started,
    Status,
    Withdraw,
    as_json,
    decode_from_frontend,
)

log = logging.getLogger(__name__)
STATUS_S = 0.25
SILENT_S = 30.0
"""A front end that says nothing for longer is ended: what is sent to it would fill this process's memory."""
Handlers = Mapping[type, Callable[[float, Any], Any]]
"""By type of action; called as (now, action); what it returns is the reply, and Refused is a reply as well."""


class FrontendChild(Protocol):
    """The process of the front end, as the control server sees it."""

    def step(self, now: float, next_id: int) -> str:
        """Start it, or start it again. Returns why the one before ended; empty: it runs. Raises ControlError.

        next_id: the first id that it may give to a request.
        """
        ...

    def kill(self, reason: str) -> None:
        """End the process at once; step() then returns the reason."""
        ...

    def close(self) -> None: ...


class Frontend:
    """A Source of requests, and the way of their answers back. child: None where the front end is simulated.

    start: number of control processes that used this run's folder before; it keeps ids unique. resolve: the adapter
    version that answers a request, by the model's name; it raises Refused. Nothing is accepted before open().
    """

    exhausted = False
    remaining = 0

    def __init__(self, channel: Channel, child: FrontendChild | None, start: int, every_s: float = STATUS_S) -> None:
        self._channel, self._child, self._every_s = channel, child, every_s
        self._next_id = first_id(CLIENTS + start)
        self._end_id = self._next_id + ID_SPACE
        self._opened_s = math.nan
        self._came: list[DueRequest] = []
        self._events: list[TokenEvent] = []
        self._restarted: list[int] = []
        self._refused: list[Refusal] = []
        self._replies: list[Reply] = []
        self._begun = False
        """Whether the present process has said that it can answer."""
        self._silent_s, self._watched_s = 0.0, math.inf
        """How long it has said nothing while this process looked; when it looked last."""
        self._told: tuple[bool, str] | None = None
        self._body = b""
        self._next_status_s = -math.inf

    def attach(
        self,
        state: RunState,
        dispatcher: Dispatcher,
        resolve: Callable[[str, Request], Request],
        handlers: Handlers,
        status: Callable[[float], dict[str, Any]],
    ) -> None:
        """Connect the parts of the server that this one needs. Called once, before anything else."""
        self._state, self._dispatcher, self._resolve = state, dispatcher, resolve
        self._handlers, self._status = handlers, status

    # --- source ----------------------------------------------------------------------------------------------------

    def open(self, opened_s: float) -> None:
        self._opened_s = opened_s

    def due(self, now: float) -> Sequence[DueRequest]:
        came, self._came = self._came, []
        return came

    def wait_s(self, now: float) -> float:
        # A message wakes the loop.
        return math.inf

    # --- messages of the front end ---------------------------------------------------------------------------------

    def take(self, now: float, payload: bytes) -> None:
        """A message of the front end. One that cannot be decoded is logged, and ends nothing."""
        try:
            message = decode_from_frontend(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.error("a message of the front end cannot be read: %s", error)
            return
        self._silent_s = 0.0
        match message:
            case Started():
                log.info("the HTTP front end is process %d", message.pid)
                self._begun, self._told = True, None
            case _ if not self._begun:
                # Of one that has ended: the next one uses the same numbers for requests and commands.
                return
            case Ask():
                self._ask(now, message)
            case Withdraw():
                if of_client(message.request_id):
                    self._withdraw(now, message)
            case Command():
                self._replies.append(self._do(now, message))

    def _ask(self, now: float, ask: Ask) -> None:
        request = ask.request
        try:
            if not self._next_id <= request.id < self._end_id:
                raise Refused("failed", f"request id {request.id} is not the next one")
            self._next_id = request.id + 1
            ready, reason = self.readiness
            if not ready:
                raise Refused("not_ready", reason)
            request = self._resolve(ask.model, request)
        except Refused as refused:
            self._refused.append(Refusal(request.id, refused.problem))
            return
        self._came.append(DueRequest(request, now - self._opened_s, now))

    def _withdraw(self, now: float, message: Withdraw) -> None:
        """Cancel a request, also one that was not submitted yet."""
        self._came = [due for due in self._came if due.request.id != message.request_id]
        self._dispatcher.cancel(now, message.request_id, message.reason)

    def _do(self, now: float, command: Command) -> Reply:
        try:
            return Reply(id=command.id, body=as_json(self._handlers[type(command.action)](now, command.action)))
        except Refused as refused:
            return Reply(id=command.id, problem=refused.problem)
        except StoreFailed:
            # Other replies of this step would report what is lost with it.
            raise
        except Exception as error:
            # An operator's command must not end the run.
            log.exception("%s failed", type(command.action).__name__)
            return Reply(id=command.id, problem=Problem("failed", f"{type(error).__name__}: {error}"))

    def versions_waited_for(self) -> set[int]:
        """By requests that came and are not submitted yet."""
        return {due.request.version for due in self._came if due.request.version}

    # --- hooks of the dispatcher -----------------------------------------------------------------------------------

    def on_restarted(self, record: RequestRecord) -> None:
        """The answer begins again under another version; no token of before counts."""
        if of_client(record.request.id):
            self._restarted.append(record.request.id)
            self._events = [event for event in self._events if event.request_id != record.request.id]

    def on_tokens(self, record: RequestRecord, event: TokenEvent) -> None:
        if of_client(record.request.id) and event.finish is None:
            self._events.append(event)

    def on_finished(self, record: RequestRecord, event: TokenEvent | None) -> None:
        """event: the last one, with tokens that no other event holds; None: the end did not come from a replica."""
        if of_client(record.request.id):
            end = TokenEvent(
                request_id=record.request.id, version=record.version or 0, finish=record.finish, detail=record.detail
            )
            self._events.append(end if event is None else msgspec.structs.replace(event, detail=record.detail))

    # --- once per step ---------------------------------------------------------------------------------------------

    @property
    def readiness(self) -> tuple[bool, str]:
        """Whether requests are accepted, and why not."""
        if self._state.phase is Phase.OPEN:
            return True, ""
        waiting = self._state.phase in (Phase.GATHER, Phase.BASELINE)
        return False, "the model is being loaded" if waiting else "the server is shutting down"

    def watch(self, now: float) -> None:
        """Keep the front end's process running. The requests of one that ended are cancelled. Raises ControlError."""
        if self._child is None:
            return
        if self._is_silent(now):
            self._child.kill(f"it said nothing for {SILENT_S:g} s")
        ended = self._child.step(now, self._next_id)
        if ended:
            log.warning("the HTTP front end ended (%s): its requests are cancelled, and it starts again", ended)
            self._begun = False
            self._came.clear()
            self._dispatcher.cancel_clients(now, f"the HTTP front end ended: {ended}")
            for unsent in (self._events, self._restarted, self._refused, self._replies):
                unsent.clear()

    def _is_silent(self, now: float) -> bool:
        """Whether it is to be ended. A break in which this process did not run either says nothing about it."""
        passed, self._watched_s = min(max(0.0, now - self._watched_s), BEAT_S), now
        self._silent_s = self._silent_s + passed if self._begun else 0.0
        silent = self._silent_s > SILENT_S
        if silent:
            self._silent_s = 0.0
        return silent

    def flush(self, now: float) -> None:
        """Send what has come together. The caller has made durable what the replies report."""
        if self._events or self._restarted or self._refused:
            answers = Answers(
                events=tuple(self._events), restarted=tuple(self._restarted), refused=tuple(self._refused)
            )
            self._events, self._restarted, self._refused = [], [], []
            self._channel.send(FRONTEND, answers)
        for reply in self._replies:
            self._channel.send(FRONTEND, reply)
        self._replies.clear()
        self._tell_status(now)

    def _tell_status(self, now: float) -> None:
        """At once when it gets ready or not, otherwise at its own pace and when it has changed."""
        if self.readiness == self._told and now < self._next_status_s:
            return
        self._next_status_s = now + self._every_s
        body = as_json(self._status(now))
        if (self.readiness, body) != (self._told, self._body):
            ready, reason = self.readiness
            if self._channel.send(FRONTEND, Status(ready=ready, reason=reason, body=body)):
                self._told, self._body = self.readiness, body

    def drop_replies(self) -> None:
        """What they report is lost; the front end tells its clients that the server is gone."""
        self._replies.clear()

    def close(self) -> None:
        """The run is over."""
        self._channel.send(FRONTEND, Leave())
        if self._child is not None:
            self._child.close()
