"""What an operator does with adapter versions. Each action is on disk before a replica is told of it.

Every method raises Refused with a sentence that says what to change, and OSError if the disk fails.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from clif.adapters.peft_fit import fit_files
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE, Canary
from clif.config import Config
from clif.control.federation import Federation, RoundObserver
from clif.control.fleet import Fleet
from clif.control.versions import ModelRow, Versions, version_name
from clif.errors import InputError
from clif.storage.files import write_synced
from clif.types import CLIF, AdapterVersion
from clif.wire.frontend import Refused

log = logging.getLogger(__name__)


class VersionActions:
    """observer: of what is stored. Training goes on from what is active: a round of a version given up is discarded."""

    def __init__(
        self, config: Config, fleet: Fleet, federation: Federation, versions: Versions, observer: RoundObserver
    ) -> None:
        self._config, self._fleet, self._federation = config, fleet, federation
        self._versions, self._observer = versions, observer

    def roll_back(self, now: float, number: int, adapter: str = CLIF) -> ModelRow:
        """Make a stored version the active one of its adapter, an older or a newer one; 0: adapter answers as the base.

        Later rounds train from it, and what they make has new numbers. adapter: whose version 0 is meant.
        """
        version = self._existing(number) if number else None
        name = version.adapter if version else adapter
        if self._versions.active(name) != number:
            self._check_no_promotion(name)
            active = {**self._versions.all_active, name: number}
            # The canary that becomes active is not one any more.
            canary = self._versions.canary
            kept = None if canary is not None and canary.version == number else canary
            self._versions.check_fits(active=active, canary=kept)
            self._versions.choose(active=active, canary=kept)
            log.info("an operator made %s the active version of adapter %s", version_name(version), name)
            self._give_up_round(now, name, f"{version_name(version)} was made active")
        return self._row(number)

    def retire(self, now: float, adapter: str) -> None:
        """Give up an adapter: its name means nothing any more, and its versions are only stored."""
        if adapter == CLIF or adapter not in self._versions.adapters:
            why = "it answers by default: roll it back to 0" if adapter == CLIF else "there is none of this name"
            raise Refused("invalid", f"adapter {adapter[:80]} cannot be retired: {why}", "adapter")
        self._check_no_promotion(adapter)
        self._versions.choose(active={k: v for k, v in self._versions.all_active.items() if k != adapter})
        log.info("an operator retired adapter %s", adapter)
        self._give_up_round(now, adapter, "its adapter was retired")

    def set_canary(self, number: int, share: float) -> ModelRow:
        """Let a version answer this share, above 0 and up to 1, of the requests of clients to `clif`."""
        version = self._existing(number)
        if not 0 < share <= 1:
            raise Refused("invalid", f"share is {share}: it must be above 0 and at most 1", "share")
        if version.adapter != CLIF:
            raise Refused(
                "invalid", f"{version_name(version)} is none of adapter {CLIF}: ask for it by name", "version"
            )
        if number == self._versions.active():
            raise Refused("conflict", f"{version_name(version)} is the active version already", "version")
        canary = Canary(number, share)
        self._versions.check_fits(canary=canary)
        self._versions.choose(canary=canary)
        log.info("an operator gave %s a share of %g", version_name(version), share)
        return self._row(number)

    def clear_canary(self) -> None:
        """Let the active version answer all requests to `clif`."""
        self._versions.choose(canary=None)
        log.info("an operator ended the canary")

    def pin(self, number: int) -> ModelRow:
        """Keep a version until it is unpinned."""
        self._existing(number)
        pinned = tuple(dict.fromkeys((*self._versions.pinned, number)))
        self._versions.check_fits(pinned=pinned)
        self._versions.choose(pinned=pinned)
        return self._row(number)

    def unpin(self, number: int) -> ModelRow:
        """Keep a version only as long as it is active, the canary, or among the newest."""
        self._existing(number)
        self._versions.choose(pinned=tuple(each for each in self._versions.pinned if each != number))
        return self._row(number)

    def load_folder(self, now: float, path: str, adapter: str) -> ModelRow:
        """Make a version of a PEFT folder below serve.adapter_root.

        The first version of an adapter is active at once; a further one is stored, and roll_back() or set_canary() make
        it answer. See clif/adapters/peft_fit.py for what is refused.
        """
        self._versions.check_name(adapter)
        folder = self._below_root(path)
        first = not self._versions.active(adapter) and adapter != CLIF
        if first:
            self._versions.check_room(adapter)
        hellos = self._fleet.hellos
        if not hellos:
            raise Refused("not_ready", "no replica has reported what its adapters look like: ask again")
        number, sizes = self._federation.take_number(), self._config.adapter
        try:
            config_json, weights = fit_files(
                folder, sizes.r, sizes.lora_alpha, hellos[0].adapter, hellos[0].dtype, self._config.model.path, number
            )
        except InputError as error:
            raise Refused("invalid", str(error), "path") from error
        version = AdapterVersion(
            number=number, round_id=0, heldout_loss=None, adapter=adapter, created_unix=self._versions.unix(now)
        )
        self._versions.add(version, config_json, weights, active=first)
        self._observer.on_stored(version)
        log.info("an operator loaded %s as %s", folder, version_name(version))
        return self._row(number)

    def export(self, number: int, path: str) -> Path:
        """Copy a version to a new folder below serve.adapter_root, in PEFT's format; returns the folder."""
        self._existing(number)
        target = self._root / path
        parent = self._resolved(target.parent)
        target = parent / target.name
        if target.name in ("", ".", "..") or target.exists() or target.is_symlink():
            raise Refused("conflict", f"{path} is there already, or is no name of a folder: choose another one", "path")
        temporary = parent / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_synced(temporary / CONFIG_FILE, self._versions.store.config(number).encode())
        write_synced(temporary / WEIGHTS_FILE, self._versions.store.weights(number))
        os.rename(temporary, target)
        return target

    def _existing(self, number: int) -> AdapterVersion:
        version = self._versions.get(number)
        if version is None:
            raise Refused("not_found", f"there is no stored version {number}", "version")
        folder = self._versions.store.path(number)
        if not (folder / WEIGHTS_FILE).is_file():
            raise Refused("conflict", f"the weights of {version_name(version)} are gone: restore {folder}", "version")
        return version

    def _row(self, number: int) -> ModelRow:
        return self._versions.row(number)

    def _check_no_promotion(self, adapter: str) -> None:
        current = self._federation.current
        if current is not None and current.plan.adapter == adapter and current.promotes:
            raise Refused(
                "conflict", f"round {current.plan.round_id} is promoting version {current.version}: ask again"
            )

    def _give_up_round(self, now: float, adapter: str, why: str) -> None:
        """Its candidate would be judged against a version that is not active any more, and replace the operator's."""
        current = self._federation.current
        if current is not None and current.plan.adapter == adapter:
            self._federation.abandon(now, why)

    @property
    def _root(self) -> Path:
        root = self._config.serve.adapter_root
        if root is None:
            raise Refused("forbidden", "serve.adapter_root is not set: no folder may be read or written")
        return root

    def _resolved(self, path: Path) -> Path:
        """The folder that a path means, without links. Raises Refused unless it lies below the root."""
        try:
            root, real = self._root.resolve(strict=True), path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise Refused("invalid", f"{path.name} cannot be found below serve.adapter_root", "path") from error
        if not real.is_relative_to(root) or not real.is_dir():
            raise Refused("forbidden", f"{path.name} is no folder below serve.adapter_root", "path")
        return real

    def _below_root(self, path: str) -> Path:
        folder, root = self._resolved(self._root / path), self._root.resolve()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).resolve().is_relative_to(root):
                raise Refused("forbidden", f"{name} of {folder.name} lies outside of serve.adapter_root", "path")
        return folder
