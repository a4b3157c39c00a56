"""How ranks come to the keys of the control port: by a file of the run's folder, or one that each host was given."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from control_run import make_config
from scripted_replica import make_tokenizer

from clif.distributed.launch_env import RankEnv
from clif.errors import InputError
from clif.rank.control_process import connect, control_process
from clif.rank.signals import SignalWatcher
from clif.rank.worker import run_rank
from clif.storage.run_folder import CONFIG_FILE, take_folder
from clif.wire.keys import KEY_FILE
from clif.wire.messages import Trouble


class Store:
    """torch's key-value store, which anybody may read."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.content[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.content[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.content for key in keys)


@pytest.mark.parametrize("given", [False, True], ids=["shared folder", "secret file"])
def test_a_leader_is_heard_and_its_secret_is_in_no_store_argument_or_environment(tmp_path: Path, given: bool) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef" * 2)
    file.chmod(0o600)
    config = make_config(tmp_path, dist={"secret_file": str(file)} if given else {})
    store = Store()
    folder = take_folder(config, store)
    (folder.path / CONFIG_FILE).write_text(config.model_dump_json())
    topology = SimpleNamespace(
        env=RankEnv(0, 1, 0, 1), store=store, layout=SimpleNamespace(replicas=((0,),)), replica=0
    )
    with control_process(config, topology, folder, make_tokenizer(), 0, SignalWatcher(1.0)) as control:
        assert control is not None
        key = folder.path / KEY_FILE
        secrets = [key.read_bytes(), file.read_bytes()]
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        process = Path(f"/proc/{control.pid}")
        seen = [*store.content.values(), (process / "environ").read_bytes(), (process / "cmdline").read_bytes()]
        assert len(seen) >= 3 and not any(secret in text for secret in secrets for text in seen)
        if given:
            # As on a host that does not share the folder.
            key.unlink()
        leader = connect(config, topology, folder.path)
        leader.send(Trouble(replica=0, error="it is heard"))
        assert control.wait(60) == 1
        leader.close()
    folder.leave()


def test_a_secret_file_that_is_wrong_ends_a_rank_before_it_loads_anything(tmp_path: Path) -> None:

    config = make_config(tmp_path, dist={"secret_file": str(tmp_path / "missing")})
    with pytest.raises(InputError, match=r"dist\.secret_file .*cannot be read on this host"):
        run_rank(config, RankEnv(0, 1, 0, 1))
    assert not config.run_dir.exists()
