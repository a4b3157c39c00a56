"""The journal of a run: what must not be lost when the control process dies. Free of torch.

An append-only file of JSON lines, RUN/journal.jsonl. Each line is handed to the operating system before anything
follows from it: the death of a process loses nothing. Every SYNC_S a thread forces the lines since the last time to
disk: the death of the host loses at most these. The load then offers the requests accepted in that time again, and the
requests that ended in it are answered again.

Each line ends in a checksum of itself: otherwise a changed digit could be another request, answered twice, or a token
id that the model does not have. After the first line with a checksum every line must have one.

The folder is locked while a control process lives, so that two never write it (clif/storage/folder_lock.py).
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Union

import msgspec

from clif.errors import InputError, plain
from clif.storage.disk_space import Room, is_full
from clif.storage.files import write_atomic
from clif.storage.folder_lock import FolderLock
from clif.storage.run_folder import begin
from clif.types import CLIF, FinishReason, Request, Sampling

JOURNAL_FILE = "journal.jsonl"
SYNC_S = 0.5


class JournalError(InputError):
    """The journal is damaged; the message says what to do."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all lines. Stamps named _unix are seconds of the wall clock: only these outlive a restart."""


class Began(Entry, frozen=True):
    """A control process took over. load: fingerprint of its load. first_id: id of that load's first request."""

    load: str
    first_id: int
    continued: bool


class Entered(Entry, frozen=True):
    """A phase of the run began."""

    phase: str


class Accepted(Entry, frozen=True):
    """A user's request was accepted. arrival_unix: when it arrived. at_s: the same in seconds of the load.

    withheld: tokens of a prompt that is not written, of a client. No other start answers its request.
    """

    request: Request
    arrival_unix: float
    at_s: float
    withheld: int = 0

    @classmethod
    def of_client(cls, request: Request, arrival_unix: float, at_s: float) -> Accepted:
        """Without the client's words: neither its prompt nor what it wants to see or not to see in the answer."""
        plain = Sampling(max_tokens=request.sampling.max_tokens)
        bare = msgspec.structs.replace(request, prompt=(), sampling=plain)
        return cls(request=bare, arrival_unix=arrival_unix, at_s=at_s, withheld=len(request.prompt))

    @property
    def shown(self) -> Request:
        """The request with a prompt of its length."""
        return msgspec.structs.replace(self.request, prompt=(0,) * self.withheld) if self.withheld else self.request


class Ended(Entry, frozen=True):
    """A request's terminal event. token_s, finished_s: seconds after its arrival."""

    id: int
    finish: FinishReason
    detail: str
    replica: int | None
    version: int | None
    token_s: tuple[float, ...]
    finished_s: float


class Elapsed(Entry, frozen=True):
    """How long load came, and how long the run took so far, seconds."""

    load_s: float
    run_s: float


class RoundBegan(Entry, frozen=True):
    round_id: int


class VersionGiven(Entry, frozen=True):
    """A round was decided and its members serve this version; its adapter may not be on disk yet."""

    version: int


class RoundStored(Entry, frozen=True):
    """A committed round, written before its adapter becomes the current one. row: as in the table rounds."""

    round_id: int
    version: int
    heldout_loss: float | None
    row: dict[str, Any]
    adapter: str = CLIF
    parent: int = 0
    job: str = ""


class TrainingPaused(Entry, frozen=True):
    """An operator wants no round to begin. reason: why; empty: rounds may begin again."""

    reason: str


class ReplicaDrained(Entry, frozen=True):
    """An operator wants the replica to get no request and join no round. reason: why; empty: no longer."""

    replica: int
    reason: str


Line = Union[
    Began,
    Entered,
    Accepted,
    Ended,
    Elapsed,
    RoundBegan,
    VersionGiven,
    RoundStored,
    TrainingPaused,
    ReplicaDrained,
]
_DECODER = msgspec.json.Decoder(Line)


_SEAL = re.compile(rb',"crc":"([0-9a-f]{8})"}')
_SEAL_BYTES = 18


class _Damaged(ValueError):
    """A line is not as it was written."""


def seal(line: bytes) -> bytes:
    """A JSON object with a checksum as its last member."""
    return b'%s,"crc":"%08x"}' % (line[:-1], zlib.crc32(line))


def unsealed(line: bytes, must: bool) -> tuple[Line, bool]:
    """(the line, whether it has a checksum). must: it needs one. Raises _Damaged."""
    found = _SEAL.fullmatch(line, max(0, len(line) - _SEAL_BYTES))
    if found is None and must:
        raise _Damaged("its checksum is missing")
    try:
        if found is not None and zlib.crc32(line[: found.start()] + b"}") != int(found[1], 16):
            raise _Damaged("its checksum is that of another line")
        return _DECODER.decode(line), found is not None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # A name of a field that is no UTF-8 is no DecodeError of msgspec's.
        raise _Damaged(plain(error)) from error


def parse(content: bytes) -> tuple[list[Line], int]:
    """(lines, bytes that they take). What follows the last whole line is torn: its writer died while writing it.

    Raises JournalError for a damaged line that is not the last.
    """
    lines: list[Line] = []
    start, must = 0, False
    while (end := content.find(b"\n", start)) >= 0:
        try:
            line, sealed = unsealed(content[start:end], must)
        except _Damaged as error:
            if content.find(b"\n", end + 1) < 0 and not content[end + 1 :]:
                break
            raise JournalError(
                f"line {len(lines) + 1} of the journal is damaged ({error}): `clif mend RUN` cuts out what is damaged, "
                "and says what that may cost"
            ) from error
        lines.append(line)
        start, must = end + 1, must or sealed
    return lines, start


def mend(lock: FolderLock) -> tuple[list[int], Path]:
    """Cut damaged lines out of a journal: (their numbers, from 1; where the file is kept as it was).

    Nothing is changed when no line is damaged. Raises OSError.
    """
    path = lock.folder / JOURNAL_FILE
    kept, damaged, must = [], [], False
    content = path.read_bytes()
    # Not splitlines(), which would also split at a lone carriage return.
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            must = unsealed(line, must)[1] or must
            kept.append(line + b"\n")
        except _Damaged:
            damaged.append(number)
    aside = path.with_name(f"{JOURNAL_FILE}.damaged-{time.time_ns()}")
    if damaged:
        write_atomic(aside, content)
        write_atomic(path, b"".join(kept))
    return damaged, aside


class Journal:
    """Reads what is there and appends to it. clock: monotonic seconds.

    past: the lines found, in order. lock: of the folder, by default taken here, and closed with the journal. room: how
    long a full disk is waited for, and all that would follow from a line with it. Raises JournalError when the file is
    damaged, InUse when another process has the folder.
    """

    def __init__(
        self,
        run_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        lock: FolderLock | None = None,
        room: Room | None = None,
    ) -> None:
        self.run_dir, self._clock = run_dir, clock
        # Wall time at 0 of the clock. Fixed, so that stamps of one process stay as far apart as they were.
        self._unix = time.time() - clock()
        self._lock = FolderLock(run_dir) if lock is None else lock
        path = run_dir / JOURNAL_FILE
        try:
            self.past, whole = parse(path.read_bytes()) if path.exists() else ([], 0)
        except JournalError:
            self._lock.close()
            raise
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.ftruncate(self._file, whole)
        self._room, self._sync_room = room or Room(path), Room(path, clock=clock)
        self._encoder = msgspec.json.Encoder()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._sync: Future[None] | None = None
        self._dirty, self._synced = False, clock()

    def write(self, line: Line) -> None:
        """Append a line; it survives this process. Raises OSError, having written nothing."""
        data = seal(self._encoder.encode(line)) + b"\n"
        start = os.fstat(self._file).st_size
        try:
            while data:
                # The rest of a line that fits only in part follows, so that it stays one line.
                written = self._room.repeat(partial(os.write, self._file, data))
                data = data[written:]
        except OSError:
            os.ftruncate(self._file, start)
            raise
        self._dirty = True

    def maybe_sync(self) -> None:
        """Force what was written to disk if SYNC_S have passed, without waiting. Raises an error of the last time."""
        if self._sync is not None and self._sync.done():
            done, self._sync = self._sync, None
            self._after_sync(done)
        if self._dirty and self._sync is None and self._clock() - self._synced >= SYNC_S:
            self._dirty, self._synced = False, self._clock()
            self._sync = self._thread.submit(os.fsync, self._file)

    def _after_sync(self, done: Future[None]) -> None:
        try:
            done.result()
        except OSError as error:
            if not is_full(error):
                raise
            self._sync_room.refused(error)
            self._dirty = True
        else:
            self._sync_room.accepted()

    def mark_used(self) -> None:
        """From now on the folder holds something that is worth keeping. Raises OSError."""
        begin(self.run_dir)

    def unix(self, stamp: float) -> float:
        """A stamp of the clock as wall time."""
        return stamp + self._unix

    def stamp(self, unix: float) -> float:
        """Wall time, maybe of an earlier process, as a stamp of the clock; it may lie before its beginning."""
        return unix - self._unix

    def close(self) -> None:
        """Force all of it to disk and let the next process take over. Closing twice is harmless."""
        if self._file < 0:
            return
        self._thread.shutdown()
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        self._lock.close()
