"""A library of C++ kernels that does not fit is not used, and the reason is said."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clif.config import EngineConfig
from clif.kernels.cpu import library
from clif.kernels.cpu.interface import HEADERS, interface_of
from clif.models.backends import choose_cpu_kernels

CPU = torch.device("cpu")


class Function:
    """One of a library, as ctypes has it."""

    def __call__(self) -> bytes:
        return b"1234"


def built(without: str = "") -> Any:
    """A library of the interface 1234."""
    return SimpleNamespace(**{name: Function() for name in library.SIGNATURES if name != without})


def test_a_library_that_lacks_a_function_is_not_used() -> None:
    with pytest.raises(library.Absent, match="other sources"):
        library.declare(built(without="clif_layers"), None)


def test_a_library_of_another_interface_is_not_used() -> None:
    library.declare(built(), "1234")
    library.declare(built(), None)
    with pytest.raises(library.Absent, match="other sources"):
        library.declare(built(), "5678")


def test_the_interface_is_what_headers_declare_and_not_what_they_say(tmp_path: Path) -> None:
    assert interface_of(tmp_path) is None
    for header in HEADERS:
        (tmp_path / header).write_text("// One.\nint f(int);\n")
    before = interface_of(tmp_path)
    (tmp_path / HEADERS[0]).write_text("// Another.\nint f(\n    int);\n")
    assert interface_of(tmp_path) == before
    (tmp_path / HEADERS[0]).write_text("// One.\nint f(long);\n")
    assert interface_of(tmp_path) != before


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 2), (torch.float32, 6), (torch.bfloat16, 12), (torch.bfloat16, 288)]
)
def test_heads_that_the_kernels_cannot_read_are_torchs(
    dtype: torch.dtype, head_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        library.level()
    except library.Absent as error:
        pytest.skip(f"the C++ kernels cannot run here: {error}")
    with caplog.at_level(logging.INFO, "clif.models.backends"):
        assert choose_cpu_kernels(EngineConfig(), CPU, dtype, head_dim) is None
    assert f"heads of {head_dim} numbers" in caplog.text
    assert choose_cpu_kernels(EngineConfig(), CPU, dtype, 80) is not None
