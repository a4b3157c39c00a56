"""Between the journal's lines and the control process's records: writes the ones, restores the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from clif.control.dispatcher import RequestRecord
from clif.control.durability.journal import Accepted, Began, Elapsed, Ended, Entered, Line, RoundStored
from clif.control.durability.recovery import Recovery
from clif.control.policy.phases import Phase
from clif.control.records import ROUND_STAMPS, Records, row_of
from clif.control.rounds import Round
from clif.control.sources import DueRequest
from clif.states import RequestState, RoundState
from clif.types import AdapterVersion, Purpose, of_client

PROGRESS_S = 1.0


class Log(Protocol):
    """An append-only log of lines: a Journal, or a list in memory."""

    def write(self, line: Line) -> None:
        """Append a line, which survives this process from now on. Raises OSError."""
        ...

    def maybe_sync(self) -> None:
        """Now and then force what was written to disk, without waiting."""
        ...

    def mark_used(self) -> None:
        """From now on the run's folder holds something that is worth keeping."""
        ...

    def unix(self, stamp: float) -> float:
        """A stamp of the clock as wall time."""
        ...

    def stamp(self, unix: float) -> float:
        """Wall time, maybe of an earlier process, as a stamp of the clock."""
        ...


class Ledger:
    """The journal of this run and what is left of the starts before. Stamps are seconds of the server's clock."""

    def __init__(self, journal: Log, recovery: Recovery) -> None:
        self.recovery = recovery
        self._journal = journal
        self._progressed = float("-inf")
        began = Began(load=recovery.fingerprint, first_id=recovery.first_id, continued=recovery.continued)
        self.write(began)

    def write(self, line: Line) -> None:
        self._journal.write(line)

    def unix(self, now: float) -> float:
        """A stamp of the server's clock as wall time."""
        return self._journal.unix(now)

    def accepted(self, due: DueRequest) -> None:
        """Called before the request goes anywhere."""
        unix = self._journal.unix(due.arrival_s)
        make = Accepted.of_client if of_client(due.request.id) else Accepted
        self.write(make(request=due.request, arrival_unix=unix, at_s=due.at_s))

    def ended(self, record: RequestRecord) -> None:
        """Called before the row is written: an end that has a row is in the journal as well."""
        if record.request.purpose is Purpose.USER and record.finish is not None and record.finished_s is not None:
            self.write(
                Ended(
                    id=record.request.id,
                    finish=record.finish,
                    detail=record.detail,
                    replica=record.replica,
                    version=record.version,
                    token_s=tuple(round(t - record.arrival_s, 6) for t in record.token_times),
                    finished_s=round(record.finished_s - record.arrival_s, 6),
                )
            )

    def entered(self, phase: Phase) -> None:
        if phase not in (Phase.DRAIN, Phase.STOPPING, Phase.DONE):
            self._journal.mark_used()
        self.write(Entered(phase=phase.value))

    def storing(self, current: Round, version: AdapterVersion) -> None:
        """Called before the round's adapter becomes the current one, which commits the round."""
        row: dict[str, Any] = {**row_of(current), "state": RoundState.COMMITTED.value}
        row["ended_s"] = row["aggregated_s"]
        row |= {name: row[name] and self._journal.unix(row[name]) for name in ROUND_STAMPS}
        line = RoundStored(
            round_id=version.round_id,
            version=version.number,
            heldout_loss=version.heldout_loss,
            row=row,
            adapter=version.adapter,
            parent=version.parent,
            job=version.job,
        )
        self.write(line)

    def step(self, now: float, load_s: float, run_s: float) -> None:
        """Once per step of the loop: note how far the run is, and force to disk what was written."""
        if now - self._progressed >= PROGRESS_S:
            self._progressed = now
            self.write(Elapsed(load_s=round(load_s, 3), run_s=round(run_s, 3)))
        self._journal.maybe_sync()

    def open(self) -> list[tuple[Accepted, float]]:
        """Accepted requests without an end, and the stamps of their arrival, which precede this process."""
        return [(a, self._journal.stamp(a.arrival_unix)) for a in self.recovery.open]

    def restore(self, records: Records) -> None:
        """Write the rows that a killed process could not write: ended requests, committed rounds and adapters."""
        for accepted, ended in self.recovery.unrecorded:
            records.request(_record(accepted, ended, self._journal.stamp(accepted.arrival_unix)), None)
        for stored in self.recovery.unrecorded_rounds:
            stamps = {k: stored.row[k] and self._journal.stamp(stored.row[k]) for k in ROUND_STAMPS}
            records.round_row({**stored.row, **stamps})
        for stored in self.recovery.unrecorded_adapters:
            version = AdapterVersion(
                number=stored.version,
                round_id=stored.round_id,
                heldout_loss=stored.heldout_loss,
                adapter=stored.adapter,
                parent=stored.parent,
                job=stored.job,
            )
            records.adapter(version)
        for version in self.recovery.unrecorded_loaded:
            records.adapter(version)


def _record(accepted: Accepted, ended: Ended, arrival_s: float) -> RequestRecord:
    record = RequestRecord(accepted.shown, arrival_s, RequestState.FINISHED)
    return replace(
        record,
        replica=ended.replica,
        version=ended.version,
        token_times=[arrival_s + s for s in ended.token_s],
        finish=ended.finish,
        detail=ended.detail,
        finished_s=arrival_s + ended.finished_s,
    )
