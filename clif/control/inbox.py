"""Messages of the replicas, bound to their sender, checked against what it was given, then passed to their handler.

The sender is the replica whose key the connection has (clif/wire/channels.py). A replica that writes in the name of
another one, sends what cannot be decoded, or claims what is impossible, is broken: it fails and may rebuild. No message
ends the run, except that a replica cannot start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from clif.control.claims import Claims
from clif.control.failures import FailureHandler
from clif.control.fleet import Fleet
from clif.control.policy.phases import ControlError, Phase
from clif.control.run_state import RunState
from clif.wire import messages as wire
from clif.wire.channels import Channel, decode_up
from clif.wire.frontend import FRONTEND

log = logging.getLogger(__name__)
LONGEST_TEXT = 500
TEXTS = {
    wire.Hello: ("host", "dtype"),
    wire.RoundFailed: ("error",),
    wire.Trouble: ("error",),
    wire.Signalled: ("signal",),
}
"""Text that replicas send and that is shown and stored."""
Handlers = Mapping[type[wire.Message], Callable[[float, Any], None]]


class Inbox:
    """Reads the channel for the server. handlers: by message of a replica, called as (now, message).

    on_frontend: takes what the front end sends.
    """

    def __init__(
        self,
        channel: Channel,
        clock: Callable[[], float],
        state: RunState,
        claims: Claims,
        fleet: Fleet,
        failures: FailureHandler,
        handlers: Handlers,
        on_frontend: Callable[[float, bytes], None] = lambda now, payload: None,
    ) -> None:
        self._on_frontend = on_frontend
        self._channel, self._clock = channel, clock
        self._claims, self._fleet, self._failures = claims, fleet, failures
        self._state, self._handlers = state, handlers
        self._strangers = 0

    def step(self, timeout_s: float) -> None:
        """Take the messages that have come, waiting up to timeout_s for the first. Raises ControlError."""
        for sender, payload in self._channel.receive(timeout_s):
            self._take(self._clock(), sender, payload)
        self._count_strangers(self._channel.refused())

    def _take(self, now: float, sender: int, payload: bytes) -> None:
        if sender == FRONTEND:
            self._on_frontend(now, payload)
            return
        try:
            message = tidy(decode_up(payload))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._failures.mark_broken(now, sender, f"it says what nobody understands ({printable(str(error))})")
            return
        if wire.sender_of(message) != sender:
            self._failures.mark_broken(now, sender, f"it speaks for replica {wire.sender_of(message)}")
        elif isinstance(message, wire.Hello):
            self._join(now, message)
        elif self._state.phase is Phase.GATHER and isinstance(message, wire.Trouble) and not message.returning:
            raise ControlError(f"replica {sender} could not start: {message.error}")
        elif self._fleet.is_alive(sender):
            self._hear(now, sender, message)
        elif isinstance(message, wire.Trouble | wire.Goodbye):
            self._handlers[type(message)](now, message)
        else:
            self._failures.on_message_from_failed(now, sender)

    def _join(self, now: float, hello: wire.Hello) -> None:
        objection = self._claims.objection(hello)
        if objection:
            self._failures.mark_broken(now, hello.replica, objection)
        else:
            self._failures.join(now, hello)

    def _hear(self, now: float, sender: int, message: wire.Up) -> None:
        self._fleet.on_message(now, sender)
        objection = self._claims.objection(message)
        if objection:
            self._failures.mark_broken(now, sender, objection)
        else:
            self._handlers[type(message)](now, message)

    def _count_strangers(self, more: int) -> None:
        """Log the first connection without a key, and again whenever there are ten times as many."""
        before, self._strangers = self._strangers, self._strangers + more
        if (more and len(str(self._strangers)) > len(str(before))) or (more and not before):
            log.warning("%d connections to the control port did not have the run's keys: refused", self._strangers)


def tidy(message: wire.Up) -> wire.Up:
    """The message with printable texts."""
    names = TEXTS.get(type(message), ())
    return msgspec.structs.replace(message, **{name: printable(getattr(message, name)) for name in names})


def printable(text: str) -> str:
    """One line without escape codes, of LONGEST_TEXT characters at most."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: LONGEST_TEXT + 1])
    return shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…"
