"""What an operator may ask of adapter versions, by type of action; every action that changes something is an event."""

from __future__ import annotations

from typing import Any

from clif.control.activity import Activity
from clif.control.frontend import Handlers
from clif.control.version_actions import VersionActions
from clif.control.versions import ModelRow, Versions
from clif.wire.frontend import (
    ClearCanary,
    ExportVersion,
    ListVersions,
    LoadAdapter,
    PinVersion,
    RetireAdapter,
    RollBack,
    SetCanary,
    UnpinVersion,
)


class VersionHandlers:
    """Each raises Refused as VersionActions does, and OSError if the disk fails."""

    def __init__(self, versions: Versions, actions: VersionActions, activity: Activity) -> None:
        self._versions, self._actions, self._activity = versions, actions, activity

    def handlers(self) -> Handlers:
        return {
            ListVersions: lambda now, action: self.listing(),
            RollBack: self._roll_back,
            RetireAdapter: self._retire,
            SetCanary: self._set_canary,
            ClearCanary: self._clear_canary,
            PinVersion: self._pin,
            UnpinVersion: self._unpin,
            LoadAdapter: self._load,
            ExportVersion: self._export,
        }

    def listing(self) -> dict[str, Any]:
        """All versions, newest first, and what the operator chose."""
        versions = self._versions
        return {
            "active": versions.all_active,
            "canary": versions.canary,
            "pinned": versions.pinned,
            "kept": versions.kept,
            "reason": versions.reason,
            "versions": versions.listing(),
        }

    def _roll_back(self, now: float, action: RollBack) -> ModelRow:
        row = self._actions.roll_back(now, action.version, action.adapter)
        return self._noted(f"{row.id} was made the active version of adapter {row.adapter or action.adapter}", row)

    def _retire(self, now: float, action: RetireAdapter) -> dict[str, Any]:
        self._actions.retire(now, action.adapter)
        self._activity.note("operator", f"adapter {action.adapter} was retired")
        return self.listing()

    def _set_canary(self, now: float, action: SetCanary) -> ModelRow:
        row = self._actions.set_canary(action.version, action.share)
        return self._noted(f"{row.id} is the canary, for {action.share:.1%} of the requests", row)

    def _clear_canary(self, now: float, action: ClearCanary) -> dict[str, Any]:
        self._actions.clear_canary()
        self._activity.note("operator", "the canary was ended")
        return self.listing()

    def _pin(self, now: float, action: PinVersion) -> ModelRow:
        row = self._actions.pin(action.version)
        return self._noted(f"{row.id} is pinned", row)

    def _unpin(self, now: float, action: UnpinVersion) -> ModelRow:
        row = self._actions.unpin(action.version)
        return self._noted(f"{row.id} is no longer pinned", row)

    def _load(self, now: float, action: LoadAdapter) -> ModelRow:
        row = self._actions.load_folder(now, action.path, action.adapter)
        return self._noted(f"{action.path} was loaded as {row.id}", row)

    def _export(self, now: float, action: ExportVersion) -> dict[str, Any]:
        folder = self._actions.export(action.version, action.path)
        self._activity.note("operator", f"version {action.version} was exported to {action.path}")
        return {"version": action.version, "folder": str(folder)}

    def _noted(self, text: str, row: ModelRow) -> ModelRow:
        self._activity.note("operator", text, version=row.version)
        return row
