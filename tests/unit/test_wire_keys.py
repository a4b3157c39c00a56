"""The keys of a start: the same for all its processes, unknown to all others, and a sentence where they are missing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from clif.errors import InputError
from clif.wire.keys import KEY_FILE, Invitation, Keys, accept, read_secret

GIVEN = b"0123456789abcdef" * 2


def invited(keys: Keys, salt: str = "salt") -> Invitation:
    return Invitation("tcp://127.0.0.1:1", salt, keys.fingerprint)


def test_every_replica_has_a_pair_of_its_own_and_all_processes_of_a_start_make_the_same() -> None:
    one, same, other = Keys(GIVEN), Keys(GIVEN), Keys.new()
    pairs = [one.control, *(one.replica(r) for r in range(3))]
    assert len({pair.public for pair in pairs} | {pair.secret for pair in pairs}) == 8
    assert pairs == [same.control, *(same.replica(r) for r in range(3))]
    assert one.fingerprint == same.fingerprint != other.fingerprint and one.control != other.control


def test_the_keys_lie_in_the_runs_folder_and_only_its_user_reads_them(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("of an earlier start")
    (tmp_path / KEY_FILE).chmod(0o644)
    keys = Keys.new()
    keys.write(tmp_path)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert Keys.read(tmp_path).control == keys.control
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_what_rank_0_tells_in_the_open_does_not_hold_the_secret(tmp_path: Path) -> None:
    keys = Keys.new()
    keys.write(tmp_path)
    secret = (tmp_path / KEY_FILE).read_text()
    shown = str(invited(keys))
    assert len(secret) == 64 and not any(secret[i : i + 8] in shown for i in range(len(secret) - 8))
    assert keys.control.public.decode() not in shown


def test_a_rank_waits_for_the_keys_of_its_own_start(tmp_path: Path) -> None:
    keys = Keys.new()
    Keys.new().write(tmp_path)
    with pytest.raises(InputError, match=r"control\.key.* is not on this host: share run.out_dir .*dist\.secret_file"):
        accept(invited(keys), tmp_path, None, wait_s=0.0)
    keys.write(tmp_path)
    assert accept(invited(keys), tmp_path, None, wait_s=0.0).control == keys.control


def test_hosts_without_a_common_folder_take_the_secret_that_all_were_given(tmp_path: Path) -> None:
    keys = Keys.new(GIVEN, "salt")
    assert accept(invited(keys), tmp_path, GIVEN).control == keys.control
    with pytest.raises(InputError, match=r"another secret here than on rank 0's host: copy it"):
        accept(invited(keys), tmp_path, GIVEN[::-1])
    assert Keys.new(GIVEN, "the next start").control != keys.control


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (None, 0o600, r"cannot be read on this host \(No such file"),
        (b"short\n", 0o600, "holds 5 bytes: give at least 32"),
        (GIVEN, 0o640, "is open to other users: chmod 600"),
        (GIVEN, 0o604, "is open to other users: chmod 600"),
    ],
)
def test_a_secret_file_that_cannot_protect_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, sentence: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(InputError, match=f"dist.secret_file .*{sentence}"):
        read_secret(file)


def test_a_secret_file_is_read_without_its_line_end(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(GIVEN + b"\n")
    file.chmod(0o600)
    assert read_secret(file) == GIVEN


def test_a_damaged_key_file_is_named(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("no hex")
    with pytest.raises(InputError, match=r"cannot be read from .*control\.key .*start the run anew"):
        Keys.read(tmp_path)
