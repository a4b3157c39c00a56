"""Starts a run: one rank of it if a launcher has started this process, otherwise all ranks.

clif run demo                                  # starts the ranks of the configuration on this host
torchrun --nproc-per-node 2 -m clif.run --config demo
torchrun --nproc-per-node 2 --no-python clif run --config demo
torchrun --nproc-per-node 2 launch/run.py --config configs/demo.yaml
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, NoReturn

import typer

from clif.config import Config, load_config
from clif.config.relevance import check_device
from clif.config.shipped import find_config
from clif.data.check import check_inputs
from clif.distributed.launch_env import ALONE, RankEnv, discover
from clif.distributed.layout import Layout, make_layout
from clif.distributed.mpi import ask_mpi
from clif.distributed.roles import check_roles, fewest_replicas
from clif.errors import ConfigError, InputError
from clif.exit_report import ReportedExit, last_words
from clif.quality.check import check_scoring
from clif.rank.dry_run import plan_lines
from clif.rank.preflight import (
    check_access,
    check_dtype,
    check_gpu,
    check_model,
    check_room,
    cpu_flags,
    device_of,
    prove,
    room_of,
)
from clif.storage.api_keys import hash_variable

log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
OVERRIDE_HELP = "any fields as section.key=value, e.g. load.rate_rps=3 (docs/configuration.md)"
CONFIG_HELP = "A YAML file, or the name of one that CLIF brings, e.g. demo"
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check configuration and data, print layout, groups and memory, start nothing."),
]
# deepspeed passes the local rank as an argument, in one of two spellings; torchrun in the environment.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


@app.command()
def main(
    config: Annotated[str, typer.Option(help="YAML file, or the name of one that CLIF brings, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDE_HELP)] = None,
    dry_run: DryRun = False,
    local_rank: LocalRank = None,
) -> None:
    """Serve a model and fine-tune it in the replicas' slack. Started once per rank, see docs/launching.md."""
    be_rank(_discover(local_rank), config, tuple(overrides or ()), dry_run)


def start(words: list[str], config: str | None, ranks: int | None, dry_run: bool, local_rank: int | None) -> None:
    """`clif run`: be a rank if a launcher has started this process, otherwise start all ranks on this host.

    words: the configuration, if `config` does not name it, and overrides. Raises InputError for arguments that no rank
    can use; otherwise it ends as be_rank() does, or this process becomes torchrun.
    """
    name, overrides = _named(words, config)
    hash_variable(os.environ)
    env = _discover(local_rank)
    launched = env.launcher != ALONE
    if launched and ranks is not None:
        raise InputError(f"--ranks is for a start without a launcher, and this one is of {env.launcher}: leave it out")
    if launched or dry_run:
        be_rank(env, name, overrides, dry_run, ranks)
    settings = load_config(find_config(name), overrides)
    count = ranks or settings.layout.ranks(fewest_replicas(settings))
    # Before any rank starts: every rank would meet the error, and torchrun would add a traceback.
    _check(settings, _make_layout(settings, count))
    if count == 1 or settings.engine.emulated is not None:
        be_rank(env, name, overrides, dry_run, count)
    _become_torchrun(count, ["--config", str(find_config(name)), *overrides])


def be_rank(
    env: RankEnv, config: str, overrides: tuple[str, ...], dry_run: bool, planned: int | None = None
) -> NoReturn:
    """All work of one rank. Ends by typer.Exit with its exit code.

    planned: ranks of a dry run without a launcher, or of an emulated engine; by default those of the configuration.
    """
    level = logging.INFO if env.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    log.info("%s", env)
    try:
        with last_words(env.rank):
            hash_variable(os.environ)
            settings = load_config(find_config(config), overrides)
            layout = _layout(settings, env, dry_run, planned)
            _check(settings, layout, inputs=env.rank == 0)
            code = _print(settings, layout, env) if dry_run else _run(settings, layout, env)
    except ReportedExit as reported:
        raise typer.Exit(reported.code) from reported
    raise typer.Exit(code)


def _discover(local_rank: int | None) -> RankEnv:
    """The position of this process among all. Ends by typer.Exit if it cannot be found out."""
    try:
        return discover(os.environ, local_rank, ask_mpi)
    except InputError as error:
        # The rank is unknown, so every process prints the error.
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def _named(words: list[str], config: str | None) -> tuple[str, tuple[str, ...]]:
    """The configuration's name and the overrides. Raises InputError."""
    if config is not None:
        return config, tuple(words)
    if not words or "=" in words[0]:
        raise InputError("which configuration? Write clif run demo, or clif run --config FILE.yaml")
    return words[0], tuple(words[1:])


def _become_torchrun(count: int, arguments: list[str]) -> NoReturn:
    """Replace this process by torchrun, which gets its signals and starts the ranks."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "clif.run", *arguments]
    # Safe paths as with -P, in all ranks: transformers mistakes a folder kernels/ on sys.path for Hugging Face's
    # package. Each rank sets its threads itself; without this torchrun would set them, with a warning.
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONSAFEPATH": "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environ)


def _layout(settings: Config, env: RankEnv, dry_run: bool, planned: int | None) -> Layout:
    world, emulated = env.world_size, settings.engine.emulated is not None
    if emulated and world > 1:
        raise ConfigError(f"engine.emulated is one process: start it without {env.launcher}, with clif run or serve")
    if (dry_run or emulated) and world == 1:
        # Without a launcher, a dry run shows the ranks of the configuration; one process emulates all of them.
        world = planned or settings.layout.ranks(fewest_replicas(settings))
        if world > 1 and dry_run:
            log.info("no launcher: planned for %d ranks", world)
    return _make_layout(settings, world)


def _make_layout(settings: Config, ranks: int) -> Layout:
    wanted = settings.layout
    return make_layout(ranks, wanted.tp_size, wanted.replicas, wanted.replica_gpus)


def _check(settings: Config, layout: Layout, inputs: bool = True) -> None:
    """Check the settings. inputs: also the input files, on one of all ranks."""
    check_roles(settings, layout)
    if inputs:
        check_access(settings)
        check_inputs(settings, layout)
        check_scoring(settings)
        check_model(settings, layout)


def _print(settings: Config, layout: Layout, env: RankEnv) -> int:
    device, ranks = device_of(settings), env.local_world_size if env.world_size > 1 else layout.world_size
    check_device(settings, device)
    check_dtype(settings, device)
    for line in plan_lines(settings, layout, device, room_of(settings, device, ranks), cpu_flags()):
        print(line)
    check_gpu(settings)
    print(prove(settings))
    return 0


def _run(settings: Config, layout: Layout, env: RankEnv) -> int:
    if settings.engine.emulated is not None:
        from clif.emulated.start import run_emulated

        return run_emulated(settings, layout)
    if env.local_rank == 0:
        check_room(settings, layout, env.local_world_size)
    # Otherwise every rank would draw its own progress bar over the run's status.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported late, so that --help and wrong input need neither torch nor seconds.
    from clif.rank.worker import run_rank

    return run_rank(settings, env)


if __name__ == "__main__":
    # As with -P: in a checkout, transformers would mistake kernels/ of the working folder for Hugging Face's package.
    if not sys.flags.safe_path:
        sys.path.pop(0)
    app()
