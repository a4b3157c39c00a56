"""A front end of the control server in virtual time: it only sends messages, and notes what comes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from control_run import Run, make_config

from clif.types import CLIENTS, Request, Sampling, TokenEvent, first_id
from clif.wire.frontend import FRONTEND, Answers, Ask, Leave, Refusal, Reply, Started, Status

BEGIN_S, ENDS_S = 1.0, 4.0
"""All replicas are there by the first, and the run is drained at the second."""


class Client:
    """Asks, withdraws and commands at set times of a run, and keeps what comes back."""

    def __init__(self, run: Run, start: int = 0) -> None:
        self.run = run
        self.line = run.channel.connect(FRONTEND, self._on_message)
        self.next_id = first_id(CLIENTS + start)
        self.events: dict[int, list[TokenEvent]] = {}
        self.refused: list[Refusal] = []
        self.replies: list[Reply] = []
        self.status: list[Status] = []
        self.left = False
        self.at(0.0, lambda: self.line.send(Started(pid=7)))

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        self.run.time.after(seconds, action)

    def ask(self, seconds: float, model: str = "clif", prompt: tuple[int, ...] = (1, 2, 3), tokens: int = 4) -> int:
        request = Request(id=self.next_id, prompt=prompt, sampling=Sampling(max_tokens=tokens))
        self.next_id += 1
        self.at(seconds, lambda: self.line.send(Ask(request=request, model=model)))
        return request.id

    def end_of(self, request_id: int) -> TokenEvent:
        """The only end of a request."""
        (end,) = [event for event in self.events.get(request_id, []) if event.finish is not None]
        assert self.events[request_id][-1] is end, "nothing follows an end"
        return end

    def _on_message(self, message: Any) -> None:
        match message:
            case Answers():
                for event in message.events:
                    self.events.setdefault(event.request_id, []).append(event)
                self.refused += message.refused
            case Reply():
                self.replies.append(message)
            case Status():
                self.status.append(message)
            case Leave():
                self.left = True


def online(tmp_path: Path, **sections: dict[str, Any]) -> Run:
    """A run that only serves clients, until it is drained after some seconds."""
    sections = {
        "serve": {"http": {"port": 0}},
        "load": {"kind": "none", "max_tokens": 64},
        "train": {"enabled": False},
        "federation": {"rounds": None},
        "quality": {"exact_match_rows": 0},
        **sections,
    }
    config = make_config(tmp_path, **sections)
    run = Run(config, signalled=lambda: "got SIGTERM" if run.time() >= 1000.0 + ENDS_S else "")
    return run
