"""The run as clients, metrics and the live page are shown it: one JSON object, made a few times a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clif import __version__
from clif.config import Config
from clif.control.dispatcher import Dispatcher
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.reporter import Reporter


class StatusReport:
    """Reads every part and changes none."""

    def __init__(
        self, config: Config, fleet: Fleet, dispatcher: Dispatcher, federation: Federation, reporter: Reporter
    ) -> None:
        self._config, self._fleet, self._dispatcher = config, fleet, dispatcher
        self._federation, self._reporter = federation, reporter

    def body(self, now: float) -> dict[str, Any]:
        return {
            "version": __version__,
            "context": self._dispatcher.context_limit,
            "run": self._run(now),
            "replicas": self._replicas(),
            "models": self._models(),
        }

    def _run(self, now: float) -> dict[str, Any]:
        shown = self._reporter.snapshot(now)
        return {
            "seconds": round(shown.seconds, 1),
            "phase": shown.phase,
            "pressure": shown.pressure,
            "running": shown.running,
            "queued": shown.queued,
            "outstanding": self._dispatcher.outstanding,
            "finished": dict(shown.finished),
            "ttft_ms": in_ms(shown.ttft_s),
            "itl_ms": in_ms(shown.itl_s),
            "last_loss": shown.last_loss,
            "training_steps": shown.training_steps,
            "version": shown.version,
            "round": shown.round,
            "slack": {str(replica): reason for replica, reason in shown.slack.items()},
        }

    def _replicas(self) -> list[dict[str, Any]]:
        views = (self._fleet.view_of(hello.replica) for hello in self._fleet.hellos)
        return [
            {
                "replica": view.replica,
                "state": view.state.value,
                "version": view.version,
                "running": view.running,
                "max_batch": view.max_batch,
                "utilisation": round(view.utilisation, 3),
                "kv_used": view.kv_used,
                "kv_tokens": view.kv_tokens,
            }
            for view in views
        ]

    def _models(self) -> list[dict[str, Any]]:
        """What a request may name as its model."""
        return [{"id": "base", "version": 0}, {"id": "clif", "version": self._federation.history.version}]


def in_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """Quantiles of latencies, milliseconds; None without any."""
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1000, 1) if seconds else None for q in (50, 99)}
