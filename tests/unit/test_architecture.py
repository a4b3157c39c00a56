"""House rules that a machine can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
FILES = {
    p: p.relative_to(REPO).with_suffix("") for d in ("clif", "launch", "kernels") for p in (REPO / d).rglob("*.py")
}
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
    "clif.control", "clif.wire", "clif.data", "clif.metrics", "clif.types", "clif.states", "clif.config", "clif.layout",
    "clif.latency", "clif.text", "clif.cli", "clif.errors", "clif.replica.scheduler", "clif.replica.price",
    "clif.replica.blocks", "clif.replica.prefix", "clif.replica.jobs", "clif.roles", "clif.refusals",
    "clif.launchers", "clif.slurm", "clif.mpi", "clif.addresses", "clif.estimate", "clif.plan",
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = list(FILES[path].parts)
    if parts[0] in ("launch", "kernels"):
        parts.insert(0, "clif")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_anywhere(path: Path) -> set[str]:
    """Modules imported by any statement of this one, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_control_and_replica_meet_only_in_types_and_wire():
    for module, targets in ((module_name(p), imports_anywhere(p)) for p in FILES):
        for one, other in (("clif.control", "clif.replica"), ("clif.replica", "clif.control")):
            if module.startswith(one):
                assert not any(t.startswith(other) for t in targets), module


def test_kernels_package_imports_nothing():
    """transformers takes a top-level package of this name for Hugging Face's and executes it."""
    tree = ast.parse((REPO / "kernels" / "__init__.py").read_text())
    assert not tree.body


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
        ["-P", "-m", "clif.control", "--help"],
    ],
    ids=["launch", "clif", "control"],
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


def files():
    return {
        ".".join(
            (["clif"] if p.parts[0] != "clif" else []) + [*p.parts[:-1], *([] if p.stem == "__init__" else [p.stem])]
        ): REPO / p
        for d in ("clif", "launch", "kernels")
        for q in (REPO / d).rglob("*.py")
        for p in [q.relative_to(REPO)]
    }


def module_level(body):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from module_level(node.orelse)
            continue
        yield node
        for f in ("body", "orelse", "finalbody"):
            yield from module_level(getattr(node, f, []) or [])
        for h in getattr(node, "handlers", []):
            yield from module_level(h.body)


def test_no_cycles_counting_imports_inside_if_and_try():
    graph = {}
    for name, path in files().items():
        found = set()
        for node in module_level(ast.parse(path.read_text()).body):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        graph[name] = found & files().keys() - {name}
    done = set()

    def visit(n, way):
        assert n not in way, " -> ".join((*way, n))
        for t in graph[n] - done:
            visit(t, (*way, n))
        done.add(n)

    for n in graph:
        visit(n, ())


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
    for name, path in files().items():
        if name == "clif.collectives":
            continue
        tree = ast.parse(path.read_text())
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
