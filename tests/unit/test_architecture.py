"""House rules that a machine can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
BASICS = ("clif.config", "clif.distributed", "clif.storage")
MODEL = ("clif.models", "clif.adapters", "clif.engine", "clif.training", "clif.replica")
MAY_IMPORT = {
    "clif.kernels": (),
    "clif.config": (),
    "clif.distributed": ("clif.config",),
    "clif.storage": ("clif.config", "clif.distributed"),
    "clif.data": BASICS,
    "clif.metrics": BASICS,
    "clif.quality": (*BASICS, "clif.data", "clif.metrics"),
    "clif.wire": BASICS,
    "clif.jobs": (*BASICS, "clif.data", "clif.wire"),
    "clif.models": (*BASICS, "clif.kernels", "clif.data"),
    "clif.adapters": (*BASICS, "clif.models"),
    "clif.engine": (*BASICS, "clif.kernels", "clif.models", "clif.adapters"),
    "clif.training": (*BASICS, "clif.kernels", "clif.data", "clif.wire", "clif.models", "clif.adapters", "clif.engine"),
    "clif.replica": (*BASICS, "clif.kernels", "clif.data", "clif.metrics", "clif.wire", *MODEL),
    "clif.control.policy": (*BASICS, "clif.wire"),
    "clif.control": (
        *BASICS,
        "clif.data",
        "clif.metrics",
        "clif.quality",
        "clif.wire",
        "clif.jobs",
        "clif.adapters",
        "clif.control.policy",
    ),
    "clif.frontend": (*BASICS, "clif.data", "clif.wire", "clif.jobs"),
    "clif.simulate": (*BASICS, "clif.metrics", "clif.wire", "clif.control"),
    "clif.rank": (*BASICS, "clif.metrics", "clif.wire", *MODEL),
    "clif.emulated": (*BASICS, "clif.metrics", "clif.wire", *MODEL, "clif.rank"),
    "clif.clients": (*BASICS, "clif.data", "clif.metrics", "clif.quality", "clif.adapters"),
    "clif.launch": (*BASICS, "clif.data", "clif.rank"),
}
"""The order of the packages, lowest first. All of them may import the modules that lie directly in clif."""
FLAT_MAY_IMPORT = {
    "clif.cli": ("clif.clients", "clif.data", "clif.metrics", "clif.control", "clif.storage"),
    "clif.cli_keys": ("clif.storage",),
    "clif.run": (
        *("clif.config", "clif.data", "clif.distributed", "clif.quality", "clif.rank", "clif.emulated"),
        "clif.storage",
    ),
    "clif.llm": ("clif.config", "clif.distributed", "clif.models", "clif.adapters", "clif.engine"),
}
"""The modules directly in clif that import a package. No other does."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
FORBID_TORCH = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Forbid())
"""
TWO_RANKS = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCH_FREE = [
    "clif.types", "clif.states", "clif.errors", "clif.latency", "clif.tokenizer", "clif.exit_report",
    "clif.cli", "clif.cli_keys", "clif.run",
    "clif.prompts", "clif.sampling_params", "clif.text_stream", "clif.constraints",
    "clif.config", "clif.storage", "clif.data", "clif.metrics", "clif.quality", "clif.wire", "clif.jobs",
    "clif.control", "clif.simulate", "clif.frontend",
    "clif.distributed.layout", "clif.distributed.roles", "clif.distributed.launch_env", "clif.distributed.slurm",
    "clif.distributed.mpi", "clif.distributed.addresses",
    "clif.models.estimate", "clif.models.spec", "clif.models.expert_spec", "clif.models.shard",
    "clif.models.targets", "clif.models.hf_config", "clif.models.weights.files",
    "clif.models.weights.gguf_header",
    "clif.adapters.store", "clif.adapters.peft_files",
    "clif.engine.scheduler", "clif.engine.cost_model", "clif.engine.blocks", "clif.engine.prefix", "clif.engine.jobs",
    "clif.engine.job_queue", "clif.engine.step_record", "clif.engine.coserving",
    "clif.replica.records", "clif.rank.dry_run", "clif.rank.preflight", "clif.rank.control_process",
    "clif.rank.serve_loop", "clif.rank.signals", "clif.emulated", "clif.clients",
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = list(path.relative_to(REPO).with_suffix("").parts)
    if parts[0] != "clif":
        parts.insert(0, "clif")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for d in ("clif", "launch", "kernels") for p in sorted((REPO / d).rglob("*.py"))}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names that these statements import: modules, and what is taken from them."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"a relative import in line {node.lineno}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def when_loaded(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run while a module is imported, also those inside of if and try; not those for types only."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from when_loaded(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from when_loaded(getattr(node, field, []) or [])
        for handler in getattr(node, "handlers", []):
            yield from when_loaded(handler.body)


def package_of(name: str) -> str | None:
    """The package of clif that a dotted name belongs to; None for what lies directly in clif or outside of it."""
    return max((p for p in MAY_IMPORT if name == p or name.startswith(f"{p}.")), key=len, default=None)


def test_packages_import_only_what_lies_below_them():
    for name, path in FILES.items():
        if path.parent == REPO / "clif":
            allowed = FLAT_MAY_IMPORT.get(name, ())
        else:
            assert package_of(name), f"{name}: give its package a line in MAY_IMPORT"
            allowed = (package_of(name), *MAY_IMPORT[package_of(name)])
        wrong = {package_of(t) for t in imported(ast.walk(parsed(path)))} - {None, *allowed}
        assert not wrong, f"{name} imports {wrong}: the order of the packages, MAY_IMPORT, does not allow it"


def test_the_order_of_the_packages_is_an_order_and_keeps_control_and_engine_apart():
    """They meet in clif.types and clif.wire only."""
    for package in ("clif.engine", "clif.training", "clif.replica"):
        assert package not in MAY_IMPORT["clif.control"] and "clif.control" not in MAY_IMPORT[package]
    below: set[str] = set()
    for package, allowed in MAY_IMPORT.items():
        assert set(allowed) - {package} <= below, f"{package} stands before {set(allowed) - below}"
        below.add(package)
    folders = {module_name(p) for p in (REPO / "clif").iterdir() if (p / "__init__.py").is_file()}
    assert folders | {"clif.launch", "clif.kernels", "clif.control.policy"} == MAY_IMPORT.keys()


def test_files_and_functions_keep_their_limits():
    """Kernels are exempt: one is a single function for the compiler."""
    for path in [*FILES.values(), *sorted((REPO / "benchmarks").glob("*.py"))]:
        where = path.relative_to(REPO)
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_FILE_LINES, f"{where} has {lines} lines, {MAX_FILE_LINES} are allowed: split it"
        for node in ast.walk(parsed(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{where}: {node.name} has {length} lines: split it"


def test_every_test_of_an_error_says_which_error_it_expects():
    """pytest.raises(SomeError) alone passes for an error of another cause, unless the test made it up itself."""
    for path in sorted((REPO / "tests").rglob("*.py")):
        nodes = list(ast.walk(parsed(path)))
        own = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        for item in (item for node in nodes if isinstance(node, ast.With) for item in node.items):
            call = item.context_expr
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "pytest.raises":
                continue
            named = any(k.arg == "match" for k in call.keywords) or item.optional_vars is not None
            made_up = ast.unparse(call.args[0]) in own
            assert named or made_up, f"{path.relative_to(REPO)}:{call.lineno}: give match=, or check the text"


def test_kernels_package_imports_nothing():
    """transformers takes a top-level package of this name for Hugging Face's and executes it."""
    assert not parsed(FILES["clif.kernels"]).body


def run(code_or_args: list[str], tmp_path: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(FORBID_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "120", **extra}
    return subprocess.run(
        [sys.executable, *code_or_args], cwd=REPO, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_control_plane_works_without_torch(tmp_path):
    code = (
        "import importlib, pkgutil\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    for found in pkgutil.walk_packages(getattr(module, '__path__', []), name + '.'):\n"
        "        if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
    )
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["launch/run.py", "--help"],
        ["-c", "import sys; sys.argv = ['clif', '--help']; from clif.cli import main; main()"],
        ["-P", "-m", "clif.run", "--help"],
        ["-P", "-m", "clif.control", "--help"],
    ],
    ids=["launch", "clif", "run", "control"],
)
def test_help_works_without_torch(command, tmp_path):
    done = run(command, tmp_path)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr


def test_dry_run_prints_the_layout_without_torch(tmp_path):
    done = run(["launch/run.py", "--dry-run", "--config", "configs/smoke.yaml", "layout.replicas=3"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2] == "replica 2: ranks [2], leader 2"


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_both_spellings_of_the_local_rank_are_accepted(tmp_path, flag):
    command = ["launch/run.py", flag, "--dry-run", "--config", "configs/smoke.yaml"]
    assert run(command, tmp_path, **TWO_RANKS, RANK="1").returncode == 0
    assert "--local_rank is 1" in run(command, tmp_path).stderr, "nobody else was started"


def test_ranks_that_do_not_fit_are_refused_without_torch(tmp_path):
    command = ["launch/run.py", "--config", "configs/smoke.yaml", "layout.tp_size=2"]
    done = run(command, tmp_path, **{**TWO_RANKS, "WORLD_SIZE": "3"}, RANK="0", LOCAL_RANK="0")
    assert done.returncode == 2
    assert "layout.tp_size 2 does not divide the 3 ranks" in done.stderr


def test_no_cycles_counting_imports_inside_if_and_try():
    graph = {name: imported(when_loaded(parsed(path).body)) & FILES.keys() - {name} for name, path in FILES.items()}
    done = set()

    def visit(name, way):
        assert name not in way, " -> ".join((*way, name))
        for target in graph[name] - done:
            visit(target, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_collectives_have_one_caller_under_any_name():
    known = {
        n
        for n in dir(torch.distributed)
        if n.split("_into")[0].removeprefix("_")
        in {
            "all_reduce",
            "all_gather",
            "all_gather_object",
            "all_to_all",
            "all_to_all_single",
            "barrier",
            "broadcast",
            "broadcast_object_list",
            "gather",
            "gather_object",
            "reduce",
            "reduce_scatter",
            "reduce_scatter_tensor",
            "scatter",
            "scatter_object_list",
            "send",
            "recv",
            "isend",
            "irecv",
            "batch_isend_irecv",
            "monitored_barrier",
            "all_reduce_coalesced",
            "all_gather_coalesced",
        }
    }
    assert "all_gather_into_tensor" in known
    for name, path in FILES.items():
        if name == "clif.distributed.collectives":
            continue
        tree = parsed(path)
        aliases = {"torch.distributed"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {a.asname for a in node.names if a.name.startswith("torch.distributed") and a.asname}
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                assert not {a.name for a in node.names} & known, f"{path}:{node.lineno}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in known:
                assert ast.unparse(node.value) not in aliases, f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.Attribute) and node.attr in ("allreduce", "allgather")), (
                f"{path}:{node.lineno}"
            )
