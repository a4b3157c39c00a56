"""What one key may take of files, jobs and adapters, so that something is left for the others. Free of torch.

An admin's key is bound by the totals alone. Where no key is needed, every client is an admin.
"""

from __future__ import annotations

from clif.config.jobs import JobsConfig
from clif.control.versions import Versions
from clif.jobs.model import STANDING, Job, LimitReached, UnknownId
from clif.jobs.store import JobStore
from clif.types import CLIF
from clif.wire.frontend import CreateJob, Refused, RegisterFile

GIB = 2**30
NO_KEY = ""
"""Owner of what no key has created, as an adapter that an operator has loaded: for admins."""


class JobShares:
    """Reads the store and the versions, and changes neither."""

    def __init__(self, limits: JobsConfig, store: JobStore, versions: Versions) -> None:
        self._limits, self._store, self._versions = limits, store, versions

    def check_file(self, action: RegisterFile) -> None:
        """Raises LimitReached if no further file of this size is kept, of this key or at all."""
        limits = self._limits
        files = self._store.list_files(limit=limits.max_files)
        if len(files) >= limits.max_files:
            raise LimitReached(f"{limits.max_files} files are kept, as many as jobs.max_files allows: delete one")
        if sum(file.bytes for file in files) + action.bytes > limits.max_files_gib * GIB:
            raise LimitReached(
                f"with this file, all files exceed {limits.max_files_gib:g} GiB (jobs.max_files_gib): delete one"
            )
        own = sum(file.owner == action.owner for file in files)
        if action.sees is not None and own >= limits.max_files_per_key:
            raise LimitReached(
                f"{own} files of the key {action.owner} are kept, as many as jobs.max_files_per_key allows: delete one"
            )

    def check_job(self, action: CreateJob) -> None:
        """Raises LimitReached for a key that has its share of jobs, and Refused for an adapter of another key."""
        if action.sees is None:
            return
        own, most = sum(job.owner == action.owner for job in self._live), self._limits.max_jobs_per_key
        if own >= most:
            raise LimitReached(
                f"{own} jobs of the key {action.owner} have not ended, as many as jobs.max_jobs_per_key allows: "
                "wait or cancel one"
            )
        if action.suffix not in ("", CLIF) and self.owner_of(action.suffix) not in (None, action.owner):
            message = f"the adapter {action.suffix} belongs to another key: take another suffix, or ask an admin"
            raise Refused("forbidden", message, "suffix")

    def check_adapter(self, action: CreateJob) -> None:
        """Raises LimitReached for a key that has its share of adapters, and Refused for what is no name of one."""
        if action.sees is None or action.suffix in ("", CLIF):
            return
        self._versions.check_name(action.suffix)
        # Those that take a slot of the replicas, now or soon.
        taken = {name for name, version in self._versions.all_active.items() if version}
        taken |= {job.adapter for job in self._live}
        own = {name for name in taken - {CLIF, action.suffix} if self.owner_of(name) == action.owner}
        if len(own) >= self._limits.max_adapters_per_key:
            raise LimitReached(
                f"the key {action.owner} has the adapter {', '.join(sorted(own))}, as many as "
                "jobs.max_adapters_per_key allows: go on from it, or ask an admin to retire it"
            )

    def owner_of(self, adapter: str) -> str | None:
        """The key whose job made its first version, or will make it. None: there is no such adapter.

        A name stays with its owner also when the adapter is retired: its versions still have it.
        """
        first = self._versions.first_of(adapter)
        if first is None:
            return next((job.owner for job in self._live if job.adapter == adapter), None)
        return owner_of_job(self._store, first.job)

    @property
    def _live(self) -> list[Job]:
        return [job for job in self._store.live if job.id != STANDING]


def owner_of_job(store: JobStore, job: str) -> str:
    """The key that created it; NO_KEY for a job that the store does not know, as after jobs.db was removed."""
    try:
        return store.get_job(job).owner if job != STANDING else NO_KEY
    except UnknownId:
        return NO_KEY
