"""Packaging of CLIF. Tool settings are in pyproject.toml; what is needed, and why, is here."""

import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

REQUIRES = [
    # Runs the model. Any recent torch is accepted: a machine with GPUs keeps the one it has.
    "torch>=2.9",
    "transformers>=5.10,<6",  # modelling code, attention interface, GGUF reading
    "peft>=0.18,<1",  # adapter_config.json as PEFT itself writes it
    "safetensors>=0.6",  # adapters and checkpoints without pickle
    "gguf>=0.17",  # read by transformers for .gguf files
    "accelerate>=1.10",  # needed by transformers to load GGUF; builds a model without memory for its weights
    "huggingface-hub>=1",  # the folder of a hub name; transformers brings it
    "tokenizers>=0.22",  # the control process tokenises without torch
    "jinja2>=3.1",  # chat templates
    "numpy>=1.26",
    "pydantic>=2.10,<3",  # typed, strict configuration
    "PyYAML>=6",
    "msgspec>=0.19,<1",  # typed messages without pickle
    "pyzmq>=26,<28",  # channels between the control process and the replicas
    "typer>=0.15,<1",
    "rich>=13",
    "h5py>=3.12,<4",  # metrics
    # The HTTP front end; imported only where serve.http.port is set, and by the clients' commands.
    "fastapi>=0.115,<1",  # routes, and the OpenAPI document that tests and docs/api.md are made from
    "uvicorn>=0.34,<1",  # serves them
    "uvloop>=0.21; platform_system != 'Windows'",  # its event loop: twice as fast as asyncio's
    "httptools>=0.6",  # its parser in C
    "sse-starlette>=2.2,<4",  # the live page's stream of events
    "python-multipart>=0.0.20",  # uploads
    "prometheus-client>=0.21,<1",  # /metrics
    "httpx>=0.27,<1",  # clif chat, loadtest, admin, status
    "llguidance>=1.9,<2",  # answers that follow a JSON schema: masks of tokens; one wheel, without torch
    # quality.metrics: bleu and chrf as everyone reports them, and answers against a row's JSON schema. Both are small;
    # they are imported only where these metrics are asked for.
    "sacrebleu>=2.5,<3",
    "jsonschema-rs>=0.30,<1",
    "psutil>=6",  # device samples of the host
    "nvidia-ml-py>=12.560",  # device samples of NVIDIA GPUs; module pynvml
    # Launchers for clusters; imported only where used (mpi4py raises RuntimeError where no MPI is installed).
    "mpi4py>=4,<5",
    "deepspeed>=0.16",
]

BENCH = [
    "matplotlib>=3.9",  # plots of benchmarks/coserving.py
]

QUALITY = [
    # No hard dependencies: each brings others that only its own metric needs.
    "rouge-score>=0.1.2",  # rouge, with nltk and absl-py; slow to import
    "codebleu>=0.7",  # codebleu, bound to old releases of tree-sitter
    "tree-sitter-python~=0.21.0",  # the default of quality.code_language; other languages have packages like it
]

NF4 = [
    "bitsandbytes>=0.46",  # model.weight_dtype nf4; large, and slow to import
]

DEV = [
    *BENCH,  # what the plots show is tested
    *QUALITY,  # compared with the values that the libraries publish
    # The kernels' tests: interpreter and compiler need no GPU. A torch for CUDA brings the Triton it was built for.
    "triton>=3.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",  # `make test` in two lanes, one for each core
    "hypothesis>=6.100",
    "compressed-tensors>=0.20",  # what packed checkpoints are compared with; CLIF reads them without it
    "openai>=2",  # the client that users have: what the server answers is read by it
    "schemathesis>=4",  # requests made from the server's own OpenAPI document
    "ruff>=0.12",
    "mypy>=1.15",
    "types-PyYAML",
    "types-psutil",
    "pre-commit>=4",
]

interface_of = runpy.run_path("kernels/cpu/interface.py")["interface_of"]
CPU_KERNELS = Extension(
    "clif.kernels.cpu._clif_cpu",
    sorted(str(path) for path in Path("kernels/cpu").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("kernels/cpu").glob("*.h")),
    # The library says which interface it has: see there.
    define_macros=[("CLIF_INTERFACE", f'"{interface_of(Path("kernels/cpu"))}"')],
    # No -march: each file names the instructions that it needs, and what the machine has is asked when it runs. Not
    # linked with OpenMP: torch's own threads serve, which are loaded before.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        # A product and a sum become one operation only where the source says so: no result depends on the compiler.
        "-ffp-contract=off",
        # GCC warns of its own headers of intrinsics.
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    language="c++",
    # Without a compiler CLIF installs all the same: torch's operators serve.
    optional=True,
)
HAS_CPU_KERNELS = sys.platform == "linux" and platform.machine() == "x86_64"

AT_THE_TOP = {"clif.kernels": "kernels", "clif.launch": "launch", "clif.configs": "configs"}

setup(
    name="clif",
    version="0.1.0",
    description="Serve a language model and fine-tune it, federated, in the slack of its replicas",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/, launch/ and configs/ stand at the top for the reader, and are installed inside clif: a top-level package
    # "kernels" on sys.path would be taken for Hugging Face's by transformers.
    packages=[*find_packages(include=["clif", "clif.*"]), *AT_THE_TOP, "clif.kernels.testing", "clif.kernels.cpu"],
    package_dir={"clif": "clif", **AT_THE_TOP},
    package_data={
        "clif.kernels": ["tuned/*.json"],
        "clif.frontend": ["page.html"],
        "clif.configs": ["*.yaml", "*.example", "models/*.json", "data/*.jsonl", "grafana/*.json"],
    },
    ext_modules=[CPU_KERNELS] if HAS_CPU_KERNELS else [],
    install_requires=REQUIRES,
    extras_require={"dev": DEV, "bench": BENCH, "quality": QUALITY, "nf4": NF4},
    entry_points={"console_scripts": ["clif = clif.cli:main"]},
)
