"""What the control plane knows: frozen views for the decisions, and the tracker that builds them from reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clif.config import Config
from clif.distributed.roles import BOTH, Role
from clif.latency import Fit, LatencyModel
from clif.states import ReplicaState
from clif.wire.messages import Hello, Report

PRIOR_SERVE = Fit(a=0.002, b=0.01, c=0.02)
PRIOR_TRAIN = Fit(a=0.05, b=0.005, c=0.05)


OVERCOMMIT = 1.5
"""Tokens that requests may fill at their longest, as a multiple of the KV cache."""


@dataclass(frozen=True)
class ReplicaView:
    """One replica at one moment. Stamps are seconds of the control process's clock.

    role: what run.mode has it for. incarnation: how often it was rebuilt.
    outstanding: requests handed to it that have not ended; reserved: tokens that they may fill in its KV cache.
    max_batch: outstanding requests it takes at present; batch_cap: the most it was built for.
    utilisation: share of its time that serving needs for its promise, smoothed, 0 to 1. slack_since / pressure_since:
    since when that is under idle_below / over serving_above without a break. rounds_joined: rounds it took part in.
    missed_s: how long others have spoken since it was last heard. versions: those that a request may ask it for,
    besides the base. drained: why an operator wants it to get no request and join no round; empty: it may.
    """

    replica: int
    state: ReplicaState = ReplicaState.SERVING
    state_since: float = 0.0
    running: int = 0
    waiting: int = 0
    outstanding: int = 0
    reserved: int = 0
    kv_used: int = 0
    max_batch: int = 1
    batch_cap: int = 1
    micro_batch: int = 1
    kv_tokens: int = 1
    utilisation: float = 1.0
    demand: float = 0.0
    version: int = 0
    versions: frozenset[int] = frozenset()
    last_seen: float = 0.0
    missed_s: float = math.inf
    slack_since: float | None = None
    pressure_since: float | None = None
    rounds_joined: int = 0
    incarnation: int = 0
    role: Role = BOTH
    drained: str = ""
    serve: Fit = PRIOR_SERVE
    train: Fit = PRIOR_TRAIN

    @property
    def alive(self) -> bool:
        return self.state is not ReplicaState.FAILED

    @property
    def serving(self) -> bool:
        """Whether requests may be sent to it."""
        return self.alive and self.role.serves and not self.drained


@dataclass(frozen=True)
class ClusterView:
    """All replicas, by id, for what is decided once a control period; queued: requests that wait at the dispatcher.

    paused: why an operator wants no round to begin; empty: rounds may.
    """

    replicas: tuple[ReplicaView, ...]
    queued: int = 0
    paused: str = ""

    @property
    def alive(self) -> tuple[ReplicaView, ...]:
        return tuple(r for r in self.replicas if r.alive)

    @property
    def serving(self) -> tuple[ReplicaView, ...]:
        """Those that requests may be sent to."""
        return tuple(r for r in self.replicas if r.serving)

    def in_state(self, state: ReplicaState) -> tuple[ReplicaView, ...]:
        return tuple(r for r in self.replicas if r.state is state)


class Average:
    """Exponentially weighted average of irregular samples; time constant in seconds."""

    def __init__(self, value: float, time_constant_s: float) -> None:
        self.value = value
        self._constant = time_constant_s
        self._last: float | None = None

    def update(self, now: float, sample: float) -> float:
        elapsed = self._constant if self._last is None else max(0.0, now - self._last)
        self._last = now
        self.value += (1.0 - math.exp(-elapsed / self._constant)) * (sample - self.value)
        return self.value


class ReplicaTracker:
    """Gathers what one replica reports. Its state is changed by the fleet alone."""

    def __init__(self, now: float, hello: Hello, config: Config, role: Role = BOTH) -> None:
        self.hello = hello
        self.role = role
        self.state = ReplicaState.SERVING
        self.state_since = now
        self.last_seen = now
        self.spoken_before_s = 0.0
        """The fleet's count of seconds with messages, at this replica's last message."""
        self.version = self.newest_version = hello.version
        """What it answers new requests with, and the newest that it ever did."""
        self.versions = frozenset(hello.versions)
        self.rounds_joined = 0
        self.max_batch = hello.max_batch
        self.micro_batch = config.train.micro_batch
        self.report: Report | None = None
        self.serve = LatencyModel(PRIOR_SERVE)
        self.train = LatencyModel(PRIOR_TRAIN)
        self._config = config
        self._utilisation = Average(1.0, config.control.smoothing_s)
        self._demand = Average(0.0, config.control.smoothing_s)
        self._slack_since: float | None = None
        self._pressure_since: float | None = None

    def observe(self, now: float, report: Report, outstanding: int) -> None:
        """Take a report; outstanding is the dispatcher's count, which runs ahead of the report."""
        self.report = report
        self.switched(report.version)
        self.serve.observe_all(report.serve_timings)
        self.train.observe_all(report.train_timings)
        self._demand.update(now, max(report.running + report.waiting, outstanding))
        # By time and not by slots: what waits for a full batch is pressure, and holds training back by its own slack.
        smooth = self._utilisation.update(now, serving_share(report, self.serve.fit, self._config))
        control = self._config.control
        self._slack_since = _since(self._slack_since, now, smooth < control.idle_below)
        self._pressure_since = _since(self._pressure_since, now, smooth > control.serving_above)

    def switched(self, version: int) -> None:
        """It answers new requests with this version."""
        self.version, self.newest_version = version, max(self.newest_version, version)

    def rebuilt(self, now: float, hello: Hello) -> ReplicaTracker:
        """The tracker of the same replica once it was rebuilt, which is as fast as it was. Its state is not changed."""
        new = ReplicaTracker(now, hello, self._config, self.role)
        new.state, new.state_since, new.rounds_joined = self.state, self.state_since, self.rounds_joined
        new.serve, new.train = self.serve, self.train
        return new

    def refit(self) -> bool:
        """Returns whether the latency of serving is predicted differently since."""
        before = self.serve.fit
        self.train.refit()
        return self.serve.refit() is not before

    def view(self, outstanding: int, reserved: int, spoken_s: float = 0.0, drained: str = "") -> ReplicaView:
        """spoken_s: time in which some replica spoke, until now."""
        report = self.report
        return ReplicaView(
            replica=self.hello.replica,
            state=self.state,
            state_since=self.state_since,
            running=report.running if report else 0,
            waiting=report.waiting if report else 0,
            outstanding=outstanding,
            reserved=reserved,
            kv_used=report.kv_used if report else 0,
            max_batch=self.max_batch,
            batch_cap=self.hello.max_batch,
            micro_batch=self.micro_batch,
            kv_tokens=self.hello.kv_tokens,
            utilisation=self._utilisation.value,
            demand=self._demand.value,
            version=self.version,
            versions=self.versions,
            last_seen=self.last_seen,
            missed_s=spoken_s - self.spoken_before_s,
            slack_since=self._slack_since,
            pressure_since=self._pressure_since,
            rounds_joined=self.rounds_joined,
            incarnation=self.hello.incarnation,
            role=self.role,
            drained=drained,
            serve=self.serve.fit,
            train=self.train.fit,
        )


def serving_share(report: Report, serve: Fit, config: Config) -> float:
    """Share of a replica's time that its latency promise needs for serving, 0 to 1.

    A replica that decodes one request is busy all the time, yet may need only a tenth of each token gap that
    it promised: the rest is slack. As long as the latency model knows nothing, being busy means no slack.
    """
    needed = serve.predict(max(1, report.running)) / token_budget_s(config)
    return min(1.0, report.busy * (serve.confidence * needed + 1.0 - serve.confidence))


def token_budget_s(config: Config) -> float:
    """Longest iteration that keeps the token gap promise with its margin, seconds."""
    return config.slo.tpot_ms / 1000.0 * max(1.0 - config.slo.margin, 1e-3)


def _since(since: float | None, now: float, holds: bool) -> float | None:
    if not holds:
        return None
    return now if since is None else since
