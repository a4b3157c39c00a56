"""Every table and column of a run's metrics, declared as data. Free of torch.

A table is one chunked, resizable compound data set: a row is written whole or not at all, one write per table and
flush keeps the serving loop cheap, and `file["requests"]["ttft_s"]` reads a column. Text has a fixed width: text of
variable width lies in a heap of its own, which a killed process may leave out of step with its rows. Longer text is
cut and ends in "...". Process files are never compressed, because a chunk that changes its size moves, and a kill
could then take rows that were flushed long ago; run.h5 is compressed. Each chunk has a checksum, which does not change
its size (see checked.py).

All stamps, `t` included, are seconds since the start of the writing process's file on that process's monotonic clock.
Never subtract stamps of different files. Rows that a kill left unwritten have `t` = NaN, the fill value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import h5py
import numpy as np

Kind = Literal["f8", "i8", "i1", "bool", "text"]
REQUIRED: Any = object()
"""Default of a column that every row must give."""

STATE, SHORT, NAME, REASON, MEMBERS = 16, 32, 64, 240, 4096
CHUNK_BYTES = 32768


@dataclass(frozen=True)
class Column:
    """One column. width: bytes of text. A row may leave out a column whose default is not REQUIRED."""

    name: str
    kind: Kind
    unit: str
    doc: str
    default: Any = REQUIRED
    width: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in memory and on disk."""
        return np.dtype(f"S{self.width}") if self.kind == "text" else np.dtype(self.kind)

    @property
    def fill(self) -> Any:
        """What stands for an unknown value: the default, or NaN, -1, False, empty text."""
        unknown = {"f8": float("nan"), "i8": -1, "i1": -1, "bool": False, "text": b""}[self.kind]
        if self.default is REQUIRED:
            return unknown
        return self.default.encode() if isinstance(self.default, str) else self.default


@dataclass(frozen=True)
class Table:
    """A named list of columns. columns: after `t`, which every table has."""

    name: str
    doc: str
    columns: tuple[Column, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Compound type of a row."""
        return np.dtype([(column.name, column.dtype) for column in self.columns])

    @property
    def fill(self) -> Any:
        """The row that stands for "never written"."""
        row = np.array([tuple(column.fill for column in self.columns)], dtype=self.dtype)
        row["t"] = np.nan
        return row[0]


def create(parent: h5py.Group, table: Table, **options: Any) -> h5py.Dataset:
    """Make the empty data set of a table, with doc and units as attributes; options go to create_dataset."""
    dtype = table.dtype
    chunk = max(8, CHUNK_BYTES // dtype.itemsize)
    data = parent.create_dataset(
        table.name,
        shape=(0,),
        maxshape=(None,),
        dtype=dtype,
        chunks=(chunk,),
        fillvalue=table.fill,
        fletcher32=True,
        **options,
    )
    data.attrs["doc"] = table.doc
    for column in table.columns:
        data.attrs[f"unit.{column.name}"] = column.unit
        data.attrs[f"doc.{column.name}"] = column.doc
    return data


def _f(name: str, unit: str, doc: str, default: Any = REQUIRED) -> Column:
    return Column(name, "f8", unit, doc, default)


def _i(name: str, unit: str, doc: str, default: Any = REQUIRED) -> Column:
    return Column(name, "i8", unit, doc, default)


def _s(name: str, doc: str, width: int = REASON, default: Any = REQUIRED) -> Column:
    return Column(name, "text", "", doc, default, width)


def _table(name: str, doc: str, *columns: Column) -> Table:
    return Table(name, doc, (_f("t", "s", "when the row was written", None), *columns))


NAN = float("nan")
_REPLICA = _i("replica", "", "replica id; -1: none", -1)
_VERSION = _i("version", "", "adapter version; 0 is the base model, -1: none", -1)

_CONTROL = (
    _table(
        "requests",
        "One row per terminal event of a request.",
        _i("id", "", "request id"),
        _s("purpose", "user or probe", STATE),
        _REPLICA,
        _VERSION,
        _i("prompt_tokens", "tokens", "length of the prompt"),
        _i("output_tokens", "tokens", "tokens answered"),
        _f("arrival_s", "s", "stamp of arrival"),
        _f("dispatched_s", "s", "stamp of the last dispatch to a replica", NAN),
        _f("first_token_s", "s", "stamp of the first token", NAN),
        _f("finished_s", "s", "stamp of the terminal event"),
        _f("ttft_s", "s", "arrival to first token", NAN),
        _f("tpot_s", "s/token", "mean time per token after the first", NAN),
        _f("max_itl_s", "s", "longest gap between two tokens", NAN),
        _f("e2e_s", "s", "arrival to terminal event", NAN),
        _s("finish", "stop, length, cancelled, rejected or failed", STATE),
        _s("detail", "why it did not end by itself", default=""),
        Column("slo_met", "bool", "", "all promises of its SLO were kept"),
        Column("exact_match", "i1", "", "1: the answer equals the reference, 0: not, -1: unknown", -1),
    ),
    _table(
        "gaps",
        "Every gap between two tokens of a user's request.",
        _i("request", "", "request id"),
        _f("itl_s", "s", "inter-token latency"),
    ),
    _table(
        "dispatches",
        "Each decision where to send a request.",
        _i("request", "", "request id"),
        _REPLICA,
        _f("predicted_s", "s", "predicted time to finish", NAN),
        _s("reason", "why this replica"),
    ),
    _table(
        "transitions",
        "State changes of replicas; the first row of a replica has from_state = to_state.",
        _i("replica", "", "replica id"),
        _s("from_state", "serving, idle, combined or failed", STATE),
        _s("to_state", "serving, idle, combined or failed", STATE),
        _s("reason", "why"),
    ),
    _table(
        "rounds",
        "One row per federated round, at its end.",
        _i("round_id", "", "round number"),
        _s("state", "committed or discarded", STATE),
        _s("members", "replica ids, separated by commas", MEMBERS),
        _VERSION,
        _i("samples", "samples", "trained by all members", 0),
        _i("tokens", "tokens", "trained by all members, prompts included", 0),
        _i("steps", "steps", "optimizer steps of all members", 0),
        _f("train_loss", "nat/token", "mean training loss over all answer tokens of all members' steps", NAN),
        _f("heldout_candidate", "nat/token", "held-out loss of the candidate", NAN),
        _f("heldout_active", "nat/token", "held-out loss of the active adapter", NAN),
        _f("outer_step", "1", "share of the way to the average at which the candidate was judged", NAN),
        _f("product_error", "1", "relative error of averaging A and B separately", NAN),
        _f("noise_scale", "samples", "gradient noise scale", NAN),
        _f("started_s", "s", "stamp: members admitted"),
        _f("trained_s", "s", "stamp: local steps done", NAN),
        _f("aggregated_s", "s", "stamp: average and votes in", NAN),
        _f("ended_s", "s", "stamp: committed or discarded"),
        _i("running_requests", "", "requests that ran at the moment of promotion", 0),
        _s("reason", "why it was committed or discarded"),
        _s("gave_up", "why no further round was tried after this one; empty: further ones could be", default=""),
    ),
    _table(
        "load",
        "One row per request of the load generator, when it is submitted.",
        _i("request", "", "request id"),
        _f("at_s", "s", "planned time of submission after the start of the load"),
        _i("prompt_tokens", "tokens", "length of the prompt"),
        _i("max_tokens", "tokens", "longest answer allowed"),
    ),
    _table(
        "pressure",
        "Service pressure, at each change.",
        _s("level", "low, medium or high", STATE),
        _f("attainment", "1", "share of recent requests that met their SLO", NAN),
        _i("backlog", "", "requests that wait", 0),
        _s("reason", "why"),
    ),
    _table(
        "adapters",
        "Adapter versions, when they are stored.",
        _i("version", "", "adapter version"),
        _i("round_id", "", "the round that made it; 0: none, it was loaded from a folder"),
        _f("heldout_loss", "nat/token", "its held-out loss", NAN),
        _s("adapter", "name of the adapter that it belongs to", NAME, default="clif"),
        _i("parent", "", "the version that its training began from; 0: the base model", 0),
        _s("job", "the job whose rounds trained it; empty: the run's own data", NAME, default=""),
    ),
    _table(
        "batches",
        "Batch sizes chosen by the coordinator.",
        _i("replica", "", "replica id"),
        _i("max_batch", "", "running requests at most"),
        _i("micro_batch", "samples", "training samples in one forward"),
        _s("reason", "why"),
    ),
    _table(
        "quality",
        "Quality of the served adapter before and after the run; unknown figures are NaN.",
        _s("phase", "before or after", STATE),
        _f("heldout_loss", "nat/token", "held-out loss per answer token", NAN),
        _i("heldout_tokens", "tokens", "answer tokens it was measured on", 0),
        _f("exact_match", "1", "share of answers equal to the reference", NAN),
        _i("exact_match_rows", "", "answers it was measured on", 0),
        _VERSION,
    ),
    _table(
        "scores",
        "Metrics of answers to held-out rows (quality.metrics) by adapter version: of all, of a class, of a client.",
        _s("phase", "before or after the run's load", STATE),
        _VERSION,
        _s("metric", "its name in quality.metrics", SHORT),
        _s("group", "all, class or client", STATE),
        _s("name", "the class or the client; empty: all answers", NAME, default=""),
        _f("value", "", "bleu, chrf, rouge, codebleu: 0 to 100; loss: nat/token; perplexity; otherwise a share"),
        _f("low", "", "lower end of the 95 % interval; NaN: none is known", NAN),
        _f("high", "", "its upper end", NAN),
        _i("count", "", "answers that counted; for loss and perplexity their tokens", 0),
    ),
)

_RANK = (
    _table(
        "ticks",
        "Steps of the engine that did work.",
        _i("step", "", "number of the step"),
        _f("seconds", "s", "time of the serving iteration; 0: nothing was served"),
        _i("decode_rows", "tokens", "requests that got a token"),
        _i("prefill_tokens", "tokens", "prompt tokens computed"),
        _i("running", "", "running requests"),
        _i("waiting", "", "waiting requests"),
        _i("kv_used", "tokens", "KV cache in use"),
        _s("train_kind", "slice of training work in this step; empty: none", SHORT, ""),
        _f("train_s", "s", "time of that work", 0.0),
        _s("regime", "alone; fused: with a training forward; concurrent: beside a slice", SHORT, ""),
        _i("preemptions", "", "preemptions so far", 0),
        _i("reused_tokens", "tokens", "prompt tokens found in the prefix cache so far", 0),
        _f("slack_s", "s", "time left for training; inf: no request waits; NaN: no training beside serving", NAN),
        _s("slack_limit", "what limits slack_s; empty: no training beside serving", SHORT, ""),
        _i("slack_request", "", "the request that limits slack_s; -1: none", -1),
    ),
    _table(
        "train_steps",
        "Optimizer steps; written by the leader of a replica only.",
        _i("step", "", "number of the step in this process"),
        _i("round_id", "", "round number"),
        _i("samples", "samples", "samples in the step"),
        _i("tokens", "tokens", "tokens in the step, prompts included"),
        _f("loss", "nat/token", "mean training loss over the answer tokens of the step"),
        _f("grad_norm", "1", "gradient norm before clipping", NAN),
        _f("lr", "1", "learning rate"),
        _f("seconds", "s", "training work, without the serving in between"),
        _f("noise_scale", "samples", "gradient noise scale", NAN),
    ),
    _table(
        "versions",
        "Switches of the active adapter.",
        _i("version", "", "adapter version"),
        _i("round_id", "", "the round it came from; -1: none", -1),
        _i("step", "", "first step in which new requests got it"),
        _i("slot", "", "adapter slot"),
    ),
    _table(
        "device",
        "Samples of the process and of its GPU; NaN where there is none.",
        _f("cpu_percent", "%", "CPU time of this process since the last sample; 100 is one core", NAN),
        _f("rss_bytes", "B", "resident memory of this process", NAN),
        _f("gpu_util", "%", "share of time in which the GPU ran a kernel", NAN),
        _f("gpu_mem_bytes", "B", "memory in use on the GPU, all processes", NAN),
        _f("gpu_power_w", "W", "power of the GPU", NAN),
    ),
)

CONTROL_TABLES = tuple(table.name for table in _CONTROL)
"""Tables of control.h5."""
RANK_TABLES = tuple(table.name for table in _RANK)
"""Tables of rank-00000.h5 and so on."""
TABLES: dict[str, Table] = {table.name: table for table in (*_CONTROL, *_RANK)}
