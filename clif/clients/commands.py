"""The commands of the clients. What they need is imported when they run."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from clif.errors import InputError

LOCAL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Argument(metavar="URL", help="An OpenAI server; /v1 may be left out.")]
Model = Annotated[str | None, typer.Option(help="Model; by default clif, or the server's first.")]
Key = Annotated[str | None, typer.Option(help="API key; by default that of the variable CLIF_API_KEY.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws arrivals and prompts.")]


def chat(
    url: Url = LOCAL,
    model: Model = None,
    key: Key = None,
    system: Annotated[str | None, typer.Option(help="Message of the system.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
) -> None:
    """Talk to a model in the terminal, or answer the lines that are piped into it."""
    from clif.clients.chat import Chat, Terminal
    from clif.clients.endpoint import Endpoint

    endpoint = Endpoint.of(url, key)
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    Terminal(Chat(endpoint, endpoint.choose_model(model), system, options)).run()


def loadtest(
    url: Url = LOCAL,
    model: Model = None,
    key: Key = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, Poisson; by default 1.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Arrivals and lengths of a recorded trace instead.")] = None,
    trace_format: Annotated[str, typer.Option(help="azure, burstgpt or mooncake.")] = "azure",
    speed: Annotated[float, typer.Option(help="2 replays a trace twice as fast.")] = 1.0,
    duration: Annotated[float | None, typer.Option(help="Length of the load, seconds; by default 60.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Most requests.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines of messages, prompt or instruction.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Words of a generated prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 128,
    ignore_eos: Annotated[bool, typer.Option(help="Answer to the full length; not every server can.")] = False,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests open at a time.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Promise for the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Promise for each further token, mean of an answer.")] = None,
    timeout: Annotated[float, typer.Option(help="An answer without a byte for so long is given up, seconds.")] = 300.0,
    seed: Seed = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Send an open load to a server: latencies count from the planned times; goodput and attainment of a promise."""
    from clif.clients.endpoint import Endpoint
    from clif.clients.load_figures import Promise, figures, print_figures
    from clif.clients.load_plan import Workload, arrivals_config
    from clif.clients.load_run import LoadTest, run_load_test
    from clif.storage.files import allow_connections

    if json_out is not None:
        check_writable(json_out)
    if rate is not None and trace is not None:
        raise InputError("--rate and --trace both give the arrivals: leave one of them out")
    replay = None if trace is None else {"path": trace, "format": trace_format, "speed": speed, "lengths": "trace"}
    arrivals = arrivals_config(rate, duration, requests, replay)
    plan = Workload(arrivals, prompts, prompt_tokens, max_tokens, seed).plan()
    endpoint = Endpoint.of(url, key)
    chosen = endpoint.choose_model(model)
    allow_connections()
    options: dict[str, object] = {"ignore_eos": True} if ignore_eos else {}
    test = LoadTest(endpoint, chosen, options, concurrency, timeout)
    result = figures(run_load_test(test, plan), Promise(ttft_ms, tpot_ms))
    print_figures(result)
    if json_out is not None:
        json_out.write_text(json.dumps(_with_provenance(result, endpoint.url, chosen, len(plan)), indent=2) + "\n")


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines of rows with their answers; by default what the run's quality is measured on."),
    ] = None,
    version: Annotated[
        list[int] | None,
        typer.Option(
            help="Stored version, may be repeated; 0: the base model. By default the base and the active one."
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Names with commas, e.g. loss,exact_match,chrf; by default the run's quality.metrics."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the rows to score; by default test, or all rows if none has it.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Most rows, drawn by --seed.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, tokens; by default the run's quality.max_tokens.")
    ] = None,
    weight_dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Type of the base's weights, several with commas: auto (as the model is), int8, int4, see "
            "model.weight_dtype; by default the run's."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A server of the run; by default the model is loaded here.")] = None,
    key: Key = None,
    test_command: Annotated[
        str | None, typer.Option(help="Command that may run tests of answers, as quality.test_command.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws --rows, and the intervals.")] = 0,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="File for all figures; by default eval.json in RUN.")
    ] = None,
) -> None:
    """Score stored adapter versions of a run, on its held-out rows or on a file: a table version by version, and JSON.

    clif eval RUN --weight-dtype auto,int8,int4 shows what a quantised base costs in quality.
    """
    from clif.clients.endpoint import Endpoint
    from clif.clients.eval_answers import ServerAnswers, by_weights
    from clif.clients.evaluate import (
        Evaluation,
        choose_metrics,
        choose_rows,
        choose_versions,
        choose_weights,
        read_run,
        with_test_command,
    )

    config, path = read_run(run), json_out or run / "eval.json"
    check_writable(path)
    if url is not None and weight_dtype:
        raise InputError("a server has loaded its weights: leave out --weight-dtype or --url")
    kinds = choose_weights(weight_dtype or [], config)
    if test_command is not None:
        config = with_test_command(config, test_command)
    chosen = choose_metrics(metrics or config.quality.metrics)
    chosen_rows, longest = choose_rows(data, config, split, rows, seed), max_tokens or config.quality.max_tokens
    evaluation = Evaluation(config, chosen_rows, choose_versions(run, version or []), chosen, seed, longest)
    evaluation.check()
    if url is not None:
        result = evaluation.run([ServerAnswers(run, config, Endpoint.of(url, key), longest)])
    else:
        _show_log()
        result = evaluation.run(by_weights(run, config, kinds, evaluation.versions, longest))
    _print_evaluation(result, str(path))
    asked = {"run": str(run), "data": str(data or config.data.path), "max_tokens": longest, "url": url}
    counted = len(chosen_rows) - len(result["left_out"])
    path.write_text(json.dumps({**asked, "rows": counted, **_provenance(), **result}, indent=2) + "\n")
    typer.echo(f"written: {path}")


def check_writable(path: Path) -> None:
    """Raises InputError if a file cannot be written there: seen before the work whose result it holds."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written, {path.parent} is no folder: make it, or name another one")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path} may not be written by you: name another file with --json")


def _show_log() -> None:
    """What the library says of kernels and quantised weights."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def _print_evaluation(result: dict[str, Any], file: str) -> None:
    from rich.console import Console

    from clif.metrics.summary_print import print_quality

    shown = dict(result)
    if len({line.get("weights") for line in result["versions"]}) > 1:
        # What weights cost is read from all rows: a class or client has too few.
        shown["groups"] = []
    print_quality(shown, Console(highlight=False), f"groups in {file}")
    if result["left_out"]:
        typer.echo(f"rows left out: {len(result['left_out'])}; {result['left_out'][0]}")


def _with_provenance(result: dict[str, object], url: str, model: str, planned: int) -> dict[str, object]:
    """The figures, and what made them: versions, command and machine."""
    return {"url": url, "model": model, "planned": planned, **_provenance(), "figures": result}


def _provenance() -> dict[str, object]:
    import datetime

    from clif.metrics.provenance import provenance

    made = {name: value for name, value in provenance().items() if value != "" and name not in ("config", "engine")}
    return {"ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "provenance": made}
