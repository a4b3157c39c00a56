"""Whatever is written into a configuration, it is accepted or refused in sentences: no traceback, no hang."""

from __future__ import annotations

import random
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clif.config import Config, load_config
from clif.distributed.layout import make_layout
from clif.distributed.roles import check_roles, fewest_replicas
from clif.errors import InputError

REPO = Path(__file__).resolve().parents[2]
APP = runpy.run_path(str(REPO / "launch" / "run.py"))["app"]
RUNNER = CliRunner()
VALUES = [
    "", " ", "null", "~", "true", "off", "yes", "0", "-1", "1", "2", "3.5", "1e-300", "1e300", "1e999", ".inf",
    "-.inf", ".nan", "9" * 19, "9" * 30, "9" * 5000, "-" + "9" * 40, "0x" + "f" * 40, "1_000", "2026-13-45",
    "2026-11-27", "12:30", "!!int x", "!!timestamp x", "!!bool x", "!!map [a]",
    "!!python/object/apply:os.system [x]", "[" * 100, "{a: " * 50, "[]", "{}", "[1]", "[[0]]", "[[0],[0]]",
    "[[-1]]", "[[0, 1], []]", "[a, a]", "['']", "[null]", "{a: 1}", "&a [*a]", "*a", "a: b", "- a", "| x", "'", '"',
    '"\\ud83d"', '"\\U00110000"', '"\\0"', "\x00", "\x1b[31mred", "\ud83d", "ü", "日本", "n" * 300, "n" * 5000, ".",
    "..", "/", "/abs/x", "a/b", "~root", "-x", "a b", "*", "?", "[a-z", "'[a-z'", "'(' ", "'.*'", "'(a+)+$'",
    "all-linear", "random:", "random:configs/models/tiny-llama.json", "random:/dev/null", "/dev/null", "/dev/zero",
    "/etc/passwd", "/proc/self/mem", "configs/data/words.jsonl", "configs/smoke.yaml", "configs", "clif",
    "time_slice", "split", "serve_only", "train_only", "poisson", "gamma", "trace", "constant", "none", "cuda",
    "cpu", "nccl", "float16", "client", "triton", "concurrent", "reject",
]  # fmt: skip
LINES = [
    "run:", "run: {name: x, name: y}", "? [a]\n: b", "1: 2", "null: 3", "<<: *x", "--- ", "...", "%YAML 1.1",
    "%YAML 9" + "9" * 5000 + ".1", "%TAG ! x", "\t", "# " + "x" * 3000, "model: []", "load: 5", "load: {trace: {}}",
    "load: {kind: trace, trace: {path: x}}", "extra: {deep: {deeper: {deepest: 1}}}", "@", "`", "- - - -", "!", "&",
    "*", "|\n x", ">\n x", "\ufeff", "\u2028", "\x85", "\r",
]  # fmt: skip
FIELDS = [
    f"{section}.{field}"
    for section, fields in {
        "run": "name out_dir seed max_s linger_s drain_s status rebuilds mode training_share trainers",
        "layout": "replicas tp_size replica_gpus across_hosts",
        "dist": "backend timeout_s ranks_per_gpu threads_per_rank control_host",
        "model": "path dtype weight_dtype device max_context",
        "adapter": "r lora_alpha target_modules serving_slots",
        "engine": "max_batch kv_tokens block_size coserving prepack_weights activation_mib lora_kernel",
        "slo": "ttft_ms deadline_ms margin late",
        "data": "path train_split heldout_split heldout_rows shard max_sample_tokens",
        "train": "enabled lr micro_batch max_micro_batch accumulation",
        "federation": "rounds local_steps min_members tolerance",
        "control": "period_s report_s lost_after_s idle_below serving_above hold_s",
        "load": "kind rate_rps cv duration_s max_requests split max_tokens temperature top_p top_k trace trace.path",
        "quality": "exact_match_rows max_tokens metrics earlier_versions",
        "metrics": "flush_s flush_rows device_s",
        "no.such": "field",
    }.items()
    for field in fields.split()
]


def dry_run(path: Path, *overrides: str) -> int:
    """Run launch/run.py --dry-run in this process; fails on anything but an acceptance (0) or sentences (2)."""
    done = RUNNER.invoke(APP, ["--dry-run", "--config", str(path), "--", *overrides])
    context = f"{overrides!r}\n{path.read_text(errors='replace')[:2000]}"
    assert isinstance(done.exception, (SystemExit, type(None))), (context, done.exception)
    assert done.exit_code in (0, 2), context
    if done.exit_code:
        assert "error: " in done.stderr, context
        check_sentences(done.stderr, context)
    return done.exit_code


def check_sentences(said: str, context: str) -> None:
    assert len(said) < 20_000 and "Traceback" not in said and "pydantic" not in said, (context, said)


def override(draw: random.Random) -> str:
    return f"{draw.choice(FIELDS)}={draw.choice(VALUES)}"


def change_a_value(draw: random.Random, lines: list[str]) -> None:
    at = draw.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {draw.choice(VALUES)}"


def insert_a_line(draw: random.Random, lines: list[str]) -> None:
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(LINES))


def give_a_line_twice(draw: random.Random, lines: list[str]) -> None:
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))


def drop_a_line(draw: random.Random, lines: list[str]) -> None:
    lines.pop(draw.randrange(len(lines)))


def indent_a_line(draw: random.Random, lines: list[str]) -> None:
    at = draw.randrange(len(lines))
    lines[at] = draw.choice(["  ", "\t", "-  "]) + lines[at]


def flip_a_byte(draw: random.Random, lines: list[str]) -> None:
    at = draw.randrange(len(lines))
    if lines[at]:
        place = draw.randrange(len(lines[at]))
        lines[at] = lines[at][:place] + chr(draw.randrange(1, 0x3000)) + lines[at][place + 1 :]


MUTATIONS: list[Callable[[random.Random, list[str]], None]] = [
    change_a_value, change_a_value, insert_a_line, give_a_line_twice, drop_a_line, indent_a_line, flip_a_byte,
]  # fmt: skip


def mutated(draw: random.Random, folder: Path, sources: list[Path]) -> tuple[Path, list[str]]:
    """A file of a few mutations, and overrides."""
    lines = draw.choice(sources).read_text().splitlines()
    lines = [line for line in lines if line.strip()]
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        draw.choice(MUTATIONS)(draw, lines)
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if draw.random() < 0.02:
        content = draw.randbytes(draw.randrange(400))
    path = folder / "c.yaml"
    path.write_bytes(content)
    return path, [override(draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))]


def survive(seeds: range, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Dry runs of so many mutations; how many were accepted (0) and refused (2)."""
    monkeypatch.chdir(REPO)
    sources = [REPO / "configs" / f"{name}.yaml" for name in ("smoke", "launch", "gpu8_tp2")]
    codes: Counter[int] = Counter()
    for seed in seeds:
        path, overrides = mutated(random.Random(seed), folder, sources)
        codes[dry_run(path, *overrides)] += 1
    return codes


def test_no_mutation_of_a_configuration_ends_in_a_traceback(tmp_path, monkeypatch):
    codes = survive(range(500), tmp_path, monkeypatch)
    assert codes[0] > 30 and codes[2] > 200, "both ways are tried"


@pytest.mark.slow
def test_none_of_five_thousand_mutations_ends_in_a_traceback(tmp_path, monkeypatch):
    survive(range(500, 5500), tmp_path, monkeypatch)


def test_no_value_of_any_field_ends_in_a_traceback(tmp_path, monkeypatch):
    """Pairs of a field and a value by the thousand, without the way in of the command line."""
    draw = random.Random(0)
    codes = survive_values(tmp_path, monkeypatch, lambda: draw.sample(VALUES, 25))
    assert codes[True] > 100 and codes[False] > 1000, "both ways are tried"


@pytest.mark.slow
def test_none_of_all_values_of_all_fields_ends_in_a_traceback(tmp_path, monkeypatch):
    assert survive_values(tmp_path, monkeypatch, lambda: VALUES).total() > 5000


def survive_values(folder: Path, monkeypatch: pytest.MonkeyPatch, values: Callable[[], list[str]]) -> Counter[bool]:
    """How many pairs of a field and a value were accepted, and how many refused."""
    monkeypatch.chdir(REPO)
    path = folder / "c.yaml"
    path.write_text("{model: {path: m}, data: {path: configs/data/words.jsonl}, load: {kind: gamma}}")
    return Counter(read(path, f"{field}={value}") for field in FIELDS for value in values())


def read(path: Path, override: str) -> bool:
    """Whether it is accepted, by all checks that come before a model is read."""
    try:
        config = load_config(path, (override,))
        check_roles(config, make_layout(config.layout.ranks(fewest_replicas(config)), *layout_of(config)))
        assert Config.model_validate_json(config.model_dump_json()) == config
    except InputError as error:
        check_sentences(str(error), override)
        return False
    return True


def layout_of(config: Config) -> tuple[int, int | None, tuple[tuple[int, ...], ...] | None]:
    return config.layout.tp_size, config.layout.replicas, config.layout.replica_gpus
