"""The tables of RUN/jobs.db, by version, and how the file is opened. Free of torch.

Never in WAL mode: its shared memory does not work on network file systems.

Sources: https://sqlite.org/wal.html, section 2, and https://sqlite.org/pragma.html for user_version.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from clif.errors import InputError

STORE_FILE = "jobs.db"
MIGRATIONS = (
    """
    CREATE TABLE files (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body BLOB NOT NULL);
    CREATE TABLE jobs (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body BLOB NOT NULL);
    CREATE TABLE events (number INTEGER PRIMARY KEY, job TEXT NOT NULL, id TEXT NOT NULL UNIQUE, body BLOB NOT NULL);
    CREATE INDEX events_of_job ON events (job, number);
    CREATE TABLE rounds (round_id INTEGER PRIMARY KEY, job TEXT NOT NULL, body BLOB NOT NULL);
    CREATE INDEX rounds_of_job ON rounds (job, round_id);
    CREATE TABLE feedback (
        number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, created_s REAL NOT NULL,
        source TEXT NOT NULL, job TEXT NOT NULL DEFAULT '', sample BLOB
    );
    CREATE INDEX feedback_of_job ON feedback (job, number);
    CREATE INDEX feedback_of_owner ON feedback (owner, created_s);
    """,
)
"""The statements that lead from each version of the tables to the next; user_version counts those that were applied.

The records themselves are msgspec bodies: a field that is added needs a default, not a migration.
"""


def open_store(path: Path | None) -> sqlite3.Connection:
    """Open RUN/jobs.db, made or migrated where that is needed; None: in memory, without a file.

    Transactions begin and end by statements. Raises InputError for a file that cannot be used.
    """
    try:
        # One thread at a time uses it, though it need not be the one that opens it.
        connection = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        if path is not None:
            path.chmod(0o600)
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = FULL")
        damage = connection.execute("PRAGMA quick_check").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        _migrate(connection, path)
    except sqlite3.Error as error:
        raise InputError(
            f"{path} cannot be used ({error}): it holds the files, jobs and feedback of this run. Restore it from a "
            "backup, or move it away to go on without them"
        ) from error
    return connection


def _migrate(connection: sqlite3.Connection, path: Path | None) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise InputError(
            f"{path} was written by a newer CLIF (version {version} of its tables, this one knows {len(MIGRATIONS)}): "
            "use that one, or move the file away"
        )
    for number in range(version, len(MIGRATIONS)):
        connection.executescript(f"BEGIN; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
