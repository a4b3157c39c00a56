#!/usr/bin/env python3
"""Start one rank: torchrun --standalone --nproc-per-node N launch/run.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clif.config import Config, load_config
from clif.config.relevance import check_device
from clif.data.check import check_inputs
from clif.distributed.launch_env import RankEnv, discover
from clif.distributed.layout import Layout, make_layout
from clif.distributed.mpi import ask_mpi
from clif.distributed.roles import check_roles, fewest_replicas
from clif.errors import InputError
from clif.exit_report import Over, last_words
from clif.rank.dry_run import plan_lines
from clif.rank.preflight import check_gpu, check_model, check_room, device_of, prove, room_of

log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# deepspeed names the local rank by argument, in one of two spellings; torchrun by environment.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. load.rate_rps=3")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check configuration and data, print layout, groups and memory, start nothing."),
    ] = False,
    local_rank: LocalRank = None,
) -> None:
    """Serve a model and fine-tune it in the replicas' slack. Started once per rank, see docs/launching.md."""
    try:
        env = discover(os.environ, local_rank, ask_mpi)
    except InputError as error:
        # Which rank this is, is what could not be found out: each says so.
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    level = logging.INFO if env.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    log.info("%s", env)
    try:
        with last_words(env.rank):
            settings = load_config(config, tuple(overrides or ()))
            layout = _layout(settings, env, dry_run)
            check_roles(settings, layout)
            if env.rank == 0:
                check_inputs(settings, layout)
                check_model(settings, layout)
            code = _print(settings, layout, env) if dry_run else _run(settings, layout, env)
    except Over as over:
        raise typer.Exit(over.code) from over
    raise typer.Exit(code)


def _layout(settings: Config, env: RankEnv, dry_run: bool) -> Layout:
    wanted = settings.layout
    world = env.world_size
    if dry_run and world == 1:
        # Without a launcher, a dry run shows what the configuration asks for.
        world = wanted.ranks(fewest_replicas(settings))
        if world > 1:
            log.info("no launcher: planned for %d ranks", world)
    return make_layout(world, wanted.tp_size, wanted.replicas, wanted.replica_gpus)


def _print(settings: Config, layout: Layout, env: RankEnv) -> int:
    device, ranks = device_of(settings), env.local_world_size if env.world_size > 1 else layout.world_size
    check_device(settings, device)
    for line in plan_lines(settings, layout, device, room_of(settings, device, ranks)):
        print(line)
    check_gpu(settings)
    print(prove(settings))
    return 0


def _run(settings: Config, layout: Layout, env: RankEnv) -> int:
    if env.local_rank == 0:
        check_room(settings, layout, env.local_world_size)
    # Every rank would draw its own bar over the run's status.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Late, so that --help and wrong input need neither torch nor seconds.
    from clif.rank.worker import run_rank

    return run_rank(settings, env)


if __name__ == "__main__":
    app()
