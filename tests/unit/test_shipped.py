"""What CLIF brings along is found by name, from a checkout and from an installed package, in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from wheel_tree import REPO, copy_sources

from clif import __version__
from clif.cli import app
from clif.config import ConfigError, config_from_tree, load_config, shipped
from clif.config.shipped import find_config, shipped_path

NAMES = sorted(file.stem for file in (REPO / "configs").glob("*.yaml"))
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """An empty working folder, outside of any checkout, of a process that no launcher has started."""
    monkeypatch.chdir(tmp_path)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def built(folder: Path) -> set[str]:
    """Files that a wheel holds, by the step before they are zipped."""
    tree, out = copy_sources(folder / "tree"), folder / "out"
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}


def test_a_wheel_holds_the_configurations_the_kernels_their_tables_and_the_entry_points(tmp_path):
    files = built(tmp_path)
    for name in ("clif", "kernels", "launch"):
        prefix = "" if name == "clif" else "clif/"
        for file in (REPO / name).rglob("*.py"):
            if "try" not in file.parts:
                assert prefix + str(file.relative_to(REPO)) in files
    for pattern in ("*.yaml", "models/*.json", "data/*.jsonl"):
        assert {f"clif/{file.relative_to(REPO)}" for file in (REPO / "configs").glob(pattern)} <= files
    assert {"clif/configs/demo.yaml", "clif/kernels/tuned/a-gpu.json", "clif/launch/run.py", "clif/run.py"} <= files
    assert not [file for file in files if not file.startswith("clif/")], (
        "transformers takes a package kernels for its own"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_configuration_is_found_by_name_in_an_empty_folder(empty, name):
    assert find_config(name) == REPO / "configs" / f"{name}.yaml"
    assert find_config(f"configs/{name}.yaml") == REPO / "configs" / f"{name}.yaml", "as the documents write it"


def test_what_shipped_configurations_name_is_found_with_them(empty):
    config = load_config(find_config("smoke"))
    assert config.model.path == f"random:{REPO / 'configs/models/tiny-llama.json'}"
    assert config.data.path == REPO / "configs/data/words.jsonl"
    tree = {"model": {"path": "random:configs/models/llama-1b.json"}, "train": {"enabled": False}}
    assert config_from_tree(tree).model.path == f"random:{REPO / 'configs/models/llama-1b.json'}"


def test_the_working_folder_comes_first_and_other_paths_stay(empty):
    (empty / "configs" / "models").mkdir(parents=True)
    (empty / "configs" / "models" / "llama-1b.json").touch()
    (empty / "demo.yaml").touch()
    for path in (
        "configs/models/llama-1b.json", "random:configs/models/llama-1b.json", "configs/none.json",
        "configs/../setup.py", "assets/smart_home.jsonl", "own/configs/demo.yaml", "configs-of-mine/x",
        "configs/" + 5000 * "x", "configs/\0",
    ):  # fmt: skip
        assert shipped_path(path) == path
    assert find_config("demo.yaml") == Path("demo.yaml")
    assert find_config("none.yaml") == Path("none.yaml"), "load_config says that it is not there"


def test_an_installed_package_has_them_inside(empty, monkeypatch):
    package = empty / "site" / "clif"
    shutil.copytree(REPO / "configs", package / "configs")
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert find_config("demo") == package / "configs" / "demo.yaml"
    assert load_config(find_config("smoke")).data.path == package / "configs" / "data" / "words.jsonl"


def test_an_unknown_name_is_refused_with_those_that_there_are(empty):
    with pytest.raises(ConfigError, match=r"there is no configuration dema: name a YAML file, or one .*demo, .*smoke"):
        find_config("dema")


# --- clif run -----------------------------------------------------------------------------------


def run(*words: str) -> tuple[int, str]:
    """clif run in this process: exit code and what it says; an InputError is a sentence of code 2, as main() does."""
    done = CliRunner().invoke(app, ["run", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 2, str(done.exception)
    return done.exit_code, done.output


def test_the_version_is_told():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"clif {__version__}\n")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "which configuration? Write clif run demo, or clif run --config FILE.yaml"),
        (["load.rate_rps=2"], "which configuration?"),
        (["dema"], "there is no configuration dema"),
        (["none.yaml"], "cannot read the configuration none.yaml: No such file"),
        (["demo"], "data.path assets/smart_home.jsonl does not exist: run `clif fetch`"),
        (["--config", "smoke", "engine.max_bach=3"], "unknown key engine.max_bach"),
        (["smoke", "--ranks", "3", "layout.tp_size=2"], "layout.tp_size 2 does not divide the 3 ranks"),
    ],
)
def test_what_cannot_run_is_one_sentence_before_any_rank_starts(empty, words, sentence):
    code, said = run(*words)
    assert code == 2 and sentence in said


def test_it_becomes_torchrun_with_the_ranks_that_are_asked_for(empty, monkeypatch):
    started = []

    def become(path: str, command: list[str], environ: dict[str, str]) -> None:
        started.append((command, environ))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", become)
    for words, count in (
        (["smoke", "layout.replicas=3"], 3),
        (["--config", "smoke", "--ranks", "2", "run.name=x"], 2),
        (["smoke", "layout.replicas=2", "layout.tp_size=2"], 4),
    ):
        assert run(*words)[0] == 0
        command, environ = started[-1]
        assert f"--nproc-per-node={count}" in command and environ["PYTHONSAFEPATH"] == "1"
        assert command[command.index("-m", 3) + 1] == "clif.run"
    assert started[1][0][-3:] == ["--config", str(REPO / "configs" / "smoke.yaml"), "run.name=x"]


def test_under_a_launcher_it_is_one_rank(empty, monkeypatch):
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    code, said = run("smoke", "--dry-run")
    assert code == 0 and "replica 1: ranks [1]" in said
    code, said = run("smoke", "--ranks", "2")
    assert code == 2 and "--ranks is for a start without a launcher, and this one is of torch's environment" in said
