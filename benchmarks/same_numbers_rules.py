"""Data of same_numbers.py: runs, columns that must be equal, and renamings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A configuration to run. tolerance: relative, of losses and norms; 0: bit for bit, and the weights too."""

    config: str
    overrides: tuple[str, ...]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Rule:
    """The equal parts of a table in two runs.

    keys: columns that name a row. same, near: columns compared exactly, and within the tolerance of the setting.
    words: columns of which the set of values is compared. shared: rows that only one run has are left out, because a
    clock decides their keys.
    """

    table: str
    keys: str = ""
    same: str = ""
    near: str = ""
    words: str = ""
    shared: bool = False


OVERRIDES = (
    "metrics.answers=all",
    "run.status=off",
    "run.max_s=280",
    "run.linger_s=200",
    # SLOs are never at risk: pressure stays low, and no slice of training waits for a request.
    "slo.ttft_ms=60000",
    "slo.tpot_ms=60000",
    # Every replica takes part in every round.
    "federation.min_members=2",
)
ONE_THREAD = ("dist.threads_per_rank=1", "engine.coserving=interleaved", "engine.slice_ms=1000000")
"""Slices are never cut: a part of the head's rows is another product, with other rounding errors."""
ONE_SAMPLE = ("train.micro_batch=1", "train.max_micro_batch=1", "train.accumulation=4")
"""The coordinator, which uses measured times, has no choice."""
PACKED = ("train.max_micro_batch=4", "control.reference_batch=100000")
"""The configured micro-batch of 4 is best by its objective, and so little is measured that it stays."""
BUSY = (
    *ONE_SAMPLE,
    "load.rate_rps=16",
    "load.duration_s=6",
    "federation.local_steps=20",
    "control.idle_below=0.98",
    "control.serving_above=0.99",
    "control.hold_s=0.2",
)
"""Enough load beside enough training that they meet."""
SHORT_DEMO = (
    *ONE_SAMPLE,
    # auto measures which type is faster.
    "model.dtype=bfloat16",
    "load.duration_s=12",
    "load.max_tokens=32",
    "federation.local_steps=4",
    "data.heldout_rows=48",
    "quality.exact_match_rows=4",
    "quality.max_tokens=32",
    # In bfloat16 a product of other rows is another product, which chooses other tokens: one request at a time.
    "engine.max_batch=1",
    "engine.prefix_reuse=false",
)
SETTINGS = {
    "smoke": Setting("configs/smoke.yaml", (*ONE_THREAD, *PACKED)),
    "smoke-fused": Setting("configs/smoke.yaml", ("dist.threads_per_rank=1", "engine.coserving=fused", *BUSY), 1e-3),
    "smoke-concurrent": Setting(
        "configs/smoke.yaml", ("dist.threads_per_rank=2", "engine.coserving=concurrent", *BUSY), 1e-3
    ),
    "demo": Setting("configs/demo.yaml", (*ONE_THREAD, *SHORT_DEMO)),
}
USUAL = ("smoke", "demo")
"""Two runs of one commit were equal in these. For the others, in which training shares products or cores with serving,
it is not yet known how near to each other two runs of one commit are."""
RULES = (
    Rule("requests", "id", "purpose prompt_tokens detail slo_met"),
    Rule("requests", "id version", "output_tokens finish exact_match", shared=True),
    Rule("answers", "id version", "purpose finish prompt answer expected exact_match", shared=True),
    Rule("gaps", "request", shared=True),
    Rule("dispatches", "request"),
    Rule("load", "request", "at_s prompt_tokens max_tokens"),
    Rule("transitions", words="from_state to_state"),
    Rule("pressure", words="level"),
    Rule("batches", "replica", "max_batch micro_batch", shared=True),
    Rule(
        "rounds",
        "round_id",
        "state members version samples tokens steps gave_up",
        "train_loss heldout_candidate heldout_active product_error noise_scale",
    ),
    Rule("adapters", "version", "round_id", "heldout_loss"),
    Rule("scores", "phase version metric group name", "count", "value low high"),
    Rule("quality", "phase", "heldout_tokens exact_match_rows version exact_match", "heldout_loss"),
    Rule("ticks", words="regime"),
    Rule("train_steps", "rank round_id step", "samples tokens lr", "loss grad_norm noise_scale"),
    Rule("versions", "rank version", "round_id"),
    Rule("device"),
    Rule("weights", "file", "sha256"),
)
"""A rule or more for each table; names, types and units of all columns are compared besides.

"answers" is RUN/answers.jsonl, "weights" the files in RUN/adapters. A tolerance leaves weights out.
"""
RENAMED: dict[str, str] = {
    "ticks.tick": "step",
    "versions.tick": "step",
    "ticks.slack_limit:nobody": "no_request",
    "ticks.slack_limit:ride": "fuse",
    "ticks.regime:mixed": "fused",
    "ticks.regime:beside": "concurrent",
}
"""TABLE, TABLE.COLUMN or TABLE.COLUMN:WORD, all in the old names -> the new name of the last part.

Old runs are compared in the new names. Renamed configuration keys are in clif/config/renamed.py.
"""
