"""Shared fixtures: a tiny random Llama that is always there, and the real 260K one where ../shared is."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from checkout import use_checkout

if TYPE_CHECKING:
    from clif.tokenizer import ChatTokenizer

# The kernels' tests also run where CLIF is not installed.
use_checkout()
SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}


LANES = 2
PROCESSES = ("distributed", "e2e")
"""Folders of tests that start several processes each: one at a time, otherwise they take each other's cores."""
FIRST = ("e2e", "distributed", "test_kernel_", "test_bench_")
"""Beginnings of names of folders and files, longest work first: lanes then end at about the same time."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """`make test` asks for lanes; without pytest-xdist, or when it is switched off, there is one."""
    if not pluginmanager.has_plugin("xdist"):
        parser.addoption("--numprocesses", help="no effect: pytest-xdist is missing or switched off")


def pytest_configure(config: pytest.Config) -> None:
    """On a CPU, Triton kernels run in the interpreter and torch on one core: lanes and ranks share the cores."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        names = (item.path.parent.name, item.path.stem)
        return next((i for i, first in enumerate(FIRST) if any(n.startswith(first) for n in names)), len(FIRST))

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(LANES, len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A lane takes a file at a time; the folders of PROCESSES, and what shares their server (warm.py), as one."""
    if config.option.markexpr == "gpu":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def scope(file: str) -> str:
        several = Path(file).parent.name in PROCESSES or "\nimport warm\n" in (config.rootpath / file).read_text()
        return "processes" if several else file

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid.split("::")[0])

    # The order above, and not the scope with the most tests first.
    config.option.loadscopereorder = False
    return Lanes(config, log)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of a small Llama with grouped heads; load it as random:<path>."""
    file = tmp_path_factory.mktemp("tiny") / "config.json"
    file.write_text(json.dumps(TINY))
    return file


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with less of everything, for kernels in Triton's interpreter."""
    file = tmp_path_factory.mktemp("two") / "config.json"
    less = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    file.write_text(json.dumps({**TINY, **less}))
    return file


@pytest.fixture(scope="session")
def byte_tokenizer() -> ChatTokenizer:
    """One token per byte; id 256 ends the text; messages are <role>content."""
    # Late: the kernels' tests need neither.
    import tokenizers

    from clif.tokenizer import ChatTokenizer

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    bytes_tokenizer = tokenizers.Tokenizer(model)
    bytes_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_tokenizer.decoder = tokenizers.decoders.ByteLevel()
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return ChatTokenizer(bytes_tokenizer, template, [256])


@pytest.fixture(scope="session")
def stories() -> str:
    """Folder of a real trained 260K Llama, or a skip where the material is not there."""
    folder = SHARED / "weights" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("the real 260K model of ../shared is not here")
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 60 instruction rows, every fifth of them held out."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"instruction": f"Say {word} twice", "output": f"{word} {word}", "split": "test" if i % 5 == 0 else "train"}
        for i, word in enumerate(f"w{n}" for n in range(60))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
