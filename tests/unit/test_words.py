"""CLIF speaks the field's words: a word that was given up for one of them is found nowhere again."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CODE = ("clif", "kernels", "launch", "benchmarks", "tests")
TEXTS = (*CODE, "docs", "configs", "README.md", "CONTRIBUTING.md", "Makefile")
ENGINE = ("clif/engine", "clif/replica", "clif/training", "clif/rank", "clif/llm.py")
CONTROL = ("clif/control", "clif/wire")
PROGRAM = ("clif", "kernels", "launch", "benchmarks")
MODELS = ("clif/models", "clif/adapters", "kernels")
EXEMPT = ("tests/unit/test_words.py", "clif/config/renamed.py")
"""They name the old words to refuse them."""

ANYWHERE = {
    "AtOnce": "max_batch_tokens",
    "begin_anew": "rebuild",
    "beside_slice_ms": "concurrent_slice_ms",
    "bury_unreachable": "fail_unreachable",
    "check_make": "a name that says what is checked",
    "check_shares": "check_divisible",
    "EnginePace": "max_batch_tokens",
    "even_span": "even_shard",
    "frozen_linear": "prepacked_linear",
    "give_back": "free",
    "hearsay": "ignored",
    "is_packed": "is_gguf",
    "kv_span": "unit_shard",
    "launch_store": "job_store",
    "layer_spans": "layer_shards",
    "load_packed": "load_gguf",
    "LOOK_UP": "POLL_PERIOD",
    "may_ride": "can_fuse",
    "meet_again": "rebuild_group",
    "on_birth": "on_built",
    "pack_weights": "prepack_weights",
    "pass_tokens": "max_batch_tokens",
    "patience_s": "poll_timeout_s",
    "reborn": "incarnation",
    "ROLL_CALL_S": "FAILURE_SPREAD_S",
    "saying_goodbye": "awaiting_goodbye",
    "sent_away": "ignored",
    "serve_samples": "serve_timings",
    "share_inbox": "broadcast_messages",
    "SlowLoop": "PolicyLoop",
    "sum_": "all_reduce_",
    "tokens_of": "Request.max_total_tokens",
    "TURN_BYTES": "RECEIVE_BYTES",
    "TURN_MESSAGES": "RECEIVE_MESSAGES",
    "TURN_S": "RECEIVE_S",
    "TURN_STRANGERS": "RECEIVE_STRANGERS",
    "TurnRecord": "StepRecord",
    "UnderWay": "PendingCollective",
}
"""A word that is no English, in any text, to the standard term. A leading underscore does not matter."""

IDENTIFIERS = {
    "answer": ("output_ids", ("clif/engine/scheduler.py",)),
    "birth": ("incarnation", CODE),
    "births": ("incarnations", CODE),
    "computed": ("num_computed_tokens", ENGINE),
    "Cut": ("ShardSpec", CODE),
    "drawn": ("random", MODELS),
    "ending": ("shutdown_policy", CODE),
    "Ending": ("ShutdownPolicy", CODE),
    "every": ("all_true", ("clif/distributed",)),
    "FusedLinear": ("DualLoraLinear", CODE),
    "grow": ("allocate", ("clif/engine",)),
    "high": ("upper_bound", ("clif/engine",)),
    "joined": ("rounds_joined", ("clif/control/policy",)),
    "Launcher": ("KernelLauncher", CODE),
    "leaders": ("broadcast_ints", ("clif/distributed", "clif/models")),
    "leaving": ("signals", CODE),
    "Leaving": ("SignalWatcher", CODE),
    "life": ("incarnation", PROGRAM),
    "lives": ("supervisor", PROGRAM),
    "Lives": ("ReplicaSupervisor", CODE),
    "longest": ("max_total_tokens", ("clif/engine/scheduler.py", "clif/control/policy")),
    "lose": ("requeue, mark_failed or request_restart", PROGRAM),
    "Losses": ("FailureHandler", CODE),
    "Member": ("Projection", MODELS),
    "Pace": ("max_batch_tokens", CODE),
    "Packed": ("MergedLinear", MODELS),
    "part_of": ("shard_of", CODE),
    "Part": ("SubBatch", (*ENGINE, *MODELS)),
    "peers": ("tp_group, or data_parallel_ranks()", CODE),
    "Peers": ("TpGroup", CODE),
    "pending": ("num_uncomputed_tokens", ("clif/engine",)),
    "place": ("slot, capacity, path or index", PROGRAM),
    "places": ("slots, capacities, paths or indices", PROGRAM),
    "Price": ("CostModel", CODE),
    "priced": ("latency_known", CONTROL),
    "readers": ("ref_count", ("clif/engine",)),
    "rider": ("fused_pass", CODE),
    "riding": ("fused", CODE),
    "Roll": ("GroupMembers", CODE),
    "roll": ("group_members", ("clif/distributed", "clif/training")),
    "Rows": ("LoraRows", (*ENGINE, *MODELS)),
    "samples": ("needs_sampling, serve_timings or noise_scale", ("clif/engine/scheduler.py", "clif/wire")),
    "share": ("acquire_cached", ("clif/engine/blocks.py", "clif/engine/scheduler.py")),
    "Shape": ("LaunchShape", ("kernels",)),
    "sidecar": ("train_thread", CODE),
    "Sidecar": ("TrainThread", CODE),
    "signal": ("drain_reason", ("clif/control/policy",)),
    "Span": ("Shard", CODE),
    "speaks": ("on_message_from_failed", CODE),
    "Split": ("shard_dim", CODE),
    "Table": ("TileTable", ("kernels",)),
    "tell": ("send", CODE),
    "_tell": ("what it does", CODE),
    "tick": ("step", CODE),
    "told": ("what it holds", CODE),
    "turn": ("step", (*ENGINE, *CONTROL)),
    "turns": ("steps", (*ENGINE, *CONTROL)),
}
"""A word that English, or another part of the house, needs as well: where it is no name in Python, and the term."""

FILES = {
    "decode_table": "paged_decode_table", "drawn": "random_init", "ending": "shutdown", "fused": "dual_lora_host",
    "launcher": "round_admission", "launchers": "launch_env", "leaving": "signals", "lives": "supervisor",
    "losses": "failures", "ops": "backends", "paged": "paged_decode_host", "parts": "sharded_build", "plan": "dry_run",
    "price": "cost_model", "refusals": "messages", "section": "base", "shape": "spec", "sliced": "safetensors_shard",
    "slow": "policy_loop", "starts": "rendezvous", "status": "progress", "text": "tokenizer", "unpacked": "gguf",
}  # fmt: skip
"""Stem of a module that hid its thing to the stem that names it."""
PERSONS = re.compile(r"\b(nobody|somebody|anybody|everybody|whoever|whom|anew)\b", re.IGNORECASE)


def files(places: tuple[str, ...], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for name in places:
        path = REPO / name
        for found in [path] if path.is_file() else sorted(path.rglob("*")):
            if found.is_file() and found.suffix in suffixes and found.relative_to(REPO).as_posix() not in EXEMPT:
                yield found


@cache
def identifiers(path: Path) -> tuple[tuple[str, int], ...]:
    """Names in a module, with their lines; those within the braces of an f-string, too."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            found.append((token.string, token.start[0]))
        elif token.type == tokenize.STRING and "f" in token.string.split(token.string[-1])[0].lower():
            for inside in re.findall(r"\{([^{}]*)\}", token.string):
                found += [(name, token.start[0]) for name in re.findall(r"\w+", inside)]
    return tuple(found)


def test_no_text_holds_a_word_that_was_given_up():
    pattern = re.compile(rf"(?<![A-Za-z0-9_])_?({'|'.join(map(re.escape, ANYWHERE))})(?![A-Za-z0-9_])")
    wrong = [
        f"{path.relative_to(REPO)}:{number}: {word}: write {ANYWHERE[word]}"
        for path in files(TEXTS, (".py", ".md", ".yaml", ".sh", ".sbatch", ""))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in pattern.findall(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_name_in_python_is_a_word_that_was_given_up():
    wrong = []
    for path in files(CODE, (".py",)):
        where = path.relative_to(REPO).as_posix()
        for name, line in identifiers(path):
            term, scope = IDENTIFIERS.get(name, ("", ()))
            if where.startswith(scope):
                wrong.append(f"{where}:{line}: {name}: write {term}")
    assert not wrong, "\n".join(wrong)


def test_no_module_has_a_name_that_hid_its_thing():
    wrong = [
        f"{path.relative_to(REPO)}: name it as {FILES[path.stem]}"
        for path in files(("clif", "kernels", "launch"), (".py",))
        if path.stem in FILES and path.parent.name != "coserving"
    ]
    assert not wrong, "\n".join(wrong)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Comments and docstrings of a module, with the line in which each begins; not the sentences that it shows."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_comments_and_docstrings_speak_of_things_and_not_of_persons():
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {word}: name the thing that does or does not, as in CONTRIBUTING.md"
        for path in files(PROGRAM, (".py",))
        for line, text in prose(path)
        for word in PERSONS.findall(text)
    ]
    assert not wrong, "\n".join(wrong)
