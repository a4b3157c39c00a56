"""Access to the control port: key pairs (CURVE) that only the processes of one start of the ranks can derive.

All pairs are derived from one secret. Rank 0 creates it and leaves it in the run's folder, readable by its user alone.
Where hosts share no folder, dist.secret_file gives every host the same secret instead. The public keys are secret as
well: without the control process's key no connection can be made.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from clif.errors import InputError
from clif.storage.files import write_atomic

KEY_FILE = "control.key"
ADDRESS_FILE = "control.address"
"""In the run's folder: where the control process listens."""
LEAST_BYTES = 32
VISIBLE_S = 30.0
"""How long a file of rank 0 may stay unseen on other hosts, seconds: network file systems cache names."""
POLL_S = 0.1


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair in Z85, 40 characters each."""

    public: bytes
    secret: bytes


class Invitation(msgspec.Struct, frozen=True):
    """What rank 0 sends to the other ranks in the open: none of it is secret.

    address: of the control port. salt: mixed with a secret of dist.secret_file, so that no start of the ranks has the
    keys of another. fingerprint: shows a rank that it has the right secret.
    """

    address: str
    salt: str
    fingerprint: str


class Keys:
    """All key pairs of one start of the ranks."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def new(cls, given: bytes | None = None, salt: str = "") -> Keys:
        """From a random secret, or from the one that all hosts were given."""
        return cls(secrets.token_bytes(LEAST_BYTES) if given is None else _mix(given, f"start {salt}"))

    @property
    def control(self) -> KeyPair:
        return self._pair("control")

    def replica(self, replica: int) -> KeyPair:
        return self._pair(f"replica {replica}")

    @property
    def frontend(self) -> KeyPair:
        return self._pair("front end")

    @property
    def fingerprint(self) -> str:
        """Distinguishes secrets without revealing them."""
        return _mix(self._secret, "fingerprint").hex()[:16]

    def write(self, run_dir: Path) -> None:
        """Leave the secret in the run's folder, for the processes of this user."""
        write_atomic(run_dir / KEY_FILE, self._secret.hex().encode())

    @classmethod
    def read(cls, run_dir: Path) -> Keys:
        """From the run's folder. Raises InputError when there are none."""
        path = run_dir / KEY_FILE
        try:
            return cls(bytes.fromhex(path.read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"the keys of the run cannot be read from {path} ({error}): start the run anew") from error

    def _pair(self, owner: str) -> KeyPair:
        secret = z85.encode(_mix(self._secret, owner))
        return KeyPair(zmq.curve_public(secret), secret)


def read_secret(path: Path) -> bytes:
    """The secret in dist.secret_file. Raises InputError when it is missing, too short, or open to other users."""
    try:
        content, mode = path.read_bytes().strip(), path.stat().st_mode
    except OSError as error:
        raise InputError(
            f"dist.secret_file {path} cannot be read on this host ({error.strerror}): put the same file on every host, "
            "e.g. of `openssl rand -hex 32`"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"dist.secret_file {path} is open to other users: chmod 600 {path}")
    if len(content) < LEAST_BYTES:
        raise InputError(
            f"dist.secret_file {path} holds {len(content)} bytes: give at least {LEAST_BYTES}, e.g. of "
            "`openssl rand -hex 32`"
        )
    return content


def accept(invitation: Invitation, run_dir: Path, given: bytes | None, wait_s: float = VISIBLE_S) -> Keys:
    """The keys of the start that rank 0 invites to, on any rank.

    given: what dist.secret_file holds here. Raises InputError when this host has another secret, or cannot see the
    run's folder of rank 0's host within wait_s.
    """
    if given is not None:
        keys = Keys.new(given, invitation.salt)
        if keys.fingerprint != invitation.fingerprint:
            raise InputError("dist.secret_file holds another secret here than on rank 0's host: copy it from there")
        return keys
    deadline = time.monotonic() + wait_s
    while (found := _seen(run_dir, invitation.fingerprint)) is None:
        if time.monotonic() > deadline:
            raise InputError(
                f"{run_dir / KEY_FILE}, which rank 0 has written, is not on this host: share run.out_dir among all "
                "hosts, or give each the same dist.secret_file"
            )
        time.sleep(POLL_S)
    return found


def _seen(run_dir: Path, fingerprint: str) -> Keys | None:
    """The keys in the run's folder; None if they are not there yet, or belong to an earlier start."""
    if not (run_dir / KEY_FILE).exists():
        return None
    keys = Keys.read(run_dir)
    return keys if keys.fingerprint == fingerprint else None


def _mix(secret: bytes, purpose: str) -> bytes:
    return hmac.digest(secret, purpose.encode(), hashlib.sha256)
