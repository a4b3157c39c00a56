"""What a control server is connected to. A simulation gives it other implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clif.adapters.store import AdapterStore
from clif.control.answers import Answers
from clif.control.durability.ledger import Ledger
from clif.control.durability.shutdown import ShutdownPolicy
from clif.control.frontend import Frontend
from clif.control.progress import Display
from clif.control.quality import QualityCheck
from clif.control.records import Records
from clif.control.sources import Source
from clif.control.status_file import StatusFile
from clif.jobs.store import JobStore
from clif.quality.process import Scoring, ScoringProcess
from clif.wire.channels import Channel


@dataclass(frozen=True)
class Ports:
    """channel: to the replicas' leaders. sources: of requests. store: of promoted adapters. records: the tables.

    ledger: the journal, with what earlier starts left. shutdown: what may end the run early. frontend: of clients, one
    of the sources as well. status_file: for those who see the run's folder. jobs: files, jobs and feedback; in memory
    where none can come. scoring: of answers, by metrics that take their time.
    """

    channel: Channel
    sources: Sequence[Source]
    quality: QualityCheck
    store: AdapterStore
    records: Records
    answers: Answers
    display: Display
    ledger: Ledger
    shutdown: ShutdownPolicy
    frontend: Frontend | None = None
    status_file: StatusFile | None = None
    jobs: JobStore = field(default_factory=lambda: JobStore(None))
    scoring: Scoring = field(default_factory=ScoringProcess)
