"""`clif status` and `clif admin`: a run is shown and steered, by its server's URL or by its folder."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from clif.clients.operation import Server

Target = Annotated[str, typer.Argument(metavar="RUN-OR-URL", help="Folder of a run, or URL of its server.")]
Key = Annotated[str | None, typer.Option(help="An admin's key; by default that of the variable CLIF_API_KEY.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Why = Annotated[str, typer.Option("--reason", help="Shown wherever it has an effect.")]
Number = Annotated[int, typer.Argument(min=0, help="Number of the version; 0 is the base.")]
Replica = Annotated[int, typer.Argument(min=0, help="Number of the replica.")]
Adapter = Annotated[str, typer.Option(help="Name of the adapter.")]


class Anywhere(TyperGroup):
    """Takes the options of all commands behind a command's name, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first, rest, words = [], [], iter(args)
        for word in words:
            if word == "--json" or word.startswith("--key="):
                first.append(word)
            elif word == "--key":
                first += [word, *islice(words, 1)]
            else:
                rest.append(word)
        return super().parse_args(ctx, [*first, *rest])


app = typer.Typer(cls=Anywhere, no_args_is_help=True, help="Steer a run: training, replicas and adapter versions.")


def status(target: Target, key: Key = None, as_json: AsJson = False) -> None:
    """Show a run: from its folder on any host that sees it, also once it is over, or from its server."""
    from clif.clients.operation import status_of
    from clif.clients.status_print import print_status

    found = status_of(target, key)
    if as_json:
        typer.echo(json.dumps({"note": found.note, **found.body}, indent=2))
    else:
        print_status(found)


class Operator:
    """The server that is steered, and how its answers are printed."""

    def __init__(self, server: Server, as_json: bool) -> None:
        self.server, self._as_json = server, as_json

    def do(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        self.show("", self.server.ask(method, path, body))

    def show(self, kind: str, answer: Any) -> None:
        """kind: of a status the part to print; empty: what an action answered."""
        from rich.console import Console

        from clif.clients.status_print import PRINTED, print_answer

        if self._as_json:
            typer.echo(json.dumps(answer, indent=2))
        else:
            PRINTED.get(kind, print_answer)(answer, Console(highlight=False, soft_wrap=True))

    def part(self, kind: str, *names: str) -> None:
        body = self.server.status().body
        self.show(kind, {name: body[name] for name in names} if self._as_json else body)


@app.callback()
def _server(context: typer.Context, target: Target, key: Key = None, as_json: AsJson = False) -> None:
    from clif.clients.operation import Server

    context.obj = Operator(Server.of(target, key), as_json)


@app.command()
def states(context: typer.Context) -> None:
    """Replicas: states, load, versions and what limits their training."""
    context.obj.part("states", "states", "replicas", "replica_count", "drained_count")


@app.command()
def rounds(context: typer.Context) -> None:
    """The latest rounds, with their outcome and the reason."""
    context.obj.part("rounds", "training", "rounds")


@app.command()
def jobs(context: typer.Context) -> None:
    """The newest training jobs."""
    context.obj.part("jobs", "jobs")


@app.command()
def events(context: typer.Context) -> None:
    """The latest events: states, pressure, rounds, versions, and what operators did."""
    context.obj.part("events", "events")


@app.command()
def config(context: typer.Context) -> None:
    """The configuration as run, as JSON."""
    typer.echo(json.dumps(context.obj.server.ask("GET", "/config"), indent=2))


@app.command()
def pause(context: typer.Context, reason: Why = "") -> None:
    """Let no round begin until training is resumed; the one under way goes on to its end."""
    context.obj.do("POST", "/training/pause", {"reason": reason})


@app.command()
def resume(context: typer.Context) -> None:
    """Let rounds begin again."""
    context.obj.do("POST", "/training/resume")


@app.command()
def drain(context: typer.Context, replica: Replica, reason: Why = "") -> None:
    """Send a replica no new request and let it join no round; what it has begun goes on."""
    context.obj.do("POST", f"/replicas/{replica}/drain", {"reason": reason})


@app.command()
def undrain(context: typer.Context, replica: Replica) -> None:
    """Let requests and rounds use a replica again."""
    context.obj.do("POST", f"/replicas/{replica}/undrain")


@app.command()
def versions(context: typer.Context) -> None:
    """All adapter versions, newest first; which are active, pinned and kept; the canary."""
    context.obj.do("GET", "/versions")


@app.command()
def activate(context: typer.Context, version: Number, adapter: Adapter = "clif") -> None:
    """Make a stored version the active one of its adapter: roll back, or forward again."""
    context.obj.do("POST", "/versions/active", {"version": version, "adapter": adapter})


@app.command()
def canary(
    context: typer.Context,
    version: Annotated[int | None, typer.Argument(min=1, help="Number of the version.")] = None,
    share: Annotated[float | None, typer.Argument(min=0, max=1, help="Of the requests to clif.")] = None,
) -> None:
    """Let a version answer a share of the requests; without arguments: end it."""
    if version is None or share is None:
        context.obj.do("DELETE", "/versions/canary")
    else:
        context.obj.do("PUT", "/versions/canary", {"version": version, "share": share})


@app.command()
def pin(context: typer.Context, version: Number) -> None:
    """Keep a version until it is unpinned."""
    context.obj.do("POST", f"/versions/{version}/pin")


@app.command()
def unpin(context: typer.Context, version: Number) -> None:
    """Keep a version only while it is active, the canary, or among the newest."""
    context.obj.do("POST", f"/versions/{version}/unpin")


@app.command()
def load(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="PEFT folder below serve.adapter_root, on the server's host.")],
    adapter: Adapter = "clif",
) -> None:
    """Make a version from a PEFT folder. The first one of a new adapter answers at once."""
    context.obj.do("POST", "/adapters", {"path": path, "adapter": adapter})


@app.command()
def export(
    context: typer.Context,
    version: Number,
    path: Annotated[str, typer.Argument(help="New folder below serve.adapter_root, on the server's host.")],
) -> None:
    """Copy a version to a folder, in PEFT's format."""
    context.obj.do("POST", f"/versions/{version}/export", {"path": path})


@app.command()
def retire(context: typer.Context, adapter: Annotated[str, typer.Argument(help="Name of the adapter.")]) -> None:
    """Give up an adapter and its name; its versions stay stored."""
    context.obj.do("DELETE", f"/adapters/{adapter}")
