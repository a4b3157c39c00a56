"""Which folder a start takes, what it touches before it may, and what becomes of a folder in which nothing ran."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from clif.config import ConfigError, config_from_tree
from clif.control.durability.journal import Journal
from clif.control.durability.ledger import Ledger
from clif.control.durability.recovery import Recovery
from clif.control.policy.phases import Phase
from clif.errors import InputError
from clif.storage.folder_lock import FolderLock, InUse
from clif.storage.run_folder import RunFolder, take_folder


def config(tmp_path, **run):
    return config_from_tree(
        {"model": {"path": "m"}, "train": {"enabled": False}, "run": {"out_dir": str(tmp_path), **run}}
    )


def take(tmp_path, store=None, **run) -> RunFolder:
    """The folder of a start whose process is gone again."""
    folder = take_folder(config(tmp_path, **run), store or dist.HashStore())
    assert folder.lock is not None
    folder.lock.close()
    return folder


def enter(folder: Path, *phases: Phase) -> None:
    """A control process that goes through these phases."""
    journal = Journal(folder)
    ledger = Ledger(journal, Recovery())
    for phase in phases:
        ledger.entered(phase)
    journal.close()


def test_a_new_start_takes_a_new_folder_and_a_restart_the_same(tmp_path):
    first = dist.HashStore()
    assert (take(tmp_path, first).path, take(tmp_path).path) == (tmp_path / "run", tmp_path / "run-2")
    again = take(tmp_path, first)
    assert (again.path, again.restarted) == (tmp_path / "run", True)


def test_a_start_that_was_killed_before_it_wrote_anything_keeps_its_folder_for_the_restart(tmp_path):
    store = dist.HashStore()
    take(tmp_path, store)
    assert not list((tmp_path / "run").glob("config.json"))
    assert take(tmp_path, store).path == tmp_path / "run" and not list(tmp_path.glob("run-*"))


def test_a_start_says_which_folder_it_takes_and_why_not_the_one_that_was_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    take(tmp_path)
    take(tmp_path)
    assert f"{tmp_path}/run is of an earlier start: this one takes {tmp_path}/run-2" in caplog.text
    assert caplog.messages[-1] == f"run folder: {tmp_path}/run-2"


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        take(tmp_path, resume=True)


def test_a_folder_in_which_nothing_ran_is_removed_with_a_line_and_the_next_start_gets_its_name(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = take_folder(config(tmp_path), dist.HashStore())
    (folder.path / "config.json").write_text("{}")
    folder.lock.close()
    enter(folder.path, Phase.STOPPING)
    folder.lock = FolderLock(folder.path)
    folder.leave()
    assert not folder.path.exists() and caplog.messages[-1] == f"nothing ran: {folder.path} is removed"
    assert take(tmp_path).path == tmp_path / "run"


def test_a_folder_in_which_something_ran_stays_and_is_named_last(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = take(tmp_path)
    enter(folder.path, Phase.BASELINE, Phase.DRAIN, Phase.STOPPING)
    folder.lock = FolderLock(folder.path)
    folder.leave()
    assert caplog.messages[-1] == f"run folder: {folder.path}"
    assert (folder.path / "journal.jsonl").is_file()


def test_a_resumed_folder_is_never_removed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    folder = take_folder(config(tmp_path, resume=True), dist.HashStore())
    folder.leave()
    assert (tmp_path / "run" / "config.json").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_in_a_folder_in_use_touches_nothing_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr("clif.storage.run_folder.WAIT_S", 0.1)
    first = take_folder(config(tmp_path), dist.HashStore())
    (first.path / "config.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(InUse, match=rf"is in use by process {os.getpid()} on .*: end that process first"):
        take_folder(config(tmp_path, resume=True, seed=5), dist.HashStore())
    assert contents(tmp_path) == before
    first.lock.close()


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from clif.storage.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if len(sys.argv) > 2:
    number = lock.fileno()
    child = subprocess.Popen([sys.executable, "-P", "-c", sys.argv[2], sys.argv[1], str(number)], pass_fds=[number])
    print(child.pid, flush=True)
else:
    print("has it", flush=True)
time.sleep(60)
"""
HEIR = """
import sys, time
from pathlib import Path
from clif.storage.folder_lock import FolderLock
lock = FolderLock.inherited(Path(sys.argv[1]), int(sys.argv[2]))
print("has it", flush=True)
time.sleep(60)
"""


def hold(folder: Path, *heir: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", HOLDER, str(folder), *heir]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_sigkill_frees_the_lock(tmp_path):
    process = hold(tmp_path)
    assert process.stdout.readline() == "has it\n"
    with pytest.raises(InUse, match="is in use by"):
        FolderLock(tmp_path, wait_s=0.0)
    process.kill()
    process.wait()
    FolderLock(tmp_path, wait_s=5.0).close()


def test_the_lock_lives_as_long_as_the_control_process_that_rank_0_gave_it_to(tmp_path):
    process = hold(tmp_path, HEIR)
    said = {process.stdout.readline().strip() for _ in range(2)} - {"has it"}
    (child,) = said
    process.kill()
    process.wait()
    with pytest.raises(InUse, match=f"process {child} on"):
        FolderLock(tmp_path, wait_s=0.2)
    os.kill(int(child), 9)
    FolderLock(tmp_path, wait_s=5.0).close()
    process.stdout.close()


def test_where_locks_do_not_reach_other_hosts_a_journal_that_grows_tells_of_a_run(tmp_path):
    (tmp_path / "journal.lock").write_text("process 7 on another-host")
    journal, done = tmp_path / "journal.jsonl", threading.Event()

    def grow() -> None:
        while not done.is_set():
            with journal.open("a") as file:
                file.write("{}\n")
            time.sleep(0.02)

    thread = threading.Thread(target=grow)
    thread.start()
    with pytest.raises(InUse, match="in use by process 7 on another-host"):
        FolderLock(tmp_path, watch_s=5.0)
    done.set()
    thread.join()
    # That one is gone now.
    FolderLock(tmp_path, watch_s=0.2).close()


def test_a_file_system_without_locks_is_refused_with_what_to_change(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("clif.storage.folder_lock.fcntl.flock", no_locks)
    with pytest.raises(InputError, match=r"cannot be locked .*set run\.out_dir to another file system"):
        FolderLock(tmp_path)


def test_an_out_dir_that_cannot_hold_folders_is_refused_with_what_to_change(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the run's folder cannot be used: .*file: .*set run\.out_dir"):
        take(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"the run's folder cannot be used: .*file/.*: .*set run\.out_dir"):
        take(tmp_path / "file" / "below")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ConfigError, match=r"Read-only file system: set run\.out_dir"):
        take(tmp_path)


def test_the_folder_and_its_lock_are_their_owners_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        folder = take(tmp_path)
        enter(folder.path, Phase.OPEN)
    finally:
        os.umask(before)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.path.iterdir()} == {
        "journal.lock": 0o600,
        "journal.jsonl": 0o600,
    }
