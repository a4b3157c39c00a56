"""Make CLIF's virtual environment: `python3 .ci/make_venv.py .venv`, run by the Python that it is to be one of.

Needs nothing but that Python. A torch that it has is kept, also one of an active environment. `python -m venv
--system-site-packages` would not do: it sees the packages of the interpreter below, not those of an environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

OLDEST = (2, 9)
"""The oldest torch that setup.py accepts."""
CPU_TORCH = "torch==2.13.0"
"""What a bare machine gets: the release that CLIF is tested with."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LINK = "torch_of_this_machine.pth"


def torch_here() -> tuple[Path, str] | None:
    """The folder that this Python imports torch from, and torch's version; None if it has none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:  # built from source
        version = subprocess.check_output([sys.executable, "-c", "import torch; print(torch.__version__)"], text=True)
    return Path(spec.origin).parents[1], version.strip()


def too_old(version: str) -> bool:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST


def refusal(version: str) -> str:
    """What to say of a torch that is too old. It is not hidden behind another one without a word."""
    oldest = ".".join(map(str, OLDEST))
    return (
        f"error: {sys.executable} has torch {version}, and CLIF needs {oldest} or newer: upgrade it there, name "
        "another Python (make ... PYTHON=/path/to/python3), or let .venv have a CPU build of its own (... TORCH=cpu)"
    )


def link_torch(venv: Path, folder: Path) -> None:
    """Let the environment import what lies in that folder; its own packages come first."""
    if not folder.is_relative_to(venv.resolve()):
        (site_packages(venv) / LINK).write_text(f"{folder}\n")


def site_packages(venv: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))


def install_cpu_torch(python: Path) -> None:
    """From PyTorch's own index for CPUs: for Linux, PyPI has the build for CUDA, which brings NVIDIA's libraries."""
    pip = [str(python), "-m", "pip", "install", "-qq"]
    print(f"installing the CPU build of {CPU_TORCH}", flush=True)
    if subprocess.run([*pip, "--retries", "1", "--timeout", "10", "--index-url", CPU_INDEX, CPU_TORCH]).returncode:
        print("PyTorch's index for CPUs does not answer: taking the build that pip finds by itself", flush=True)
        subprocess.run([*pip, CPU_TORCH], check=True)


def make(venv: Path, cpu_torch: bool = False, pip: bool = True) -> None:
    """Make or complete it. cpu_torch: with a torch of its own, whatever this Python has. Raises SystemExit."""
    found = None if cpu_torch else torch_here()
    if found is not None and too_old(found[1]):
        raise SystemExit(refusal(found[1]))
    subprocess.run([sys.executable, "-m", "venv", *([] if pip else ["--without-pip"]), str(venv)], check=True)
    (site_packages(venv) / LINK).unlink(missing_ok=True)
    if found is not None:
        print(f"using torch {found[1]} of {sys.executable}, in {found[0]}", flush=True)
        link_torch(venv, found[0])
    else:
        install_cpu_torch(venv / "bin" / "python")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--cpu-torch", action="store_true", help="a CPU build of its own, whatever this Python has")
    arguments = parser.parse_args()
    make(arguments.venv, arguments.cpu_torch)
