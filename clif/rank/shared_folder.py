"""The run's folder, as all ranks use it: rank 0 chooses it and publishes its name."""

from __future__ import annotations

import json
from pathlib import Path

from clif.config import Config
from clif.distributed.topology import Topology
from clif.storage.run_folder import PRIVATE, RunFolder, take_folder
from clif.wire.keys import ADDRESS_FILE


def agree_on_folder(config: Config, topology: Topology) -> RunFolder:
    """The folder of the run, which rank 0 chooses and locks. Collective over all ranks. Raises InputError on rank 0."""
    if topology.env.rank == 0:
        folder = take_folder(config, topology.job_store)
        # A resumed run may have left its address: the new control process has another one.
        (folder.path / ADDRESS_FILE).unlink(missing_ok=True)
        topology.store.set("clif/run_dir", json.dumps([str(folder.path), folder.restarted]))
        return folder
    name, restarted = json.loads(topology.store.get("clif/run_dir"))
    # A host that does not share rank 0's file system has no such folder yet.
    Path(name).mkdir(PRIVATE, parents=True, exist_ok=True)
    return RunFolder(Path(name), restarted)


def resuming(config: Config) -> Config:
    """The configuration of a run that continues from its checkpoints."""
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
