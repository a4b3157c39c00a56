"""What one key may take of files, jobs and adapters; whose an adapter is; and what uploads leave of the disk."""

from __future__ import annotations

import asyncio
import errno
import io
from pathlib import Path
from typing import Any

import pytest
from control_run import Run, make_config

from clif.config import Config
from clif.control.frontend import Handlers
from clif.control.job_actions import JobActions
from clif.control.job_shares import JobShares
from clif.frontend import file_store
from clif.frontend.auth import Caller
from clif.frontend.errors import ApiError
from clif.frontend.file_store import GIB, FileStore
from clif.frontend.files import not_kept
from clif.frontend.models import shown
from clif.frontend.quotas import KeyUse
from clif.jobs.model import JobStatus
from clif.jobs.samples import samples_path, write_samples
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.storage.api_keys import ApiKey
from clif.types import TrainSample
from clif.wire.frontend import ChangeJob, CreateJob, Kind, Refused, RegisterFile


def settings(tmp_path: Path, jobs: dict[str, Any], slots: int = 6) -> Config:
    return make_config(
        tmp_path,
        run={"linger_s": 2.0},
        load={"kind": "none"},
        quality={"exact_match_rows": 0},
        federation={"rounds": None, "min_members": 2, "local_steps": 2},
        adapter={"serving_slots": slots},
        jobs=jobs,
    )


class Clients:
    """Keys ann and ben of users, and one of an admin, at a run in virtual time."""

    def __init__(self, tmp_path: Path, slots: int = 6, **jobs: Any) -> None:
        self.run = Run(settings(tmp_path, jobs, slots), jobs=True)
        versions = self.run.server.versions
        shares = JobShares(self.run.config.jobs, self.run.jobs, versions)
        actions = JobActions(self.run.server.jobs, lambda now: now, versions.active, shares)
        self.handlers: Handlers = actions.handlers()

    def upload(self, name: str, owner: str, size: int = 1) -> Any:
        fields: dict[str, Any] = {"filename": "a", "rows": 1, "tokens": 1, "longest": 1, "owner": owner}
        return self._do(RegisterFile(id=name, bytes=size, sees=None if owner == "boss" else owner, **fields))

    def train(self, owner: str, suffix: str = "", model: str = "", file: str = "") -> Any:
        file = file or f"of-{owner}"
        model = model or ("base" if suffix else "clif")
        sees = None if owner == "boss" else owner
        return self._do(CreateJob(model=model, training_file=file, suffix=suffix, owner=owner, sees=sees))

    def cancel(self, job: str) -> Any:
        return self._do(ChangeJob(id=job, change="cancel"))

    def _do(self, action: Any) -> Any:
        return self.handlers[type(action)](0.0, action)


def refused(kind: Kind, why: str, act: Any) -> None:
    with pytest.raises(Refused, match=why) as caught:
        act()
    assert caught.value.problem.kind == kind


def test_a_key_keeps_its_share_of_the_files_and_an_admin_is_bound_by_the_totals(tmp_path: Path) -> None:
    clients = Clients(tmp_path, max_files_per_key=2, max_files=5)
    for name in ("a", "b"):
        clients.upload(name, "ann")
    refused("too_many", r"2 files of the key ann .*jobs\.max_files_per_key", lambda: clients.upload("c", "ann"))
    for name in ("c", "d", "e"):
        clients.upload(name, "boss")
    refused("too_many", r"5 files are kept.*jobs\.max_files ", lambda: clients.upload("f", "boss"))


def test_the_size_of_all_files_is_bounded_for_everyone(tmp_path: Path) -> None:
    clients = Clients(tmp_path, max_files_gib=1.0)
    clients.upload("a", "ann", 2**30 - 8)
    for owner in ("ben", "boss"):
        refused("too_many", r"exceed 1 GiB \(jobs\.max_files_gib\)", lambda owner=owner: clients.upload("b", owner, 9))
    clients.upload("b", "ben", 8)


def test_a_key_has_its_share_of_the_live_jobs_and_an_admin_more(tmp_path: Path) -> None:
    clients = Clients(tmp_path, max_jobs_per_key=1)
    for owner in ("ann", "ben", "boss"):
        clients.upload(f"of-{owner}", owner)
    first = clients.train("ann")
    refused("too_many", r"1 jobs of the key ann .*jobs\.max_jobs_per_key", lambda: clients.train("ann"))
    for owner in ("ben", "boss", "boss"):
        clients.train(owner)
    clients.cancel(first.id)
    clients.train("ann")


def test_an_adapter_is_its_owners_while_its_first_job_runs_and_after(tmp_path: Path) -> None:
    clients = Clients(tmp_path)
    for owner in ("ann", "ben", "boss"):
        clients.upload(f"of-{owner}", owner)
    path = samples_path(clients.run.config.run_dir, "of-ann")
    path.parent.mkdir(exist_ok=True)
    write_samples(path, [TrainSample(id=i, ids=(i + 10, *range(1, 6)), target_start=3) for i in range(80)])
    job = clients.train("ann", "support")
    theirs = "the adapter support belongs to another key"
    refused("forbidden", theirs, lambda: clients.train("ben", "support"))
    clients.run.go()
    assert clients.run.jobs.get_job(job.id).ended or clients.cancel(job.id)
    assert clients.run.server.versions.active("support"), "it has a version"
    refused("forbidden", theirs, lambda: clients.train("ben", "support", "support"))
    assert clients.train("ann", "support", "support").owner == "ann"
    assert clients.train("boss", "support", "support").owner == "boss"
    clients.train("ben")
    refused("too_many", r"has the adapter support.*jobs\.max_adapters_per_key", lambda: clients.train("ann", "two"))


def test_an_adapter_whose_job_ended_without_a_version_takes_no_slot_and_its_name_is_free(tmp_path: Path) -> None:
    clients = Clients(tmp_path, slots=2)
    for owner in ("ann", "ben"):
        clients.upload(f"of-{owner}", owner)
    job = clients.train("ann", "one")
    refused("conflict", r"raise adapter\.serving_slots", lambda: clients.train("ben", "two"))
    clients.cancel(job.id)
    assert clients.run.jobs.get_job(job.id).status is JobStatus.CANCELLED
    assert clients.train("ben", "one").owner == "ben"


# --- in the front end ------------------------------------------------------------------------------------------------


def test_an_upload_leaves_free_what_others_need_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, {"min_free_gib": 1.0})
    config.run_dir.mkdir(exist_ok=True)
    rows = b'{"prompt": "a", "completion": "b"}\n'
    free = [GIB + len(rows), GIB + len(rows) - 1, GIB + len(rows), GIB - 1]
    monkeypatch.setattr(file_store, "free_bytes", lambda folder: free.pop(0))
    store = FileStore(config, byte_tokenizer(512))
    asyncio.run(store.check_room(len(rows)))
    for when in ("before it is copied", "while its samples are written"):
        with pytest.raises(OSError) as caught:
            asyncio.run(store.take(io.BytesIO(rows)))
        assert caught.value.errno == errno.ENOSPC, when
        error = not_kept(caught.value)
        assert error.status == 507 and "jobs.min_free_gib" in error.message
    assert not free and not [*(config.run_dir / "files").iterdir()], "nothing of it is kept"
    assert error.headers == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("name", "role", "job"), [("ann", "user", "ftjob-1"), ("ben", "user", ""), ("boss", "admin", "ftjob-1")]
)
def test_a_models_job_is_shown_to_its_owner_and_to_admins_alone(name: str, role: Any, job: str) -> None:
    key = ApiKey(name=name, sha256="", role=role)
    found = shown({"id": "support", "job": "ftjob-1", "owner": "ann"}, Caller(key, KeyUse(key, lambda: 0.0)))
    assert found["job"] == job and "owner" not in found


def test_an_error_of_the_disk_that_is_not_full_stays_an_error_of_the_server() -> None:
    error: ApiError = not_kept(OSError(errno.EIO, "Input/output error"))
    assert error.status == 500 and "Input/output error" in error.message
